"""Kernels against the official formula from one row to many: is there a size where they lose?

A sweep changes one size of an op and keeps the others; a point that would take longer than
POINT_SECONDS ends it. A point where the kernel seems slower is measured once more, for longer.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from calm_rt import inputs
from calm_rt.benchmark import compete, contender, make_arguments
from calm_rt.testing import Case
from calm_rt.threads import restored_threads

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 16384)
VOCABULARIES = (256, 1024, 4096, 16384, 65536, 128257)
LATENTS = (16, 32, 64, 128, 256)
POOLS = (1, 8, 64, 200, 1024)
RIVALS = ("official", "native")
POINT_SECONDS = 2.0
ROUNDS, ROUNDS_SECONDS = 15, 0.25
AGAIN = 4  # times as long for a point that seems slower
SLOWER = 1.05  # of the other's time: what counts as slower, here and in report.py

Maker = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """One size of one op, and the arguments at each of its values.

    axis: its letter.  fixed: the other sizes in words.
    official_make: arguments of the official formula, where it takes others.
    """

    op: str
    axis: str
    values: tuple[int, ...]
    fixed: str
    make: Maker
    gradients: tuple[str, ...] = ()
    official_make: Maker | None = None

    def case(self, value: int) -> Case:
        other = self.official_make
        return Case(
            self.op,
            f"{self.axis}{value}",
            lambda: self.make(value),
            gradients=self.gradients,
            official_arguments=other and (lambda: other(value)),
        )


AUTOENCODER = (512, 1280, 128, 4)  # the official layers: hidden, intermediate, latent, patch
AUTOENCODER_WORDS = "H 512, I 1280, K 4"
TRAINED = ("hidden", "weight")

SWEEPS = (
    Sweep("noise", "R", ROWS, "D 8, L 64", lambda r: inputs.noise(8, r, 64, "normal")),
    Sweep("noise", "L", LATENTS, "D 8, R 256", lambda n: inputs.noise(8, 256, n, "normal")),
    Sweep(
        "energy_score",
        "R",
        ROWS,
        "S 8, M 100, L 128",
        lambda r: inputs.energy_score(8, r, 128, 100),
        gradients=("x",),
    ),
    Sweep(
        "energy_score",
        "L",
        LATENTS,
        "S 8, M 100, R 64",
        lambda n: inputs.energy_score(8, 64, n, 100),
        gradients=("x",),
    ),
    Sweep(
        "linear_argmax", "R", ROWS, "H 512, V 16384", lambda r: inputs.linear_argmax(r, 512, 16384)
    ),
    Sweep(
        "linear_argmax",
        "V",
        VOCABULARIES,
        "R 64, H 512",
        lambda v: inputs.linear_argmax(64, 512, v),
    ),
    Sweep(
        "linear_cross_entropy",
        "R",
        ROWS,
        "H 256, V 4096",
        lambda r: inputs.linear_cross_entropy(r, 256, 4096),
        gradients=TRAINED,
    ),
    Sweep(
        "linear_cross_entropy",
        "V",
        VOCABULARIES,
        "R 64, H 256",
        lambda v: inputs.linear_cross_entropy(64, 256, v),
        gradients=TRAINED,
    ),
    Sweep(
        "encode",
        "R",
        ROWS,
        f"{AUTOENCODER_WORDS}, L 128, V 4096",
        lambda r: inputs.encode(r, 4096, *AUTOENCODER),
    ),
    Sweep(
        "encode",
        "L",
        LATENTS,
        f"{AUTOENCODER_WORDS}, R 64, V 4096",
        lambda n: inputs.encode(64, 4096, 512, 1280, n, 4),
    ),
    Sweep(
        "encode",
        "R",
        ROWS,
        f"folded, {AUTOENCODER_WORDS}, L 128, V 4096",
        lambda r: inputs.folded_encode(r, 4096, *AUTOENCODER),
        official_make=lambda r: inputs.encode(r, 4096, *AUTOENCODER),
    ),
    Sweep(
        "decode",
        "R",
        ROWS,
        f"{AUTOENCODER_WORDS}, L 128, V 4096",
        lambda r: inputs.decode(r, 4096, *AUTOENCODER),
    ),
    Sweep(
        "decode",
        "V",
        VOCABULARIES,
        f"{AUTOENCODER_WORDS}, L 128, R 16",
        lambda v: inputs.decode(16, v, *AUTOENCODER),
    ),
    Sweep(
        "decode",
        "L",
        LATENTS,
        f"{AUTOENCODER_WORDS}, R 64, V 4096",
        lambda n: inputs.decode(64, 4096, 512, 1280, n, 4),
    ),
    Sweep("gated_mlp", "R", ROWS, "H 512, I 1280", lambda r: inputs.gated_mlp(r, 512, 1280)),
    Sweep("sample_latents", "R", ROWS, "H 512, S 8", lambda r: inputs.sample_latents(r, 512, 8)),
    Sweep(
        "select_patch",
        "B",
        ROWS,
        "S 200, K 4, n 2",
        lambda b: inputs.model_pool(b, 200, 4, 2),
    ),
    Sweep("survivors", "B", ROWS, "S 200, K 4, depth 2", lambda b: inputs.survivors(b, 200, 4, 2)),
    Sweep("select_patch", "S", POOLS, "B 4, K 4, n 2", lambda s: inputs.model_pool(4, s, 4, 2)),
)


def measure_sweep(sweep: Sweep, device: str) -> Iterator[dict[str, Any]]:
    """The points of a sweep with 1 and 2 threads, as they are finished."""
    with restored_threads() as most:
        for threads in sorted({1, min(2, most)}) if device == "cpu" else (most,):
            torch.set_num_threads(threads)
            last: tuple[int, float] | None = None  # value and seconds of the point before
            for value in sweep.values:
                if last and last[1] * value / last[0] > POINT_SECONDS:
                    break
                point = _measure_point(sweep, value, device)
                last = value, max(point["official_ms"], point["native_ms"]) / 1e3
                yield {**point, "threads": threads}


def measure_sweeps(op_names: Sequence[str] | None, device: str) -> Iterator[list[dict[str, Any]]]:
    """The points of each sweep of these ops, or of all."""
    chosen = [sweep for sweep in SWEEPS if op_names is None or sweep.op in op_names]
    bar = tqdm(chosen, unit="sweep", leave=False, disable=None)
    for sweep in bar:
        bar.set_postfix_str(f"{sweep.op} {sweep.axis}")
        yield list(measure_sweep(sweep, device))


def _measure_point(sweep: Sweep, value: int, device: str) -> dict[str, Any]:
    case, backward = sweep.case(value), bool(sweep.gradients)
    calls = {
        rival: contender(case, rival, make_arguments(case, rival, device), backward)
        for rival in RIVALS
    }
    for scale in (1, AGAIN):
        times = compete(calls, device, scale * ROUNDS, scale * ROUNDS_SECONDS)
        theirs, ours = (statistics.median(times[rival]) for rival in RIVALS)
        # also in the fastest round, which a busy machine disturbs least
        fastest = min(times["native"]) > SLOWER * min(times["official"])
        slower = fastest and ours > SLOWER * theirs
        if not slower:
            break
    return {
        "op": sweep.op,
        "axis": sweep.axis,
        "value": value,
        "fixed": sweep.fixed,
        "passes": "forward+backward" if backward else "forward",
        "official_ms": 1e3 * theirs,
        "native_ms": 1e3 * ours,
        "slower": slower,
    }
