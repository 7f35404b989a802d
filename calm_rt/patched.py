"""What the methods of official instances become: the same results by the ops.

Each function is bound to an instance in place of the official method of the same name and keeps
its signature. What it needs stands in `Patch`, on the instance; where that is gone, because the
model was unpatched while somebody else's wrapper kept the method, the official method runs.
Random numbers come from torch's generator of the device as one seed a call, and from there by
logical rows, so torch.manual_seed repeats them and ranks with equal seeds still draw apart.
Diffusion and flow heads draw by themselves, from torch's own generators.
"""

import math
import random
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from calm_rt import ops
from calm_rt.brier import ORDERS, brier_from_predictions
from calm_rt.evaluation import brier_lm
from calm_rt.losses import MASK_ID
from calm_rt.nn import EnergyHead
from calm_rt.official_models import ENERGY, Patch, current
from calm_rt.ops.check import check
from calm_rt.reference import Stream
from calm_rt.sampling import parse_temperature, sample_patches

IGNORED = -100  # a label that is no target
NUM_TARGETS = 100  # M, a constant of the official energy_score
ATTRIBUTE = "_calm_rt_patch"  # of a patched module: its Patch
RANK_BITS = 40  # rows of one call that a rank has to itself


def seed_on(device: torch.device) -> Tensor:
    """A seed from torch's generator of the device: [] int64."""
    return torch.randint(2**62, (), device=device)


def rows_on(device: torch.device, count: int) -> Tensor:
    """Row ids that no other rank has: [R] int64."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if parallel else 0
    return torch.arange(count, device=device) + (rank << RANK_BITS)


def read_temperature(
    patch: Patch, temperature: float | Fraction | str, method: str = "pool"
) -> Fraction:
    """As parse_temperature, but where that bug is kept it refuses what the official code does."""
    value = parse_temperature(temperature, method)
    if "strict_temperature" in patch.keep_bugs and method == "pool":
        given = Fraction(temperature) if isinstance(temperature, str) else temperature
        whole = value > 0 and math.isclose(1 / float(given), value.denominator, rel_tol=1e-9)
        check(whole, "temperature", "1/n, as keep_bugs has strict_temperature", temperature)
    return value


def choosing_seed(patch: Patch, device: torch.device, temperature: Fraction) -> Tensor:
    """`seed_on`, with Python's random in it below T = 1 where that bug is kept."""
    seed = seed_on(device)
    mixed = "python_random" in patch.keep_bugs and temperature < 1
    return seed ^ random.getrandbits(62) if mixed else seed


def forward_switches(model: nn.Module) -> tuple[str, ...]:
    """The switches for which a language model's forward is replaced."""
    always = ("encoder_target", "head_sampling")
    return (*always, "eval_brier") if model.patch_size < ORDERS else always


def autoencoder_forward(
    self: nn.Module, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
) -> Any:
    """`Autoencoder.forward` without logits: the loss is the same, `logits` is None.

    input_ids, labels: [..., K] int64, any number of patches.
    """
    patch = active(self, "autoencoder_loss")
    if patch is None:
        return type(self).forward(self, input_ids=input_ids, labels=labels, **kwargs)
    view, training, p = current(patch.autoencoder), self.training, self.ae_dropout
    inputs = input_ids.reshape(-1, self.patch_size)  # [R, K]
    seed, rows = seed_on(inputs.device), rows_on(inputs.device, len(inputs))
    if training:
        options = {"seed": seed, "stream": Stream.TOKEN_MASK, "distribution": "uniform"}
        masked_out = ops.noise(rows, 1, self.patch_size, **options)[0] < p
        inputs = torch.where(masked_out, MASK_ID, inputs)
    if "bf16_embeddings" in patch.keep_bugs:
        posterior = self.encoder(input_ids=inputs).chunk(2, -1)  # [R, 1, L] each
    else:
        posterior = view.encode(inputs)
    wide = torch.promote_types(posterior[0].dtype, torch.float32)
    mean, log_std = (value.squeeze(1).to(wide) for value in posterior)
    size = mean.shape[1]
    eps = ops.noise(rows, 1, size, seed=seed, stream=Stream.LATENT, dtype=wide)[0]
    latents = mean + log_std.exp() * eps
    if training:
        options = {"seed": seed, "stream": Stream.DROPOUT, "distribution": "uniform"}
        latents = latents * (ops.noise(rows, 1, size, **options)[0] >= p) / (1 - p)
    vocabulary = view.decoder.lm_head_weight
    if not torch.is_autocast_enabled(vocabulary.device.type):
        latents = latents.to(vocabulary.dtype)
    hidden = view.decoder(latents).flatten(0, 1)  # [R K, H]
    loss = ops.linear_cross_entropy(hidden, vocabulary, labels.reshape(-1))
    if training:
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
        loss = loss * self.patch_size + kl.clamp(min=self.kl_clamp).sum(-1).mean() * self.kl_weight
    return patch.output(loss=loss)


