"""The lazy pool chooses what select_patch chooses on the decoded pool, and decodes less."""

import pytest
import torch
from planted import planted_pools
from torch import Tensor

from calm_rt import ops, pool
from calm_rt.pool import vote

# pools, candidates, kinds of token in each slot: from one patch to no repeat, groups of every size
POOLS = [
    (40, 1, (3, 3)),
    (400, 2, (2,)),
    (300, 7, (2, 2)),
    (300, 20, (1, 2, 3)),
    (300, 30, (9, 1, 2, 1)),
    (200, 60, (3, 3, 3, 3)),
    (100, 200, (2, 5, 4, 4)),
    (60, 200, (30, 2, 2, 12)),
    (40, 200, (1000, 1000, 1000, 1000)),
    (20, 200, (1, 1, 1, 1)),
    (40, 200, (2, 2, 2, 2, 2, 2, 2, 2)),
    (12, 1000, (4, 4, 4, 4)),
    (8, 1000, (2**31, 1, 1)),
    (8, 1000, (1, 1, 2**31)),
]
POWERS = (2, 3, 5, 40, 2000)  # n at temperature 1 / n; the last is temperature 0
PASSES = (0, 20, 160, 10**9)  # the price of a pass in tokens: from slot by slot to all at once


def random_pools(pools: int, candidates: int, kinds: tuple[int, ...], seed: int) -> Tensor:
    """[B, S, K]; a slot's first kinds are more frequent, more so in some pools than in others."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 1 + 3 * torch.rand(pools, 1, generator=generator, dtype=torch.float64)
    slots = [
        (torch.rand(pools, candidates, generator=generator, dtype=torch.float64) ** sharpness)
        * kind
        for kind in kinds
    ]
    return torch.stack(slots, -1).long()


def row_ids(count: int) -> Tensor:
    return torch.arange(count) * 0x1_0000_0003 - 2**40


def chosen_from(tokens: Tensor, n: int, seed: int, rows: Tensor) -> Tensor:
    """The patches that select_patch chooses on the whole pools."""
    index = ops.select_patch(tokens, n=n, seed=seed, rows=rows)
    return tokens[torch.arange(len(tokens)), index]


@pytest.fixture(params=PASSES, ids=lambda tokens: f"pass-{tokens}")
def price(request, monkeypatch) -> int:
    monkeypatch.setitem(pool.PASS_ROWS, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("n", POWERS)
@pytest.mark.parametrize("sizes", POOLS, ids=lambda sizes: "B{}-S{}-kinds{}".format(*sizes))
def test_equals_select_patch_on_the_decoded_pool(sizes, n: int, price: int) -> None:
    tokens, rows = random_pools(*sizes, seed=n), row_ids(sizes[0])
    draws = planted_pools(tokens, n, rows)
    got = vote(draws, tokens, n)
    assert torch.equal(got.patches, chosen_from(tokens, n, n, rows))
    assert got.matched.all()
    assert draws.decoded == got.slots.sum() <= tokens.numel()
