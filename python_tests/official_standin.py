"""The official code's structure, names and formulas in small, to patch without transformers.

Written from the reference: the four classes have the attributes, methods and parameter names of the
official ones and make the tensors that those make, bugs included. The backbone is ours, which has
the official parameter names.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_rt import official
from calm_rt.nn import AutoencoderConfig, CalmConfig, EnergyHead
from calm_rt.nn.autoencoder import AutoencoderLayer, RMSNorm, init_weights
from calm_rt.nn.backbone import Transformer

AE = {"patch_size": 4, "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
AE |= {"latent_size": 8, "pad_token_id": 3}
LM = {**AE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
LM |= {"num_mlp_layers": 1, "noise_size": 6, "num_samples": 4, "max_position_embeddings": 64}
DRAWS = 200  # of a loss, to compare two means
SIGMAS = 5.0  # two means of the same distribution differ by more once in two million times


@dataclass
class CausalLMOutputWithPast:
    loss: Tensor | None = None
    logits: Tensor | None = None

    def __getitem__(self, index: int | slice) -> Any:  # as ModelOutput has it, for Trainer
        values = [getattr(self, field.name) for field in fields(self)]
        return tuple(value for value in values if value is not None)[index]


@dataclass
class CustomCausalLMOutput(CausalLMOutputWithPast):
    brier1: Tensor | None = None
    brier2: Tensor | None = None
    brier3: Tensor | None = None
    brier4: Tensor | None = None


class AELayer(AutoencoderLayer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.layernorm(x))


class Encoder(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        size, layers = config.hidden_size, config.num_encoder_layers
        self.patch_size, self.num_stage_layers = config.patch_size, layers // 2
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.encoder_layers = nn.ModuleList(AELayer(config) for _ in range(layers))
        self.hidden_to_latent = nn.Linear(size, 2 * config.latent_size)
        self.squeeze_layer = nn.Linear(self.patch_size * size, size)
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, P K] -> [B, P, 2 L]."""
        batch, half = len(input_ids), self.num_stage_layers
        x = self.embed_tokens(input_ids.reshape(-1, self.patch_size))
        if self.training:
            x = x.bfloat16().to(x.dtype)  # the official norm goes back to the weights' type
        for layer in self.encoder_layers[:half]:
            x = layer(x)
        x = self.squeeze_layer(x.reshape(len(x), 1, -1))
        for layer in self.encoder_layers[half : 2 * half]:
            x = layer(x)
        return self.hidden_to_latent(self.norm(x)).reshape(
            batch, -1, self.hidden_to_latent.out_features
        )


class Decoder(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        size, layers = config.hidden_size, config.num_decoder_layers
        self.patch_size, self.num_stage_layers = config.patch_size, layers // 2
        self.latent_to_hidden = nn.Linear(config.latent_size, size)
        self.decoder_layers = nn.ModuleList(AELayer(config) for _ in range(layers))
        self.expand_layer = nn.Linear(size, self.patch_size * size)
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, latent_states: Tensor) -> Tensor:
        """[B, P, L] -> logits [B, P K, V]."""
        half, x = self.num_stage_layers, self.latent_to_hidden(latent_states)
        for layer in self.decoder_layers[:half]:
            x = layer(x)
        x = self.expand_layer(x).reshape(len(x), x.shape[1] * self.patch_size, -1)
        for layer in self.decoder_layers[half : 2 * half]:
            x = layer(x)
        return F.linear(self.norm(x), self.lm_head_weight)


class Autoencoder(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.patch_size = config.patch_size
        self.decoder.lm_head_weight = self.encoder.embed_tokens.weight
        self.ae_dropout, self.kl_clamp = config.ae_dropout, config.kl_clamp
        self.kl_weight = config.kl_weight
        init_weights(self, 0.2)

    def forward(self, input_ids: Tensor = None, labels: Tensor | None = None, **kwargs: Any):
        ids = input_ids.reshape(-1, self.patch_size)
        if self.training:
            ids = ids * (torch.rand_like(ids.float()) > self.ae_dropout).long()
        mean, log_std = self.encoder(input_ids=ids).chunk(2, -1)
        latents = mean + torch.randn_like(mean) * log_std.exp()
        latents = F.dropout(latents, self.ae_dropout, self.training)
        kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std)
        logits = self.decoder(latent_states=latents).float().view(-1, self.config.vocab_size)
        loss = F.cross_entropy(logits, labels.view(-1))
        if self.training:
            kl = kl.clamp(min=self.kl_clamp).sum(-1).mean()
            loss = loss * self.patch_size + kl * self.kl_weight
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class LlamaModel(Transformer):
    def __init__(self, config: Any):
        super().__init__(config)
        weight = self.embed_tokens.weight.detach()
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)  # torch's own

    def forward(self, inputs_embeds: Tensor) -> Any:
        return (super().forward(inputs_embeds),)


