"""A CALM-M whose pools of draws are known: what choosing a patch is timed on.

Head and decoder have the official sizes and random weights, and do their work; what is decoded is a
planted latent vector, so that a pool is one that a trained model could have drawn. What a choice
takes depends on that: a lazy pool decodes the less, the more its patches repeat.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from calm_rt import official
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig, screen_decoder
from calm_rt.nn.heads import EnergyHead
from calm_rt.sampling import PatchSample, sample_patches

PATCH, VOCABULARY, LATENT, CANDIDATES = 4, 128257, 128, 200
SIZES = {"patch_size": PATCH, "vocab_size": VOCABULARY, "latent_size": LATENT}
AUTOENCODER = AutoencoderConfig(hidden_size=512, intermediate_size=1280, **SIZES)
CALM = CalmConfig(
    hidden_size=1024,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_mlp_layers=4,
    noise_size=64,
    **SIZES,
)
JITTER = 0.05  # of a latent vector, so that no two are the same
EXPONENTS = (2, 3, 4)  # of the likely pools: entropies of about 6, 3 and 2 bits


class PlantedCalm(Calm):
    """Head and decoder of a CALM-M, without a backbone; pools are planted behind the head.

    A latent vector holds a code of 32 signs for each token, which the decoder maps to the rows of
    the vocabulary, with random layers between them that disturb it a little.
    pools: [P, S, K] int64, drawn one after the other.
    """

    def __init__(self, pools: Tensor, dtype: torch.dtype, device: str = "cpu") -> None:
        with torch.device("meta"):  # no storage for the backbone
            super().__init__(CALM, AUTOENCODER)
        torch.manual_seed(0)
        self.generative_head = EnergyHead(CALM).to(device, dtype)
        nn.init.normal_(self.generative_head.final_layer.linears[2].weight, std=0.02)
        self.ae_model = Autoencoder(AUTOENCODER).requires_grad_(False).eval()
        codes = plant_codes(self.ae_model)  # [V, L / K]
        self.ae_model.to(device, dtype)
        screen_decoder(self.ae_model)  # as a Generator does
        latents = codes[pools].flatten(2)  # [P, S, L]
        self.pools = pools
        self.latents = (latents + JITTER * torch.randn_like(latents)).to(device, dtype)
        rivals = ("official", "compiled", "native")
        self.turns = {rival: itertools.cycle(self.latents) for rival in rivals}
        self.choose_compiled = torch.compile(choose_officially)

    def sample(self, *arguments: Any, **options: Any) -> Tensor:
        """Does the head's work, and gives the next pool.  returns: [S, 1, L]."""
        super().sample(*arguments, **options)
        return next(self.turns["native"])[:, None]

    def select(self) -> PatchSample:
        """What is timed as `native`."""
        return sample_patches(self, self.hidden(), temperature="1/2", num_candidates=CANDIDATES)

    @torch.no_grad()
    def select_officially(self) -> Tensor:
        """What is timed as `official`."""
        return choose_officially(*self.officially("official"))[0]

    @torch.no_grad()
    def select_compiled(self) -> Tensor:
        """What is timed as `compiled`."""
        return self.choose_compiled(*self.officially("compiled"))[0]

    def officially(self, rival: str) -> tuple:
        """The arguments of choose_officially."""
        head, decoder = self.generative_head.weights(), self.ae_model.decoder.weights()
        return self.hidden(), head, next(self.turns[rival]), decoder

    def hidden(self) -> Tensor:
        """One context.  returns: [1, H]."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(1, CALM.hidden_size, generator=generator).to(self.latents)


def choose_officially(hidden: Tensor, head: Any, latents: Tensor, decoder: Any) -> tuple:
    """The official formulas: every draw decoded, all logits, a Counter on the host.

    latents: [S, L], decoded in the place of what the head drew.
    returns: the patch [1, K], and what was drawn, or a compiler would leave that out.
    """
    drawn = official.sample_latents(hidden, head, num_samples=CANDIDATES)
    tokens = official.decode(latents, decoder)  # [S, K]
    return official.select_patch(tokens[None], n=2), drawn


@torch.no_grad()
def plant_codes(autoencoder: Autoencoder) -> Tensor:
    """Makes a random decoder read codes.  returns: [V, L / K], -1 and 1."""
    decoder, size = autoencoder.decoder, LATENT // PATCH
    hidden = AUTOENCODER.hidden_size
    codes = torch.randint(2, (VOCABULARY, size)).mul(2).sub(1).float()
    into = nn.init.orthogonal_(torch.empty(hidden, LATENT))
    out = nn.init.orthogonal_(torch.empty(hidden, size))
    decoder.latent_to_hidden.weight.copy_(into)
    slots = [out @ into[:, slot * size : (slot + 1) * size].T for slot in range(PATCH)]
    decoder.expand_layer.weight.copy_(torch.cat(slots))
    decoder.lm_head_weight.mul_(0.5).add_(codes @ out.T, alpha=0.1)
    return codes


def likely_pools() -> Tensor:
    """Tokens by powers of their ranks, from pools of much choice to such of little.  [P, S, K]."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    pools = []
    for exponent in EXPONENTS:
        chances = ranks.pow(-exponent)
        drawn = torch.multinomial(chances, CANDIDATES * PATCH, True, generator=generator)
        ids = torch.randperm(VOCABULARY, generator=generator)
        pools.append(ids[drawn].view(CANDIDATES, PATCH))
    return torch.stack(pools)
