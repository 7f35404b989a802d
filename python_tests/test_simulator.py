"""The CUDA kernels, run on the CPU by csrc/simulator, keep the ops' promises.

`make simulator` builds what is loaded here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import need
from torch import Tensor

from calm_rt import ops, reference
from calm_rt.reference import Stream
from calm_rt.testing import CASES, Case

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "simulator"
SCHEDULES = (0, 1, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENERGY_CASES = [case for case in CASES if case.op == "energy_score" and not case.benchmark]
ARGMAX_CASES = [case for case in CASES if case.op == "linear_argmax" and not case.benchmark]
NOISE_CASES = [case for case in CASES if case.op == "noise" and not case.benchmark]
EPS = torch.finfo(torch.float32).eps

energy_cases = pytest.mark.parametrize("case", ENERGY_CASES, ids=str)


def built(name: str) -> Path:
    path = BUILD / name
    need(path.exists(), f"{path.relative_to(ROOT)} is not built: make simulator")
    return path


@pytest.fixture(scope="module")
def simulator():
    torch.ops.load_library(str(built("_simulator.abi3.so")))
    yield torch.ops.calm_rt_simulator
    torch.ops.calm_rt_simulator.set_schedule(0)


def energy_score(
    simulator, arguments: dict, grad_x: bool = True, grad_target: bool = True
) -> list[Tensor]:
    """Score, diversity, fidelity and the gradients of the score in x, mean and log_std."""
    x, wide = (
        arguments["x"].detach(),
        (arguments[name].detach().float() for name in ("mean", "log_std")),
    )
    randomness = arguments["seed"], arguments["rows"]
    sizes = arguments["num_targets"], arguments["beta"]
    return list(simulator.energy_score(x, *wide, *randomness, *sizes, grad_x, grad_target))


def reference_energy_score(arguments: dict, dtype: torch.dtype) -> list[Tensor]:
    """The same six tensors by the reference in another dtype, from the same values."""
    leaves = [
        arguments[name].detach().to(dtype).requires_grad_() for name in ("x", "mean", "log_std")
    ]
    randomness = arguments["seed"], arguments["rows"]
    result = reference.energy_score(
        *leaves, arguments["num_targets"], arguments["beta"], *randomness
    )
    gradients = torch.autograd.grad(result.score.sum(), leaves)
    return [tensor.detach().double() for tensor in (*result, *gradients)]


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> dict:
    """The case with x in `dtype` and a posterior in float32, as autocast makes them."""
    arguments = case.make()
    arguments["x"] = arguments["x"].detach().to(dtype)
    return arguments


@pytest.mark.parametrize("dtype", DTYPES)
@energy_cases
def test_error_at_most_twice_the_reference(simulator, case: Case, dtype: torch.dtype) -> None:
    arguments = inputs(case, dtype)
    truth = reference_energy_score(arguments, torch.float64)
    narrow = reference_energy_score(arguments, torch.float32)
    score, *gradients = case.magnitudes(arguments)
    simulator.set_schedule(1)
    ours = energy_score(simulator, arguments)
    for output, exact, expected, size in zip(
        ours, truth, narrow, [score] * 3 + gradients, strict=True
    ):
        error, own_error = (output.double() - exact).abs(), (expected - exact).abs().max()
        allowed = 2 * own_error + 4 * EPS * size
        if output.dtype != torch.float32:  # and what rounding to the output's type costs
            info = torch.finfo(output.dtype)
            allowed = allowed + info.eps * exact.abs().clamp(min=info.smallest_normal)
        assert (error <= allowed).all(), (
            f"{(error / allowed).max():.2f} times the error that is allowed"
        )


@energy_cases
def test_schedules_do_not_change_bits(simulator, case: Case) -> None:
    runs = []
    for schedule in SCHEDULES:
        simulator.set_schedule(schedule)
        runs.append(energy_score(simulator, inputs(case)))
    assert all(
        torch.equal(value, first) for run in runs for value, first in zip(run, runs[0], strict=True)
    )


@energy_cases
def test_a_row_does_not_depend_on_the_others(simulator, case: Case) -> None:
    arguments = inputs(case)
    together = energy_score(simulator, arguments)
    row_dims = [0, 0, 0, 1, 0, 0]
    for row in range(arguments["mean"].shape[0]):
        alone = {name: arguments[name].narrow(dim, row, 1) for name, dim in case.row_dims.items()}
        outputs = energy_score(simulator, {**arguments, **alone})
        for output, whole, dim in zip(outputs, together, row_dims, strict=True):
            assert torch.equal(output, whole.narrow(dim, row, 1))


def test_rows_beyond_the_grid_are_strided_over(simulator) -> None:
    draws, rows = 2, (1 << 14) + 3  # the warp kernel's largest grid holds 2^14 rows
    x, mean = torch.linspace(-1, 1, draws * rows).view(draws, rows, 1), torch.zeros(rows, 1)
    arguments = dict(
        x=x,
        mean=mean,
        log_std=mean,
        num_targets=1,
        beta=1.0,
        seed=torch.tensor(1),
        rows=torch.arange(rows),
    )
    last = dict(x=x[:, -3:], mean=mean[-3:], log_std=mean[-3:], rows=arguments["rows"][-3:])
    whole, alone = (
        energy_score(simulator, arguments),
        energy_score(simulator, {**arguments, **last}),
    )
    assert not any(tensor.isnan().any() for tensor in whole)
    assert torch.equal(whole[0][-3:], alone[0]) and torch.equal(whole[3][:, -3:], alone[3])


@energy_cases
def test_gradients_nobody_asked_for_change_nothing(simulator, case: Case) -> None:
    arguments = inputs(case)
    everything = energy_score(simulator, arguments)
    for grad_x, grad_target in [(True, False), (False, True), (False, False)]:
        wanted = [True] * 3 + [grad_x, grad_target, grad_target]
        some = energy_score(simulator, arguments, grad_x, grad_target)
        for tensor, full, want in zip(some, everything, wanted, strict=True):
            assert torch.equal(tensor, full) if want else tensor.numel() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@energy_cases
def test_not_finite_in_not_finite_out(simulator, case: Case, value: float) -> None:
    arguments = inputs(case)
    arguments["x"][1, 0, 0] = value
    ours, expected = (
        energy_score(simulator, arguments),
        reference_energy_score(arguments, torch.float32),
    )
    for output, wanted in zip(ours, expected, strict=True):
        assert torch.equal(output.isnan(), wanted.isnan()) and torch.equal(
            output.isinf(), wanted.isinf()
        )


@pytest.mark.parametrize("case", NOISE_CASES, ids=str)
def test_noise_equals_the_reference(simulator, case: Case) -> None:
    arguments = case.make()
    seed, rows, sizes = (
        arguments["seed"],
        arguments["rows"],
        (arguments["num_draws"], arguments["length"]),
    )
    normal = arguments["distribution"] == "normal"
    out = simulator.noise(seed, rows, *sizes, Stream.HEAD, normal, False)
    exact = reference.noise(
        seed, rows, *sizes, Stream.HEAD, arguments["distribution"], torch.float64
    )
    if not normal:
        assert torch.equal(out.double(), exact)
        return
    pairs = torch.nn.functional.pad(exact, (0, exact.shape[-1] % 2)).unflatten(-1, (-1, 2))
    radius = torch.linalg.vector_norm(pairs, dim=-1).repeat_interleave(2, -1)[
        ..., : exact.shape[-1]
    ]
    assert ((out - exact).abs() <= 4 * EPS * radius).all()


def test_noise_without_rows(simulator) -> None:
    out = simulator.noise(torch.tensor(1), torch.empty(0, dtype=torch.int64), 3, 5, 0, True, False)
    assert out.shape == (3, 0, 5)


# ---- argmax over a vocabulary ----


def check_argmax(simulator, hidden: Tensor, weight: Tensor) -> None:
    """The first largest product in float64, as the CPU kernel says too, under any schedule."""
    # sums of one order for every entry, for a library's product may part exact ties
    expected = (hidden.double()[:, None] * weight.double()).sum(-1).argmax(-1)
    assert torch.equal(ops.linear_argmax(hidden, weight), expected)
    for schedule in SCHEDULES:
        simulator.set_schedule(schedule)
        assert torch.equal(simulator.linear_argmax(hidden, weight, None), expected)


@pytest.fixture(params=[80, 90])
def capability(simulator, request):
    """Without and with warpgroups' products."""
    simulator.set_capability(request.param)
    yield
    simulator.set_capability(80)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ARGMAX_CASES, ids=str)