class MLPGenerator(EnergyHead):
    def sample(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., L]."""
        shape = *hidden_states.shape[:-1], self.config.noise_size
        noise = torch.rand(shape, dtype=hidden_states.dtype, device=hidden_states.device) - 0.5
        x = self.norm_noise(self.noise_embd(noise))
        context = self.norm_hidden(self.hidden_embd(hidden_states))
        for block in self.mlp_blocks:
            gate, up = block.linears(torch.cat([block.in_ln(x), context], -1)).chunk(2, -1)
            x = x + block.down_proj(F.silu(gate) * up)
        return self.final_layer.linears(self.final_layer.in_ln(x))


class CALM(nn.Module):
    def __init__(self, config: Any, autoencoder: Autoencoder):
        super().__init__()
        self.config, self.ae_model = config, autoencoder
        autoencoder.requires_grad_(False).eval()
        size, wide = config.hidden_size, config.patch_size * config.hidden_size
        self.transformer = LlamaModel(config)
        self.patch_size, self.padding_idx = config.patch_size, config.pad_token_id
        self.eos_token_id = config.eos_token_id
        self.embed_proj = nn.Sequential(
            nn.Linear(wide, 2 * size),
            nn.SiLU(),
            nn.Linear(2 * size, size),
            nn.LayerNorm(size, 1e-6),
        )

    def _context(self, input_ids: Tensor, labels: Tensor):
        """The official forward's beginning: contexts [R, H], posterior [R, L], outputs."""
        labels = labels[:, self.patch_size :]
        mask = labels.ne(-100)
        latents = self.ae_model.encoder(input_ids=labels[mask].unsqueeze(0)).squeeze(0)
        tokens = self.transformer.embed_tokens(input_ids)
        patches = tokens.reshape(len(tokens), -1, self.patch_size * tokens.shape[-1])[:, :-1]
        outputs = self.transformer(inputs_embeds=self.embed_proj(patches))
        first = mask.reshape(len(labels), -1, self.patch_size)[..., 0]
        return outputs[0][first], *latents.chunk(2, -1), outputs

    @torch.no_grad()
    def eval_brier(self, latent_predictions: Tensor, targets: Tensor, outputs: Any, loss: Tensor):
        shape = (2, len(targets), -1, latent_predictions.shape[-1])
        pairs = latent_predictions[:2].reshape(shape)
        first, second = (
            self.ae_model.decoder(latent_states=pair)
            .argmax(-1)
            .view(len(targets), -1, self.patch_size)
            for pair in pairs
        )
        targets = targets.reshape(first.shape)
        same = [(first == targets), (second == targets), (first == second)]
        one, two, both = (s.float().cumprod(-1) for s in same)
        names = {f"brier{n}": b for n, b in enumerate((one + two - both).mean((0, 1))[:4], 1)}
        return CustomCausalLMOutput(loss=loss, **names)

    @torch.no_grad()
    def temperature_sampling(
        self, hidden_states: Tensor, temperature: float = 0.5, num_samples: int = 200
    ) -> Tensor:
        if not 0 < temperature <= 1:
            raise ValueError("temperature beyond (0, 1]")
        n, count = round(1 / temperature), 1 if temperature == 1 else num_samples
        if not math.isclose(n, 1 / temperature, rel_tol=1e-9):
            raise ValueError("1 / temperature is no integer")
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        latents = self.generative_head.sample(flat.unsqueeze(1).repeat(1, count, 1))
        pool = self.ae_model.decoder(latents).argmax(-1).view(len(flat), count, self.patch_size)
        rows = official.select_patch(pool, n=n)
        if rows.ndim == 2:  # the chosen tokens
            return rows.view(*hidden_states.shape[:-1], self.patch_size)
        return pool[torch.arange(len(pool)), rows].view(*hidden_states.shape[:-1], -1)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_length: int = 2048, temperature: float = 0.5, **kwargs: Any
    ) -> Tensor:
        self.eval()
        missing, pad = -input_ids.shape[1] % self.patch_size, self.padding_idx
        ids = torch.cat([input_ids, torch.full((len(input_ids), missing), pad)], 1)
        going = torch.ones(len(ids), 1, dtype=torch.int64)
        while True:
            tokens = self.transformer.embed_tokens(ids)
            patches = tokens.reshape(len(ids), -1, self.patch_size * tokens.shape[-1])
            hidden = self.transformer(inputs_embeds=self.embed_proj(patches))[0][:, -1]
            new = self.temperature_sampling(hidden, temperature) * going + pad * (1 - going)
            ids = torch.cat([ids, new], 1)
            going = going * (new != self.eos_token_id).all(1, keepdim=True).long()
            if ids.shape[1] >= max_length or not going.any():
                break
        rows = [row[row != pad] for row in ids]
        return torch.stack([F.pad(row, (0, ids.shape[1] - len(row)), value=pad) for row in rows])


