"""select_patch: kernels choose as the reference does, and with algorithm 2's distribution."""

import pytest
import torch
from test_ops import all_devices
from test_reference import FALSE_ALARM, distribution, p_value
from test_simulator import simulator  # noqa: F401
from torch import Tensor

import calm_rt
from calm_rt import ops, reference

# (pools, candidates, tokens a patch, kinds of token): small alphabets, hardly any repeats, one kind
POOLS = [
    (3000, 1, 3, 2),
    (3000, 2, 1, 2),
    (2500, 7, 2, 2),
    (2000, 30, 1, 4),
    (500, 200, 2, 4),
    (100, 200, 4, 100_000),
    (50, 200, 17, 1),
    (12, 1000, 4, 3),
    (12, 1000, 1, 40),
    (4, 1000, 16, 100_000),
    (4, 1000, 1, 1),
]
POWERS = (1, 2, 3, 5, 500, 2**40)  # n at temperature 1 / n, from 1 to beyond every pool
LIMITS = torch.iinfo(torch.int64)


def random_pools(pools: int, candidates: int, patch: int, kinds: int, seed: int) -> Tensor:
    """[B, S, K] of `kinds` values from everywhere in int64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(LIMITS.min, LIMITS.max, (kinds,), generator=generator)
    values[0] = LIMITS.min
    return values[torch.randint(kinds, (pools, candidates, patch), generator=generator)]


def row_ids(count: int) -> Tensor:
    return torch.arange(count) * 0x1_0000_0003 - 2**40


def native(tokens: Tensor, n: int, seed: int, rows: Tensor | None = None) -> Tensor:
    with calm_rt.backend("native"):
        return ops.select_patch(tokens, n=n, seed=seed, rows=rows)


@all_devices
@pytest.mark.parametrize("n", POWERS)
@pytest.mark.parametrize("sizes", POOLS, ids=lambda sizes: "B{}-S{}-K{}-kinds{}".format(*sizes))
def test_choices_equal_the_reference(sizes: tuple[int, ...], n: int, device: str) -> None:
    tokens, rows = random_pools(*sizes, seed=n % 1009), row_ids(sizes[0])
    steps = min(n, sizes[1])  # the reference lists all steps up to n
    expected = reference.select_patch(tokens, steps, torch.tensor(n), rows)
    assert torch.equal(native(tokens.to(device), n, n, rows.to(device)).cpu(), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 60, 2**40])
@pytest.mark.parametrize(
    "sizes", [(40, 1, 3, 2), (20, 60, 2, 3), (9, 60, 16, 3), (4, 530, 1, 400), (2, 4500, 1, 9)]
)
def test_simulated_choices_equal_the_kernel(simulator, sizes: tuple[int, ...], n: int) -> None:  # noqa: F811
    tokens, rows = random_pools(*sizes, seed=n % 1009), row_ids(sizes[0])
    simulator.set_schedule(n % 3)
    chosen = simulator.select_patch(tokens, torch.tensor(5), rows, n)
    assert torch.equal(chosen, native(tokens, n, 5, rows))


@all_devices
@pytest.mark.parametrize("n", [1, 2, 4, 12])
@pytest.mark.parametrize("kinds", [2, 5, 40])
def test_frequencies_are_those_of_enumeration(n: int, kinds: int, device: str) -> None:
    pool = random_pools(1, 12, 1, kinds, seed=100 * n + kinds)[0]
    exact = distribution([tuple(patch) for patch in pool.tolist()], n)
    trials = 20_000
    chosen = native(pool.to(device).expand(trials, -1, -1), n, seed=n).cpu()
    observed = torch.bincount(chosen, minlength=12).double()
    expected = torch.tensor([float(trials * exact.get(index, 0)) for index in range(12)]).double()
    assert observed[expected == 0].sum() == 0
    if len(exact) > 1:
        assert p_value(observed[expected > 0], expected[expected > 0]) > FALSE_ALARM


@all_devices
def test_the_row_id_decides_and_nothing_else_in_the_batch(device: str) -> None:
    tokens, rows = random_pools(64, 40, 2, 3, seed=1).to(device), row_ids(64).to(device)
    whole = native(tokens, 2, 7, rows)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(native(tokens[order], 2, 7, rows[order]), whole[order])
    for row in range(0, 64, 9):
        assert torch.equal(native(tokens[row, None], 2, 7, rows[row, None]), whole[row, None])
    same_pool = native(tokens[:1].expand(64, -1, -1), 1, 7, rows)
    assert same_pool.unique().numel() > 2  # one pool, other row ids, other choices
    assert (native(tokens[:1].expand(64, -1, -1), 1, 8, rows) != same_pool).any()


@all_devices
def test_patches_that_differ_in_one_token_are_others(device: str) -> None:
    """Each candidate comes twice but for one, so at n = 2 that one is never chosen."""
    for size in (1, 4, 16, 40):
        pool = torch.full((2 * size + 1, size), -1)
        pool[: 2 * size] += torch.eye(size, dtype=torch.int64).repeat(2, 1)
        chosen = native(pool.to(device).expand(500, -1, -1), 2, seed=size)
        assert set(chosen.tolist()) == set(range(size))


@pytest.mark.parametrize("n", [0, -1, 1.5])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_n_out_of_range_is_refused(n: float, backend: str) -> None:
    with (
        calm_rt.backend(backend),
        pytest.raises(ValueError, match=r"^n: expected (an int|at least 1), got"),
    ):
        ops.select_patch(torch.zeros(1, 2, 3, dtype=torch.int64), n=n)