def test_argmax_is_exact(simulator, capability, case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(dtype)
    check_argmax(simulator, arguments["hidden"], arguments["weight"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_over_several_blocks_of_the_vocabulary(simulator, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2 * 8192 + 100, 24, generator=generator).to(dtype)
    weight[-1] = weight[8200]  # in the last block, of which the second has seen some
    hidden = torch.cat([weight[[3, 8200, 8191, -2]], torch.zeros(1, 24, dtype=dtype)])
    check_argmax(simulator, hidden, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_over_several_tiles(simulator, capability, dtype: torch.dtype) -> None:
    """Two tiles of rows and two of entries, the last of each in part, and two slices of columns."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(311, 72, generator=generator).to(dtype)
    weight[300] = weight[17]
    rows = torch.randn(127, 72, generator=generator).to(dtype)
    check_argmax(simulator, torch.cat([weight[[17, 310, 40]], rows]), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_tells_near_ties_apart(simulator, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1, 33, generator=generator).to(dtype).repeat(300, 1)
    hidden = torch.randn(4, 33, generator=generator).to(dtype)
    for entry in (299, 113, 250):  # by a unit in the last place of one element
        element = weight[entry, entry % 33]
        weight[entry, entry % 33] = torch.nextafter(element, element.new_tensor(torch.inf))
    check_argmax(simulator, hidden, weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_argmax_of_not_finite_scores(simulator, value: float) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 20, generator=generator)
    weight = torch.randn(100, 20, generator=generator)
    weight[[41, 77], 5] = value
    check_argmax(simulator, hidden, weight)
    hidden[1, 2] = value
    check_argmax(simulator, hidden, weight)


def test_argmax_without_rows(simulator) -> None:
    assert simulator.linear_argmax(torch.ones(0, 3), torch.ones(5, 3), None).shape == (0,)


BY_LIBRARY = """
import sys, torch

torch.ops.load_library(sys.argv[1])
calls = torch.load(sys.argv[2])
with torch.profiler.profile() as profile:
    ids = [torch.ops.calm_rt_simulator.linear_argmax(*call, None) for call in calls]
torch.save(ids, sys.argv[2])
print(sum(event.name == "aten::mm" for event in profile.events()))
"""


def test_argmax_by_the_library_gives_the_same(simulator, tmp_path: Path) -> None:
    """Small whole numbers, whose products are exact, over two blocks and with ties. Who multiplies
    is chosen when the first call asks for it, so the library does in a process of its own."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randint(-1, 2, (5, 8), generator=generator).double()
    weight = torch.randint(-1, 2, (8192 + 70, 8), generator=generator).double()
    scores = hidden @ weight.T
    assert (scores == scores.amax(-1, keepdim=True)).sum(-1).min() > 1
    calls = [(hidden.to(dtype), weight.to(dtype)) for dtype in DTYPES]
    torch.save(calls, tmp_path / "tensors")
    command = [sys.executable, "-c", BY_LIBRARY, built("_simulator.abi3.so"), tmp_path / "tensors"]
    environment = {**os.environ, "CALM_RT_CUDA_ARGMAX": "library"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 2 * len(DTYPES)  # products, one a block
    for ids, call in zip(torch.load(tmp_path / "tensors"), calls, strict=True):
        assert torch.equal(ids, scores.argmax(-1))
        assert torch.equal(simulator.linear_argmax(*call, None), ids)