class EnergyTransformer(CALM):
    def __init__(self, config: Any, autoencoder: Autoencoder):
        super().__init__(config, autoencoder)
        self.mlp_generator = MLPGenerator(config)
        self.generative_head = self.mlp_generator
        self.noise_size, self.beta = config.noise_size, config.beta
        self.num_samples = config.num_samples
        init_weights(self.generative_head, 0.2)

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.norm(first - second, dim=-1).pow(self.beta)

    def energy_score(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        targets = mean + log_std.exp() * torch.randn(100, *mean.shape, device=mean.device)
        among = self.distance(x[:, None], x[None]).sum((0, 1)) / (len(x) * (len(x) - 1))
        return among - 2 * self.distance(x[:, None], targets[None]).mean((0, 1))

    def forward(self, input_ids: Tensor = None, labels: Tensor | None = None, **kwargs: Any):
        hidden, mean, log_std, outputs = self._context(input_ids, labels)
        draws = self.generative_head.sample(hidden.unsqueeze(0).repeat(self.num_samples, 1, 1))
        loss = -self.energy_score(draws, mean, log_std).mean()
        if not self.training:
            return self.eval_brier(draws, input_ids[:, self.patch_size :], outputs, loss)
        return CustomCausalLMOutput(loss=loss)


class FlowLoss(nn.Module):
    """A head with the official interface whose network is one linear map."""

    def __init__(self, config: Any):
        super().__init__()
        self.in_channels = config.latent_size
        self.net = nn.Linear(config.hidden_size, config.latent_size)

    def forward(self, target: Tensor, z: Tensor) -> Tensor:
        return (self.net(z) - target).square().mean(-1).flatten()

    def sample(self, z: Tensor) -> Tensor:
        return self.net(z) + torch.randn(*z.shape[:-1], self.in_channels)


class DiffLoss(FlowLoss):
    pass


class DiffusionTransformer(CALM):
    head = DiffLoss

    def __init__(self, config: Any, autoencoder: Autoencoder):
        super().__init__(config, autoencoder)
        self.generative_head = self.head(config)

    def forward(self, input_ids: Tensor = None, labels: Tensor | None = None, **kwargs: Any):
        hidden, mean, log_std, outputs = self._context(input_ids, labels)
        repeated = hidden.unsqueeze(0).repeat(self.num_samples, 1, 1)
        eps = torch.randn(self.num_samples, *mean.shape)
        loss = self.generative_head(z=repeated, target=mean + eps * log_std.exp()).mean()
        if not self.training:
            draws = self.generative_head.sample(repeated[:2])
            return self.eval_brier(draws, input_ids[:, self.patch_size :], outputs, loss)
        return CustomCausalLMOutput(loss=loss)


class FlowTransformer(DiffusionTransformer):
    head = FlowLoss


def build(kind: str = "EnergyTransformer", seed: int = 0, **changes: Any) -> nn.Module:
    """A model of a kind with drawn weights; changes go to both configurations."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        autoencoder = Autoencoder(AutoencoderConfig(**{**AE, **changes}))
        if kind == "Autoencoder":
            return autoencoder
        return globals()[kind](CalmConfig(**{**LM, **changes}), autoencoder)


def token_ids(batch: int = 2, patches: int = 4, patch_size: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, AE["vocab_size"], (batch, patches * patch_size), generator=generator)


def losses(model: nn.Module, ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """[DRAWS] losses with new noise each."""
    labels = ids if labels is None else labels
    with torch.no_grad():
        return torch.stack(
            [model(input_ids=ids, labels=labels).loss for _ in range(DRAWS)]
        ).double()


def assert_same_mean(first: Tensor, second: Tensor) -> None:
    """first, second: [N, ...] draws of what should be one distribution."""
    spread = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    error = (first.mean(0) - second.mean(0)).abs()
    assert (error <= SIGMAS * spread).all(), (error / spread).max()