def model_forward(
    self: nn.Module, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
) -> Any:
    """The forward of the official language models, by the ops where their switches are on.

    input_ids: [B, P K] int64.
    labels: [B, P K] int64; a patch with a label of -100 is no target.
    """
    patch = active(self, *forward_switches(self))
    if patch is None:
        return type(self).forward(self, input_ids=input_ids, labels=labels, **kwargs)
    size, batch = self.patch_size, len(input_ids)
    tokens = self.transformer.embed_tokens(input_ids)
    embeds = self.embed_proj(tokens.view(batch, -1, size * tokens.shape[-1])[:, :-1])
    outputs = self.transformer(inputs_embeds=embeds)
    hidden, patches, weight = _targets_of(patch, outputs[0], labels, size)

    if "encoder_target" in patch.switches:
        view = current(patch.autoencoder)
        mean, log_std = (part[0] for part in view.encode(patches.reshape(1, -1)))
    else:
        latents = self.ae_model.encoder(input_ids=patches.reshape(1, -1))
        mean, log_std = latents.squeeze(0).chunk(2, -1)  # [R, L]

    draws = None
    if patch.kind == ENERGY:
        draws = _draws(self, patch, hidden, self.num_samples)
        values = -self.energy_score(draws, mean, log_std)  # [R]
    else:
        repeated = hidden.unsqueeze(0).repeat(self.num_samples, 1, 1)
        eps = torch.randn((self.num_samples, *mean.shape), device=mean.device)
        targets = mean + eps * log_std.exp()
        values = self.generative_head(z=repeated, target=targets)  # [S R]
        values = values.view(self.num_samples, -1).mean(0)
    loss = values.mean() if weight is None else _weighted_mean(values, weight)
    if self.training:
        return patch.output(loss=loss)
    if "eval_brier" in patch.switches and size < ORDERS:
        return _brier_by_continuing(self, patch, input_ids, loss)
    if draws is None:
        draws = self.generative_head.sample(hidden.unsqueeze(0).repeat(2, 1, 1))
    if size < ORDERS or "label_masks" in patch.keep_bugs:
        return self.eval_brier(draws, input_ids[:, size:], outputs, loss)
    return self.eval_brier(draws, patches.reshape(1, -1), outputs, loss)


