"""The simulator's standalone check programs pass, under sanitizers too, and find planted bugs.

`make simulator` builds them. `make sanitize` adds the sanitizers and the bugs.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_simulator import ROOT, built


def run_check(program: Path, *kernels: str) -> subprocess.CompletedProcess:
    # ThreadSanitizer of GCC 12 and 13 stops where addresses are randomised by more bits
    prefix = ["setarch", "-R"] if "tsan" in program.name and randomised_beyond_tsan() else []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}  # one race is enough
    return subprocess.run(
        [*prefix, program, *kernels], env=environment, capture_output=True, text=True, timeout=300
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
    user: str = "energy_score.cu"  # the kernel that is compiled where the file is a header

    def __str__(self) -> str:
        return f"{self.name}-{self.build}"

    def kernel(self) -> str:
        """The kernel source that is compiled with the bug in it."""
        return self.file if self.file.endswith(".cu") else self.user


def bug_in(file: str, default_user: str = "energy_score.cu") -> Callable[..., Bug]:
    """Makes bugs of one file.  default_user: the kernel that is compiled where it is a header."""

    def make(
        name: str, old: str, new: str, report: str, build: str = "plain", user: str = default_user
    ) -> Bug:
        return Bug(name, file, old, new, report, build, user)

    return make


energy_bug = bug_in("energy_score.cu")
reduce_bug = bug_in("reduce.cuh")
patch_bug = bug_in("select_patch.cu")
keys_bug = bug_in("candidates.cuh", "select_patch.cu")
survivors_bug = bug_in("survivors.cu")
argmax_bug = bug_in("linear_argmax.cu")
winner_bug = bug_in("winner.cuh", "linear_argmax.cu")
groups_bug = bug_in("argmax_groups.cu")
bounds_bug = bug_in("bounds.cuh", "argmax_groups.cu")
warpgroups_bug = bug_in("argmax_warpgroups.cu")
cross_entropy_bug = bug_in("linear_cross_entropy.cu")
head_bug = bug_in("sample_latents.cu")
sums_bug = bug_in("column_sums.cuh", "sample_latents.cu")
rows_bug = bug_in("sum_rows.cuh", "gated_mlp.cu")
mlp_bug = bug_in("gated_mlp.cu")

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
SAME_PATCH = "same_patch(tokens + own * patch, tokens + s * patch, depth) &&"
KEYS_READ = "__syncthreads();  // the keys before these have been read"
ALIVE_COUNTED = "if (lane == 0) alive_of[warp] = __popc(lanes);\n      __syncthreads();"
COUNTS_READ = "__syncthreads();  // the counts before these have been read"
TOTALS_READ = "__syncthreads();  // the last call's sums have been read"
ALIVE_READ = "own < p.pool && p.alive[number] != 0"
LIVE_TILE = "if (!p.wanted.has(first_row)) return;"
LIVE_ROW = "if (!p.wanted.has(row)) return;"
SUMS_READ = "__syncthreads();  // all cumulative weights are in memory"
MAXIMA_READ = "__syncthreads();  // the last call's maxima have been read"
WINNERS_WRITTEN = f"if (lane == 0) winners[warp] = mine;\n{BARRIER}"
WINNERS_READ = "__syncthreads();  // the last call's winners have been read"
CLAMPED = "min(static_cast<float>(score), kLargestFloat)"
NORM_SLACK = "fmaf(factor, norm.value[e], score.value[e])"
NORM_ROOM = "sqrtf(sum) * excess + kNormRoom"
MAXIMUM = "if (lane == 0) maxima[warp] = value;\n"
KNOWN = "if (threadIdx.x == 0 && known)"
TIE = "(score == other.score) & lower"
COPIES_DONE = "copies_done<kStages - 2>();"
STEP_READY = "__syncthreads();  // this step's copies are there, the last stage has been read\n"
NEXT_STEP = "    copy_step(step + kStages - 1);\n"
ENTRY_ROW = "half + j * 16 + lane % 16"
TOP_SHUFFLE = "__shfl_xor_sync(kFullMask, top.largest, offset)"
BITS_ROOM = "fmaf(BoundGroups::kRelative, fabsf(score)"
NEXT_WINS = "winner.may_lose_to(without_entry(next), p.first_id + first_entry)"
LANE_LIMIT = "if (entry < entries.limit) top.add"
FULL_WAIT = "barrier_wait(&full[place.stage], place.parity);"
READ_WAIT = "barrier_wait(&read[place.stage], place.parity ^ 1);"
EXPECTED = "barrier_arrive_expecting(&full[place.stage], kStageBytes);"
SLICE_READ = "products_read<1>();"
SUMS_DONE = "        products_done(sum);\n"
LAST_READ = "        if (lane == 0) barrier_arrive(&read[last]);\n"
WHOLE_ADDRESS = "&& reinterpret_cast<uintptr_t>(tensor) % sizeof(Pack<T, COUNT>) == 0"
BARRIERS_READY = "    __syncthreads();\n"

LAST_LINE = "(range + 1) * num_lines / num_ranges"
ALL_TOGETHER = "line + (TOGETHER - 1) * step < last_line"
LINES_LEFT = "for (; line < last_line; line += step) add(load(line));"
RANGE_ROW = "partial[(range * COUNT + which) * columns"
TWO_TENSORS = "column < p.size ? p.out[column] : p.rest[column - p.size]"
VARIANCE = "rsqrtf(warp_sum(squares)"
ROW_KNOWN = "static_cast<float>(p.size);\n  }\n  __syncthreads();\n"
LAST_ROWS = "p.num_rows - first < kPartialRows"
KNOWN_ID = "known && ids[j] >= 0 && ids[j] < p.vocabulary"

BUGS = (
    sums_bug("sums-not-waited-for", BARRIER, "", RACE, "tsan"),
    sums_bug("lines-in-no-range", LAST_LINE, "(range + 1) * (num_lines / num_ranges)", WRONG),
    sums_bug("lines-of-the-next-range", ALL_TOGETHER, "line < last_line", WRONG),
    sums_bug("lines-left-over", LINES_LEFT, "", WRONG),
    sums_bug("ranges-share-a-row", RANGE_ROW, "partial[which * columns", WRONG),
    sums_bug("columns-beyond-the-last", "&& first_column + i < columns", "", "Sanitizer", "asan"),
    head_bug("norm-without-its-bias", "value += bias.value[e];", ";", WRONG),
    rows_bug("sums-not-waited-for", BARRIER, "", RACE, "tsan"),
    rows_bug("a-row-left-out", "row = warp;", "row = warp + 1;", WRONG),
    rows_bug("a-row-left-out", "row = warp;", "row = warp + 1;", WRONG, user="sample_latents.cu"),
    rows_bug(
        "one-tensor-of-two", TWO_TENSORS, "p.out[column]", "Sanitizer", "asan", "sample_latents.cu"
    ),
    head_bug(
        "beyond-the-line", "i + e < size ? run.value[e] - mean : 0", "run.value[e] - mean", WRONG
    ),
    head_bug("wrong-variance", VARIANCE, VARIANCE.replace("squares", "total"), WRONG),
    mlp_bug("rows-not-waited-for", ROW_KNOWN, ROW_KNOWN.replace(BARRIER, ""), RACE, "tsan"),
    mlp_bug("rows-beyond-the-last", LAST_ROWS, "false", "Sanitizer", "asan"),
    mlp_bug("one-term-of-two", "widen(p.grad_normal[1][element])", "0", WRONG),
    Bug("any-id-is-known", "encode.cu", KNOWN_ID, "known", "AddressSanitizer", "asan"),
    Bug(
        "no-barrier-in-maximum",
        "reduce.cuh",
        MAXIMUM + BARRIER,
        MAXIMUM,
        RACE,
        "tsan",
        "linear_cross_entropy.cu",
    ),
    cross_entropy_bug("beyond-vocabulary", "runs_packed), width - i)", "runs_packed), 8)", WRONG),
    cross_entropy_bug("sum-not-rescaled", "sum *= expf(maximum - larger);", "", WRONG),
    cross_entropy_bug("wrong-id-looked-up", KNOWN, "if (threadIdx.x == 0)", "Sanitizer", "asan"),
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
    keys_bug("keys-are-believed", SAME_PATCH, "", WRONG),
    keys_bug("keys-are-believed", SAME_PATCH, "", WRONG, user="survivors.cu"),
    keys_bug("keys-overwritten", KEYS_READ, "", RACE, "tsan"),
    survivors_bug("none-is-kept", "exists && own == p.kept[row]", "false", WRONG),
    survivors_bug("own-pool-before-itself", "b < row ?", "b <= row ?", "Sanitizer", "asan"),
    survivors_bug("own-lane-before-itself", "(1u << lane) - 1", "(2u << lane) - 1", WRONG),
    survivors_bug("candidates-beyond-the-last", ALIVE_READ, "p.alive[number]", "Sanitizer", "asan"),
    survivors_bug("counts-not-waited-for", ALIVE_COUNTED, ALIVE_COUNTED[:-16], RACE, "tsan"),
    survivors_bug("counts-overwritten", COUNTS_READ, "", RACE, "tsan"),
    survivors_bug("sums-overwritten", TOTALS_READ, "", RACE, "tsan"),
    argmax_bug("rows-that-nobody-wants", LIVE_ROW, "", WRONG),
    groups_bug("rows-that-nobody-wants", LIVE_ROW, "", WRONG),
    groups_bug("tiles-that-nobody-wants", LIVE_TILE, "", WRONG),
    groups_bug("a-tile-too-few", LIVE_TILE, LIVE_TILE.replace("first_row", "first_row + 1"), WRONG),
    warpgroups_bug("tiles-that-nobody-wants", "p.wanted.of(p.num_rows)", "p.num_rows", WRONG),
    patch_bug("sums-not-waited-for", SUMS_READ, "", RACE, "tsan"),
    Bug(
        "maxima-overwritten",
        "reduce.cuh",
        MAXIMA_READ,
        "",
        RACE,
        "tsan",
        user="linear_argmax.cu",
    ),
    winner_bug(
        "winners-not-waited-for",
        WINNERS_WRITTEN,
        WINNERS_WRITTEN.removesuffix(BARRIER),
        RACE,
        "tsan",
    ),
    winner_bug("winners-overwritten", WINNERS_READ, "", RACE, "tsan"),
    argmax_bug("no-slack-for-operands", NORM_SLACK, "score.value[e]", WRONG),
    argmax_bug("half-the-slack", NORM_SLACK, NORM_SLACK.replace("factor", "factor / 2"), WRONG),
    argmax_bug("no-room-for-underflow", NORM_ROOM, "sqrtf(sum) * excess", WRONG),
    winner_bug("overflow-taken-for-a-score", CLAMPED, "static_cast<float>(score)", WRONG),
    winner_bug("ties-to-the-highest", TIE, TIE.replace("lower", "!lower"), WRONG),
    winner_bug("any-nan", "isnan(bound) & lower", "false", WRONG),
    argmax_bug("one-candidate-a-lane", "selected &= selected - 1", "selected = 0", WRONG),
    groups_bug("copies-not-waited-for", COPIES_DONE, "", WRONG),
    groups_bug("copies-waited-for-too-late", COPIES_DONE, COPIES_DONE.replace("2", "1"), WRONG),
    groups_bug("no-barrier-after-copies", STEP_READY, "\n", RACE, "tsan"),
    groups_bug("stage-overwritten", STEP_READY + NEXT_STEP, NEXT_STEP + STEP_READY, RACE, "tsan"),
    groups_bug("read-past-the-ring", ENTRY_ROW, f"{ENTRY_ROW} + 8", "AddressSanitizer", "asan"),
    bounds_bug(
        "lane-not-in-mask",
        TOP_SHUFFLE,
        TOP_SHUFFLE.replace("kFullMask", "0x7FFFFFFFu"),
        "the mask does not name the calling lane at",
    ),
    groups_bug(
        "half-a-warp-multiplies",
        "multiply_add(sum",
        "if (lane < 16) multiply_add(sum",
        "lanes of one mask meet in different collectives at",
    ),
    bounds_bug("entries-beyond-the-last", LANE_LIMIT, "top.add", WRONG),
    groups_bug("columns-beyond-the-row", "&& column < size", "", WRONG),
    groups_bug("rows-beyond-the-last", "first_row + row < length &&", "", "Sanitizer", "asan"),
    groups_bug("half-the-slack", "p.factor(),", "p.factor() / 2,", WRONG),
    bounds_bug("no-room-for-the-entry", BITS_ROOM, "fmaf(0.f, fabsf(score)", WRONG),
    bounds_bug("one-lane-of-two", "offset < 4", "offset < 2", WRONG),
    groups_bug("one-candidate-a-group", NEXT_WINS, "false", WRONG),
    groups_bug("nan-is-no-group", "isnan(largest) ||", "", WRONG),
    bounds_bug(
        "entries-beyond-the-last", LANE_LIMIT, "top.add", WRONG, user="argmax_warpgroups.cu"
    ),
    warpgroups_bug("copies-not-waited-for", FULL_WAIT, "", WRONG),
    warpgroups_bug(
        "bytes-not-expected",
        EXPECTED,
        EXPECTED.replace("_expecting", "").replace(", kStageBytes", ""),
        "more bytes come than the barrier expects at",
    ),
    warpgroups_bug("stage-not-waited-for", READ_WAIT, "", RACE, "tsan"),
    warpgroups_bug("wrong-parity", READ_WAIT, READ_WAIT.replace(" ^ 1", ""), "deadlock: threads"),
    warpgroups_bug("stage-freed-while-read", SLICE_READ, "", RACE, "tsan"),
    warpgroups_bug("stage-freed-while-read", SLICE_READ, "", WRONG),
    warpgroups_bug("last-stage-freed", SUMS_DONE + LAST_READ, LAST_READ + SUMS_DONE, RACE, "tsan"),
    warpgroups_bug("sums-used-too-early", SUMS_DONE, "products_read<1>();", WRONG),
    warpgroups_bug(
        "no-fence-before-products",
        "products_begin();",
        "",
        "products that nothing separates from other uses of their sums at",
    ),
    warpgroups_bug("sums-of-the-tile-before", "slice > 0 || k > 0", "true", WRONG),
    warpgroups_bug(
        "barriers-used-too-early",
        BARRIERS_READY,
        "",
        "a barrier that nobody has initialised at",
    ),
    Bug("misaligned", "primitives.cuh", "length % COUNT == 0 &&", "", "misaligned access at"),
    Bug("misaligned-tensor", "primitives.cuh", WHOLE_ADDRESS, "", "misaligned access at"),
    groups_bug(
        "misaligned-copy", "+ column : matrix", "+ column + 1 : matrix", "misaligned access at"
    ),
    warpgroups_bug(
        "misaligned-map",
        "make_box_map(p.hidden,",
        "make_box_map(p.hidden + 1,",
        "a map of a matrix whose rows do not begin at whole packs",
    ),
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
        [compiler, *flags, "-x", "c++", "-c", folder / bug.kernel(), "-o", mutant], check=True
    )
    # the mutant comes first, so that the archives give everything but what it defines
    subprocess.run([compiler, *sanitize, mutant, *archives, "-o", program], check=True)
    result = run_check(program, Path(bug.kernel()).stem)
    assert result.returncode != 0 and bug.report in result.stdout + result.stderr, (
        result.stdout + result.stderr
    )
