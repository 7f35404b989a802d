"""The CUDA kernels, run on the CPU by csrc/simulator, keep the ops' promises; and it finds bugs.

`make simulator` builds what is loaded here. `make sanitize` adds the sanitizers and planted bugs.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calm_rt import reference
from calm_rt.reference import Stream
from calm_rt.testing import CASES, Case

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "simulator"
SCHEDULES = (0, 1, 2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENERGY_CASES = [case for case in CASES if case.op == "energy_score" and not case.benchmark]
NOISE_CASES = [case for case in CASES if case.op == "noise" and not case.benchmark]
EPS = torch.finfo(torch.float32).eps

energy_cases = pytest.mark.parametrize("case", ENERGY_CASES, ids=str)


def built(name: str) -> Path:
    path = BUILD / name
    if not path.exists():
        reason = f"{path.relative_to(ROOT)} is not built: make simulator"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
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
    out = simulator.noise(seed, rows, *sizes, Stream.HEAD, normal, torch.float32)
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
    out = simulator.noise(
        torch.tensor(1), torch.empty(0, dtype=torch.int64), 3, 5, 0, True, torch.float32
    )
    assert out.shape == (3, 0, 5)


# ---- standalone programs: sanitizers and planted bugs ----


def run_check(program: Path) -> subprocess.CompletedProcess:
    # ThreadSanitizer of GCC 12 and 13 stops where addresses are randomised by more bits
    prefix = ["setarch", "-R"] if "tsan" in program.name and randomised_beyond_tsan() else []
    return subprocess.run(
        [*prefix, program], capture_output=True, text=True, timeout=120, check=False
    )


def randomised_beyond_tsan() -> bool:
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    return bits.exists() and int(bits.read_text()) > 28


def test_check_program() -> None:
    result = run_check(built("simulator_check_plain"))
    assert result.returncode == 0, result.stdout


@pytest.mark.sanitize
@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_check_program_under_sanitizer(sanitizer: str) -> None:
    result = run_check(built(f"simulator_check_{sanitizer}"))
    assert result.returncode == 0, result.stdout + result.stderr


@dataclass(frozen=True)
class Bug:
    """A change to the kernel sources and who must notice it."""

    name: str
    file: str
    old: str
    new: str
    report: str
    build: str = "plain"  # the simulator's own checks and the comparison of values; asan, tsan

    def __str__(self) -> str:
        return f"{self.name}-{self.build}"


def energy_bug(name: str, old: str, new: str, report: str, build: str = "plain") -> Bug:
    return Bug(name, "energy_score.cu", old, new, report, build)


def reduce_bug(name: str, old: str, new: str, report: str, build: str = "plain") -> Bug:
    return Bug(name, "reduce.cuh", old, new, report, build)


RACE = "ThreadSanitizer: data race"
WRONG = "mismatches"
WRITE = "if (lane == 0) partial[warp] = value;\n"
BARRIER = "  __syncthreads();\n"
OLD_WEIGHTS_READ = "__syncthreads();  // the weights before these have been read"
NEW_WEIGHTS = "            }\n            __syncthreads();\n"
SHUFFLE = "__shfl_sync(kFullMask, term.weight"
XOR = "__shfl_xor_sync(kFullMask, given, offset)"
BOTH_ARMS = f"if (lane == 0) {{ partial[warp] = value;{BARRIER}}} else {{{BARRIER}}}\n"
HALVES = "  lane < 16 ? __syncthreads() : __syncwarp();\n"
ROWS = "const int64_t stride ="
STD = "first + e < p.size ? expf(std[g].value[e])"
NEXT_STD = "first + e < p.size ? expf(p.log_std[row * p.size + first + e + 1])"

BUGS = (
    energy_bug("no-barrier-after-write", NEW_WEIGHTS, "            }\n", WRONG),
    energy_bug("no-barrier-after-write", NEW_WEIGHTS, "            }\n", RACE, "tsan"),
    energy_bug("no-barrier-before-overwrite", OLD_WEIGHTS_READ, "", RACE, "tsan"),
    reduce_bug("no-barrier-in-reduction", WRITE + BARRIER, WRITE, RACE, "tsan"),
    energy_bug(
        "lane-not-in-mask",
        SHUFFLE,
        SHUFFLE.replace("kFullMask", "0x7FFFFFFFu"),
        "the mask does not name the calling lane at",
    ),
    energy_bug(
        "masks-overlap",
        SHUFFLE,
        SHUFFLE.replace("kFullMask", "lane < 16 ? 0xFFFFu : kFullMask"),
        "masks of two collectives overlap at",
    ),
    energy_bug(
        "lane-exited",
        ROWS,
        f"if (lane == 5) return;\n  {ROWS}",
        "a lane of the mask has exited at",
    ),
    energy_bug(
        "collectives-differ",
        SHUFFLE,
        f"lane == 3 ? term.weight : {SHUFFLE}",
        "lanes of one mask meet in different collectives at",
    ),
    reduce_bug("barrier-in-both-arms", WRITE + BARRIER, BOTH_ARMS, "divergent __syncthreads at"),
    reduce_bug(
        "barrier-not-reached",
        WRITE + BARRIER,
        f"{WRITE}  if (warp != 3){BARRIER}",
        "divergent __syncthreads at",
    ),
    reduce_bug(
        "deadlock", WRITE + BARRIER, WRITE + HALVES, "deadlock: threads wait for each other at"
    ),
    reduce_bug("wrong-shuffle", XOR, XOR.replace("given", "mine"), WRONG),
    reduce_bug(
        "read-past-shared", "lane < kWarps ?", "lane <= kWarps ?", "AddressSanitizer", "asan"
    ),
    reduce_bug(
        "write-past-shared",
        WRITE,
        WRITE.replace("[warp]", "[warp + 1]"),
        "write outside the shared array at",
    ),
    energy_bug("read-past-row", STD, NEXT_STD, "AddressSanitizer", "asan"),
    Bug("misaligned", "primitives.cuh", "length % kFour == 0 &&", "", "misaligned access at"),
)

FLAGS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-fsanitize=address"],
    "tsan": ["-O1", "-fsanitize=thread", "-fno-builtin"],
}


@pytest.mark.sanitize
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    archives = [
        built(f"lib{name}.a")
        for name in (f"check_{bug.build}", f"kernels_{bug.build}", "simulator")
    ]
    folder = tmp_path / "kernels" / "cuda"
    shutil.copytree(ROOT / "csrc" / "kernels" / "cuda", folder)
    source = (folder / bug.file).read_text()
    assert source.count(bug.old) == 1, f"{bug.file} has changed, adapt the bug"
    (folder / bug.file).write_text(source.replace(bug.old, bug.new))
    program = tmp_path / f"check_{bug.build}"
    compiler = os.environ.get("CXX", "c++")
    sanitize = ["-fsanitize=address,undefined"] if bug.build == "asan" else FLAGS[bug.build]
    flags = [
        *FLAGS[bug.build],
        "-g1",
        "-w",
        "-std=c++20",
        f"-I{tmp_path}",
        f"-I{ROOT / 'csrc'}",
    ]
    mutant = tmp_path / "mutant.o"
    subprocess.run(
        [compiler, *flags, "-x", "c++", "-c", folder / "energy_score.cu", "-o", mutant], check=True
    )
    # the mutant comes first, so that the archives give everything but what it defines
    subprocess.run([compiler, *sanitize, mutant, *archives, "-o", program], check=True)
    result = run_check(program)
    assert result.returncode != 0 and bug.report in result.stdout + result.stderr, (
        result.stdout + result.stderr
    )
