"""survivors: kernels list what the reference lists, simulated ones too; argmax obeys the count."""

import pytest
import torch
from test_ops import all_devices
from test_select_patch import POOLS, random_pools
from test_simulator import DTYPES, SCHEDULES, capability, simulator  # noqa: F401

import calm_rt
from calm_rt import ops, reference

SMALL = [(40, 1, 3, 2), (20, 60, 2, 3), (4, 530, 3, 30), (2, 4500, 1, 900), (600, 3, 2, 2)]


def kept_candidates(pools: int, candidates: int) -> torch.Tensor:
    """Each pool's own, and in some of them none."""
    return torch.arange(pools) * 5 % (candidates + 2) - 1


@all_devices
@pytest.mark.parametrize("sizes", POOLS, ids=lambda sizes: "B{}-S{}-K{}-kinds{}".format(*sizes))
def test_lists_equal_the_reference(sizes: tuple[int, ...], device: str) -> None:
    tokens, kept = random_pools(*sizes, seed=1), kept_candidates(*sizes[:2])
    for depth in {0, 1, sizes[2]}:
        expected = reference.survivors(tokens[:50], kept[:50], depth)
        with calm_rt.backend("native"):
            got = ops.survivors(tokens[:50].to(device), kept[:50].to(device), depth=depth)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("sizes", SMALL, ids=lambda sizes: "B{}-S{}-K{}-kinds{}".format(*sizes))
def test_simulated_lists_equal_the_reference(simulator, sizes) -> None:  # noqa: F811
    tokens, kept = random_pools(*sizes, seed=2), kept_candidates(*sizes[:2])
    for depth in range(sizes[2] + 1):
        expected = ops.survivors(tokens, kept, depth=depth)
        for schedule in SCHEDULES:
            simulator.set_schedule(schedule)
            got = simulator.survivors(tokens, kept, depth)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


COUNTS = (-1, 0, 1, 64, 65, 129, 200, 2**40)  # of 150 rows: tiles of 64, 128 and 256


def check_count(call, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    hidden, weight = (torch.randn(rows, size, generator=generator).to(dtype) for rows in (150, 301))
    expected = (hidden.double() @ weight.double().T).argmax(-1)
    for count in COUNTS:
        wanted = torch.where(torch.arange(150) < count, expected, -1)
        assert torch.equal(call(hidden, weight, None, torch.tensor(count)), wanted)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_argmax_of_the_first_rows(backend: str, dtype: torch.dtype) -> None:
    with calm_rt.backend(backend):
        check_count(ops.linear_argmax, 40, dtype if backend == "native" else torch.float64)


@pytest.mark.parametrize("size", [40, 33])  # by groups, and by the library
@pytest.mark.parametrize("dtype", DTYPES)
def test_simulated_argmax_of_the_first_rows(simulator, capability, size, dtype) -> None:  # noqa: F811
    check_count(simulator.linear_argmax, size, dtype)


def test_bad_count() -> None:
    hidden = torch.ones(3, 2)
    for count in (torch.tensor([1]), torch.tensor(1.0), torch.tensor(1, device="meta")):
        with pytest.raises(ValueError, match=r"count: expected .*got "):
            ops.linear_argmax(hidden, hidden, None, count)
