"""Draws whose tokens are known, in place of a model's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calm_rt.draws import Draws
from calm_rt.reference import Stream


class PlantedDraws(Draws):
    """Patches from a finite distribution, the same in each context or one a context.

    patches: [X, K] int64.  weights: [X] or [B, X], in proportion to their probabilities.
    decoded: how many tokens were asked for, and `passes` how often.
    size_of_search: 0 lets pools be decoded whole.
    """

    size_of_search = 1 << 62

    def __init__(self, patches: Tensor, weights: Tensor, seed: Tensor | int, rows: Tensor) -> None:
        self.seed, self.rows = torch.as_tensor(seed), rows
        self.patch_size = patches.shape[1]
        self.patches, self.weights = patches, weights.double().expand(len(rows), -1)
        self.decoded, self.passes = 0, 0

    def of(self, contexts: Tensor) -> "PlantedDraws":
        weights, rows = self.weights[contexts], self.rows[contexts]
        some = PlantedDraws(self.patches, weights, self.seed, rows)
        some.size_of_search = self.size_of_search
        return some

    def draw(self, number: int, count: int) -> Tensor:
        total = self.weights.cumsum(1)  # [B, X]
        u = self.uniforms(Stream.HEAD, number, count, 1)[..., 0].contiguous()  # [B, count]
        kind = torch.searchsorted(total, u * total[:, -1:], right=True)
        return self.patches[kind]  # [B, count, K]

    def whole_patches(self, number: int, count: int) -> Tensor:
        return self.draw(number, count)

    def search_size(self, count: int) -> int:
        return self.size_of_search

    def decode(self, states: Tensor, rows: Sequence[Tensor], count: Tensor | None = None) -> Tensor:
        self.decoded = self.decoded + (sum(map(len, rows)) if count is None else count)
        self.passes += 1
        tokens = torch.cat([states[of_slot, slot] for slot, of_slot in enumerate(rows)])
        return (
            tokens if count is None else torch.where(torch.arange(len(tokens)) < count, tokens, -1)
        )


def planted_pools(tokens: Tensor, seed: int, rows: Tensor) -> PlantedDraws:
    """What decodes given pools.  tokens: [B, S, K]; give them to `vote` as states."""
    return PlantedDraws(tokens[0], torch.ones(tokens.shape[1]), seed, rows)
