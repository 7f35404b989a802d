"""Times every op on the GPU at the sizes that issue real work, in order of interest.

    python benchmarks/gpu_rows.py FILE

Writes FILE anew after each case, so that a limit of time costs the last cases alone: machine,
limits (a copy's bytes a second, a product's FLOP a second) and rows as calm_rt.benchmark measures
them. `library_tier` is linear_argmax by the library's products (CALM_RT_CUDA_ARGMAX=library),
which an extension chooses once, so it is timed in a process of its own, before the others.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from calm_rt import _native, benchmark, inputs
from calm_rt.ops.check import check
from calm_rt.tensor_files import write_json
from calm_rt.testing import Case

ROUNDS = 7
VOCABULARY, HIDDEN, INTERMEDIATE, LATENT, PATCH = 128257, 512, 1280, 128, 4  # official
AUTOENCODER = (HIDDEN, INTERMEDIATE, LATENT, PATCH)
HEAD = (64, LATENT, 3)  # noise, latent, blocks
TRAINED_ROWS = 8188  # of the official training step: 4 sequences of 2047 patches
BF16 = torch.bfloat16
TIER_CASES = tuple(f"linear_argmax-R{rows}-H512-V128257-bfloat16" for rows in (800, 25600))


def case(op: str, name: str, maker: Callable, *sizes: Any, **options: Any) -> Case:
    """The arguments are made once; rivals get copies."""
    make = functools.cache(lambda: maker(*sizes))
    return Case(op, name, make, benchmark=True, rounds=ROUNDS, **options)


CASES = (
    case(
        "energy_score",
        "S8-R8188-L128-M100",
        inputs.energy_score,
        *(8, TRAINED_ROWS, LATENT, 100),
        gradients=("x",),
    ),
    *(
        case(
            "linear_argmax",
            f"R{rows}-H512-V128257-{dtype}".replace("torch.", ""),
            inputs.linear_argmax,
            *(rows, HIDDEN, VOCABULARY),
            dtype=dtype,
        )
        for rows, dtype in ((800, BF16), (800, torch.float32), (4, BF16), (25600, BF16))
    ),
    case(
        "linear_argmax",
        "first-100-R800-H512-V128257-bfloat16",
        inputs.first_argmax,
        *(800, HIDDEN, VOCABULARY, 100),
        dtype=BF16,
    ),
    case(
        "linear_cross_entropy",
        "R16384-H512-V128257-bfloat16",
        inputs.linear_cross_entropy,
        *(16384, HIDDEN, VOCABULARY),
        gradients=("hidden", "weight"),
        dtype=BF16,
    ),
    case(
        "sample_latents",
        "R8188-H1024-S8",
        inputs.sample_latents,
        *(TRAINED_ROWS, 1024, 8, *HEAD),
        gradients=("hidden", "weights"),
    ),
    case("sample_latents", "R4-H1024-S200", inputs.sample_latents, *(4, 1024, 200, *HEAD)),
    case(
        "decode",
        "R200-K4-H512-V128257-bfloat16",
        inputs.decode,
        *(200, VOCABULARY, *AUTOENCODER),
        dtype=BF16,
    ),
    case(
        "gated_mlp",
        "R32768-H512-I1280-bfloat16",
        inputs.gated_mlp,
        *(32768, HIDDEN, INTERMEDIATE),
        gradients=("x", "norm_weight", "gate", "up", "down"),
        dtype=BF16,
    ),
    case(
        "encode",
        "folded-R8192-K4-H512-V8192",
        inputs.folded_encode,
        *(8192, 8192, *AUTOENCODER),
        official_arguments=functools.cache(lambda: inputs.encode(8192, 8192, *AUTOENCODER)),
    ),
    case("select_patch", "B32-S1000-K4-n2", inputs.model_pool, *(32, 1000, PATCH, 2)),
    case("survivors", "B32-S1000-K4-depth3", inputs.survivors, *(32, 1000, PATCH, 3)),
    case("noise", "D8-R8188-L64", inputs.noise, *(8, TRAINED_ROWS, 64, "normal")),
)


def measure(one: Case, among: Sequence[str] = benchmark.RIVALS) -> list[dict[str, Any]]:
    """With gradients where the op has them: that is the work of a training step. What fails but
    native itself leaves its error in native's row."""
    passes, rivals = benchmark.passes_of(one)[-1], benchmark.rivals_of(one, among, "cuda")
    failed: dict[str, str] = {}
    rows = benchmark.measure(one, passes, rivals, "cuda", ROUNDS, memory=True, failed=failed)
    [native] = [row for row in rows if row["rival"] == "native"]
    try:
        native["kernels"] = kernel_times(one, "backward" in passes)
    except Exception as error:
        failed["kernels"] = f"{type(error).__name__}: {error}"
    if failed:
        print(f"{one}: {failed}", file=sys.stderr)
        native["failed"] = failed
    return rows


def measure_tier(path: Path) -> list[dict[str, Any]]:
    """The other way of linear_argmax at TIER_CASES, without rivals.

    path: of a file for this alone.
    """
    environment = {**os.environ, "CALM_RT_CUDA_ARGMAX": "library"}
    command = [sys.executable, __file__, path, *TIER_CASES]
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    rows = json.loads(path.read_text())["rows"]
    path.unlink()
    return [{**row, "rival": "library_tier"} for row in rows]


def kernel_times(one: Case, backward: bool) -> dict[str, float]:
    """Milliseconds on the device in one native call, by kernel, the library's too."""
    arguments = benchmark.make_arguments(one, "native", "cuda")
    call = benchmark.contender(one, "native", arguments, backward)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with benchmark.route("native"):
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / 1e3 for event in profile.key_averages()}
    return {name: time for name, time in times.items() if time > 0}


def main(path: Path, tier_cases: Sequence[str] = ()) -> int:
    """tier_cases: in a process with another tier, the cases that it is for."""
    results: dict[str, Any] = {"machine": benchmark.machine("cuda")}
    if tier_cases:
        tier = _native.build_info().get("cuda_argmax")
        check(tier == "library", "CALM_RT_CUDA_ARGMAX", "an extension that obeys it", tier)
        cases = [one for one in CASES if str(one) in tier_cases]
        results["rows"] = [row for one in cases for row in measure(one, ["native"])]
        write_json(path, results)
        return 0
    results |= {"limits": benchmark.limits("cuda"), "rows": [], "errors": {}}
    write_json(path, results)
    torch.cuda.empty_cache()
    works = {"library_tier": functools.partial(measure_tier, path.with_suffix(".tier.json"))}
    works |= {str(one): functools.partial(measure, one) for one in CASES}
    for name, work in works.items():
        try:
            results["rows"] += work()
        except Exception as error:  # a case that fails leaves the others
            results["errors"][name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
        write_json(path, results)
        torch.cuda.empty_cache()
    return 1 if results["errors"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