def energy_score(self: nn.Module, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """`EnergyTransformer.energy_score`.  x: [S, ..., L].  mean, log_std: [..., L].
    returns: [...]."""
    if active(self, "energy_score") is None:
        return type(self).energy_score(self, x, mean, log_std)
    shape, size = mean.shape[:-1], mean.shape[-1]
    x = x.reshape(len(x), -1, size)
    mean, log_std = mean.reshape(-1, size), log_std.reshape(-1, size)
    score = ops.energy_score(
        x,
        mean,
        log_std,
        num_targets=NUM_TARGETS,
        beta=self.beta,
        seed=seed_on(x.device),
        rows=rows_on(x.device, len(mean)),
    )
    return score.view(shape)


def head_sample(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """`MLPGenerator.sample`: one draw for each context.  [..., H] -> [..., L]."""
    patch = active(self, "head_sampling")
    if patch is None:
        return type(self).sample(self, hidden_states)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    draws = _sample(current(patch.head), flat, 1)[0]
    return draws.view(*hidden_states.shape[:-1], -1)


@torch.compiler.disable
@torch.no_grad()
def temperature_sampling(
    self: nn.Module, hidden_states: Tensor, temperature: float = 0.5, num_samples: int = 200
) -> Tensor:
    """`CALM.temperature_sampling`.  hidden_states: [..., H].  returns: [..., K] int64."""
    patch = active(self, "temperature_sampling")
    if patch is None:
        official = type(self).temperature_sampling
        return official(self, hidden_states, temperature=temperature, num_samples=num_samples)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    patches = sample_patches(
        current(patch.model),
        hidden,
        temperature=temperature,
        num_candidates=num_samples,
        seed=choosing_seed(patch, hidden.device, read_temperature(patch, temperature)),
        rows=rows_on(hidden.device, len(hidden)),
    ).patches
    return patches.view(*hidden_states.shape[:-1], -1)


@torch.compiler.disable
@torch.no_grad()
def eval_brier(
    self: nn.Module, latent_predictions: Tensor, targets: Tensor, outputs: Any, loss: Tensor
) -> Any:
    """`CALM.eval_brier` for K >= 4, from all pairs of the draws.

    latent_predictions: [S, ..., L].  targets: [B, P K] int64.
    """
    patch = active(self, "eval_brier")
    if patch is None:
        return type(self).eval_brier(self, latent_predictions, targets, outputs, loss)
    draws, patches = latent_predictions, targets.reshape(-1, self.patch_size)
    if "one_pair_of_draws" in patch.keep_bugs:
        draws = draws[:2]
    count, draws = len(draws), draws.reshape(-1, draws.shape[-1])
    if not torch.is_autocast_enabled(draws.device.type):
        draws = draws.to(patch.autoencoder.decoder.lm_head_weight.dtype)
    predictions = current(patch.autoencoder).decode(draws).view(count, *patches.shape)  # [S, R, K]
    brier = brier_from_predictions(predictions[..., :ORDERS], patches[:, :ORDERS]).mean(0).float()
    return _with_brier(patch, loss, brier)


def active(module: nn.Module, *switches: str) -> Patch | None:
    """The patch of a module where one of these switches is on.

    Somebody's wrapper may have kept a method of ours from an earlier patch that had it on.
    """
    patch = module.__dict__.get(ATTRIBUTE)
    return patch if patch is not None and not patch.switches.isdisjoint(switches) else None


def _targets_of(
    patch: Patch, hidden: Tensor, labels: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contexts [R, H] with the patch that follows each [R, K], and their weights [R] or None.

    Compiled code keeps all rows and weighs them, for their number would depend on the labels.
    """
    labels = labels[:, size:]
    if "label_masks" in patch.keep_bugs:
        mask = labels.ne(IGNORED)
        first = mask.view(len(labels), -1, size)[..., 0]
        return hidden[first], labels[mask].view(-1, size), None
    patches = labels.reshape(len(labels), -1, size)  # [B, P - 1, K]
    mask = patches.ne(IGNORED).all(-1)
    if torch.compiler.is_compiling():
        patches = torch.where(mask[..., None], patches, 0).flatten(0, 1)
        return hidden.flatten(0, 1), patches, mask.flatten().float()
    return hidden[mask], patches[mask], None


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """values, weight: [R].  Of no targets NaN with gradients of zero, as `mean` of no rows."""
    count = weight.sum()
    return ((values * weight).sum() / count.clamp(min=1)).masked_fill(count == 0, math.nan)


def _draws(model: nn.Module, patch: Patch, hidden: Tensor, count: int) -> Tensor:
    """[S, R, L] draws of the energy head."""
    if "head_sampling" in patch.switches:
        return _sample(current(patch.head), hidden, count)
    return model.generative_head.sample(hidden.unsqueeze(0).repeat(count, 1, 1))


def _sample(head: EnergyHead, hidden: Tensor, count: int) -> Tensor:
    return ops.sample_latents(
        hidden,
        head.weights(),
        num_samples=count,
        seed=seed_on(hidden.device),
        rows=rows_on(hidden.device, len(hidden)),
    )


@torch.compiler.disable
def _brier_by_continuing(model: nn.Module, patch: Patch, input_ids: Tensor, loss: Tensor) -> Any:
    """The scores for K < 4, of every start in whole rows whatever the labels."""
    draws = 2 if "one_pair_of_draws" in patch.keep_bugs else model.num_samples
    if "last_start" in patch.keep_bugs:
        input_ids = input_ids[:, : -model.patch_size]
    seed = int(seed_on(torch.device("cpu")))
    options = {"block_size": input_ids.shape[1], "num_bootstrap": 1}
    score = brier_lm(current(patch.model), input_ids, num_draws=draws, seed=seed, **options)
    return _with_brier(patch, loss, torch.tensor(score.brier, device=loss.device))


def _with_brier(patch: Patch, loss: Tensor, brier: Tensor) -> Any:
    names = {f"brier{n}": value for n, value in enumerate(brier, 1)}
    return patch.output(loss=loss, **names)
