"""The lazy pool chooses what select_patch chooses on the decoded pool, and decodes less."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from planted import PlantedDraws, planted_pools
from scipy import stats
from test_reference import FALSE_ALARM, distribution
from test_replay import NoLook
from torch import Tensor

from calm_rt import ops, pool
from calm_rt.pool import Pools, decode_blindly, vote
from calm_rt.sampling import sample_from_pool
from calm_rt.threads import restored_threads
from calm_rt.tuples import Tuples

# pools, candidates, kinds of token in each slot: from one patch to no repeat, groups of every size
POOLS = [
    (40, 1, (3, 3)),
    (500, 2, (2,)),
    (400, 7, (2, 2)),
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
PASSES = (-1, 0, 20, 160, 10**9)  # the price of a pass in tokens: from slot by slot to all at once


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
    assert draws.decoded == got.slots.sum() <= tokens.numel()


@pytest.mark.parametrize("n", [2, 3, 4, 2000])
@pytest.mark.parametrize("sizes", POOLS, ids=lambda sizes: "B{}-S{}-kinds{}".format(*sizes))
def test_a_pool_that_nobody_looks_at_equals_the_decoded_pool(sizes, n: int) -> None:
    """Choices and tuples are those of the decoded pool, and found without a look by the host."""
    tokens, rows = random_pools(*sizes, seed=n), row_ids(sizes[0])
    draws = planted_pools(tokens, n, rows)
    with NoLook():
        known = decode_blindly(draws, tokens)
    got = ops.select_patch(known, n=n, seed=n, rows=rows)
    assert torch.equal(got, ops.select_patch(tokens, n=n, seed=n, rows=rows))
    chosen = torch.arange(sizes[0]), got
    assert torch.equal(known[chosen], tokens[chosen])
    candidates = draws.places(0, 4, n).mul(sizes[1]).long()  # [B, T, n]
    tuples = Tuples(candidates, sizes[1])
    assert torch.equal(tuples.equal(known), tuples.equal(tokens))
    found, equal = tuples.find(known)
    chosen = found.nonzero().squeeze(1), equal[found]
    assert torch.equal(known[chosen], tokens[chosen])


def test_a_pool_without_repeats_is_decoded_in_one_slot(price: int) -> None:
    """And its choice in all; what costs more than a pass is not decoded slot by slot."""
    tokens = torch.arange(3 * 200 * 4).view(3, 200, 4)
    draws = planted_pools(tokens, 0, row_ids(3))
    vote(draws, tokens, 2)
    slot_by_slot = 3 * (200 + 3), 1
    assert (draws.decoded, draws.passes) == (slot_by_slot if price < 10**9 else (3 * 800, 1))


@pytest.mark.parametrize("price", [-1], indirect=True)
@pytest.mark.parametrize("sizes", POOLS[2:], ids=lambda sizes: "B{}-S{}-kinds{}".format(*sizes))
def test_only_what_can_compete_is_decoded(sizes, price: int) -> None:
    """At n = 2 slot by slot: a token for each candidate whose earlier tokens all occur twice."""
    tokens = random_pools(*sizes, seed=1)
    [pools, size, patch] = tokens.shape
    rows = row_ids(pools)
    draws = planted_pools(tokens, 1, rows)
    lone = torch.zeros(pools, size, dtype=torch.bool)  # the choice where nothing repeats
    lone[torch.arange(pools), (draws.choice() * size).long()] = True
    expected = torch.zeros(pools, dtype=torch.int64)
    for slot in range(patch):
        earlier = tokens[..., :slot]
        holders = (earlier[:, :, None] == earlier[:, None]).all(-1).sum(-1)  # [B, S]
        expected += ((holders >= 2) | lone).sum(1)
    assert torch.equal(vote(draws, tokens, 2).slots, expected)
    draws = planted_pools(tokens, 1, rows)
    decode_blindly(draws, tokens)
    assert draws.decoded == expected.sum()


@pytest.mark.parametrize("n", [2, 2000])
def test_fewer_passes_where_they_are_dear(n: int, monkeypatch) -> None:
    tokens, rows = random_pools(4, 200, (5, 6, 7, 8), seed=n), row_ids(4)
    passes = []
    for price in PASSES:
        monkeypatch.setitem(pool.PASS_ROWS, "cpu", price)
        draws = planted_pools(tokens, n, rows)
        vote(draws, tokens, n)
        passes.append(draws.passes)
    assert passes == sorted(passes, reverse=True) and passes[-1] == 1
    assert passes[0] == 4 if n == 2 else passes[0] > passes[3] > 1


@pytest.mark.parametrize("kinds", [(2, 3, 2), (3, 90, 90)])
@pytest.mark.parametrize("n", [1, *POWERS])
def test_known_tokens_leave_a_smaller_pool(n: int, kinds: tuple[int, ...], price: int) -> None:
    """Each context with its own number of known tokens, none and all of them too."""
    tokens, rows = random_pools(150, 40, kinds, seed=n), row_ids(150)
    known = torch.arange(150) % 4
    prefix = torch.where(torch.arange(3) < known[:, None], tokens[:, 0], -1)
    prefix[::25] = 500  # which no candidate has
    draws = planted_pools(tokens, n, rows)
    kept = Pools(draws, tokens)
    kept.keep(prefix)
    known = kept.tokens.unflatten(1, kept.shape)
    assert (known[:, (prefix < 0).all(1)] == -1).all()  # no token is looked at in vain
    got = vote(draws, tokens, n, tokens=known, alive=kept.alive)
    for row in range(150):
        matching = ((prefix[row] < 0) | (tokens[row] == prefix[row])).all(-1)
        assert torch.equal(kept.alive[row], matching)
        if matching.any() and n > 1:
            rest = tokens[row, matching][None]
            assert torch.equal(got.patches[row, None], chosen_from(rest, n, n, rows[row, None]))


EXAMPLE = [(ord(letter),) for letter in "ACADBEAFBG"]  # the paper's, of algorithm 2


@pytest.mark.parametrize("n", [2, 3, 4, 10])
def test_frequencies_are_those_of_the_paper(n: int) -> None:
    """Chi-square of each seed against the enumerated distribution; p-values uniform over seeds."""
    exact = distribution(EXAMPLE, n)
    if n == 2:
        assert {EXAMPLE[i]: float(p) for i, p in exact.items()} == {(65,): 3 / 4, (66,): 1 / 4}
    tokens = torch.tensor(EXAMPLE).expand(2000, -1, -1)
    draws = [vote(planted_pools(tokens, seed, torch.arange(2000)), tokens, n) for seed in range(24)]
    chosen = torch.stack([votes.patches[:, 0] for votes in draws])
    if len(exact) == 1:
        assert (chosen == ord("A")).all()
        return
    kinds = torch.tensor([EXAMPLE[i][0] for i in exact])
    counts = (chosen[..., None] == kinds).sum(1)  # [seeds, kinds]
    assert (counts.sum(1) == 2000).all()
    expected = [2000 * float(p) for p in exact.values()]
    p_values = [stats.chisquare(seen, expected).pvalue for seen in counts.numpy()]
    assert stats.kstest(p_values, "uniform").pvalue > FALSE_ALARM


PATCHES = torch.tensor([[3, 1], [3, 2], [4, 1]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(("size", "n"), [(3, 2), (6, 2), (6, 3), (5, 5)])
def test_frequencies_over_all_pools_are_those_of_enumeration(size: int, n: int) -> None:
    exact = torch.zeros(3, dtype=torch.float64)
    for kinds in itertools.product(range(3), repeat=size):
        chance = math.prod(WEIGHTS[kind].item() for kind in kinds)
        for index, share in distribution([(kind,) for kind in kinds], n).items():
            exact[kinds[index]] += chance * float(share)
    p_values = []
    for seed in range(20):
        draws = PlantedDraws(PATCHES, WEIGHTS, seed, torch.arange(3000))
        got = sample_from_pool(draws, Fraction(1, n), size, 1, None)
        seen = (got.patches[:, None] == PATCHES).all(-1).sum(0)
        p_values.append(stats.chisquare(seen, 3000 * exact).pvalue)
    assert stats.kstest(p_values, "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize("n", [2, 2000])
def test_a_context_does_not_depend_on_its_batch_or_on_threads(n: int) -> None:
    tokens, rows = random_pools(32, 200, (9, 2, 3, 4), seed=3), row_ids(32)
    together = vote(planted_pools(tokens, 7, rows), tokens, n).patches
    with restored_threads():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for row in range(32):
                alone = planted_pools(tokens[row, None], 7, rows[row, None])
                assert torch.equal(vote(alone, tokens[row, None], n).patches[0], together[row])
    assert len(together.unique(dim=0)) > 1


@pytest.mark.parametrize("temperature", [Fraction(0), Fraction(1, 2), Fraction(1, 3)])
def test_pools_decoded_whole_choose_alike(temperature: Fraction) -> None:
    draws = PlantedDraws(PATCHES, WEIGHTS, 4, torch.arange(500))
    lazy = sample_from_pool(draws, temperature, 30, 1000, None)
    draws.size_of_search = 0
    whole = sample_from_pool(draws, temperature, 30, 1000, None)
    assert torch.equal(lazy.patches, whole.patches) and torch.equal(lazy.draws, whole.draws)
    assert torch.equal(lazy.exact, whole.exact)
    assert (whole.slots == 30 * PATCHES.shape[1]).all() and (lazy.slots <= whole.slots).all()
