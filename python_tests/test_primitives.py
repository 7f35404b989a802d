"""Each primitive of the CUDA kernels does what it says: in the simulator, and on a GPU the same.

`make simulator` builds csrc/simulator/conformance.cu for the simulator; for the GPU it is built
here.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from needs import need
from test_simulator import ROOT, built
from torch import Tensor

from calm_rt import reference

WORDS, THREADS, WARP = 4096, 128, 32
SECTIONS = {  # in the order of the program's output, in multiples of WORDS
    "narrow_bfloat16": 1,
    "narrow_half": 1,
    "widen_bfloat16": 1,
    "widen_half": 1,
    "max_nan": 1,
    "packs": 1,
    "single_elements": 1,
    "widen_pairs": 2,
    "warp_sum": 1,
    "warp_max": 1,
    "block_sum": 1,
    "block_max": 1,
    "warp_sum_many": 1,
    "ballot": 1,
    "shuffle": 1,
    "philox": 4,
    "uniforms": 4,
    "normals": 4,
    "matrices": 1,
    "products": 1,
    "tamed": 1,
    "box": 1,
    "box_products": 4,
}
NARROW = {"narrow_bfloat16": torch.bfloat16, "narrow_half": torch.float16}
SUM_ROUNDING = 16 * 1.5e-7  # of sixteen products and the sum before, as the kernels count with
HOMES = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
PLACES = [f"{home}/bin" for home in HOMES if home]  # where CMake looks after PATH
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(PLACES))


def run(program: Path, folder: Path, words: Tensor) -> dict[str, Tensor]:
    """The program's sections, int32."""
    given, made = folder / "words", folder / f"{program.name}.out"
    given.write_bytes(words.numpy().tobytes())
    subprocess.run([program, given, made], check=True)
    out = torch.frombuffer(bytearray(made.read_bytes()), dtype=torch.int32)
    parts = out.split([count * WORDS for count in SECTIONS.values()])
    return dict(zip(SECTIONS, parts, strict=True))


def compile_for_device(output: Path, *options: str) -> None:
    source = ROOT / "csrc" / "simulator" / "conformance.cu"
    command = [NVCC, "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", *options, source, "-o", output]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def words() -> Tensor:
    """Random bits, and every kind of special value in both halves."""
    generator = torch.Generator().manual_seed(7)
    random = torch.randint(-(2**31), 2**31, (WORDS,), generator=generator).int()
    special = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        1e-40,
        65520.0,
        3.4e38,
        -1.0,
        1.00390625,
    ]
    random[:10] = torch.tensor(special).view(torch.int32)
    random[16:26] = random[:10] >> 16  # as 16-bit numbers
    return random


@pytest.fixture(scope="module")
def simulated(words: Tensor, tmp_path_factory) -> dict[str, Tensor]:
    return run(built("simulator_conformance"), tmp_path_factory.mktemp("simulator"), words)


def halves(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Two 16-bit numbers a word, the lower first."""
    return words.view(dtype)


def assert_same(bits: Tensor, expected: Tensor) -> None:
    """The same bits, where any NaN is as good as another."""
    got = bits.view(expected.dtype)[: expected.numel()].view_as(expected)
    nan = expected.isnan()
    integer = {4: torch.int32, 2: torch.int16}[expected.itemsize]
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(integer)[~nan], expected.view(integer)[~nan])


def assert_same_values(bits: Tensor, expected: Tensor) -> None:
    """The same where zeros of both signs are equal: no kernel cares which of them is larger."""
    assert_same(bits.view(expected.dtype) + 0.0, expected + 0.0)


def test_conversions(simulated, words: Tensor) -> None:
    floats, low = words.view(torch.float32), words.short()
    for name, dtype in (("bfloat16", torch.bfloat16), ("half", torch.float16)):
        assert_same(simulated[f"narrow_{name}"].short(), floats.to(dtype))
        assert_same(simulated[f"widen_{name}"], low.view(dtype).float())
    swapped = floats.view(-1, 2).flip(1).flatten()
    assert_same_values(simulated["max_nan"], torch.maximum(floats, swapped))


def test_consecutive_elements(simulated, words: Tensor) -> None:
    brief = halves(words, torch.bfloat16)
    assert_same(simulated["packs"], brief)
    shorter = brief.view(-1, 8).clone()
    shorter[:, 5:] = 0
    assert_same(simulated["single_elements"], shorter.flatten())
    assert_same(simulated["widen_pairs"], brief.float())


def test_reductions(simulated, words: Tensor) -> None:
    def fraction(words: Tensor) -> Tensor:
        return (words.long() & 0xFFFFFFFF).bitwise_right_shift(8).double() * 2**-24 - 0.5

    exact = fraction(words)
    warps, blocks = exact.view(-1, WARP), exact.view(-1, THREADS)
    for name, groups in (("warp", warps), ("block", blocks)):
        size = groups.shape[1]
        maximum = groups.amax(1, keepdim=True).expand(-1, size).float().flatten()
        assert_same(simulated[f"{name}_max"], maximum)
        total = simulated[f"{name}_sum"].view(torch.float32).double().view(-1, size)
        assert (total == total[:, :1]).all()
        rounding = size * 2**-24 * groups.abs().sum(1)
        assert ((total[:, 0] - groups.sum(1)).abs() <= rounding).all()
    many = torch.stack([fraction((words.long() * (2 * k + 1)).int()) for k in range(8)])
    sums = many.view(8, -1, WARP).sum(-1).T.repeat_interleave(WARP // 8, dim=1)
    got = simulated["warp_sum_many"].view(torch.float32).double().view_as(sums)
    assert ((got - sums).abs() <= WARP * 2**-24 * WARP / 2).all()
    positive = (warps > 0).long() << torch.arange(WARP)
    assert_equal_words(simulated["ballot"], positive.sum(1, keepdim=True).expand(-1, WARP))
    lanes, rows = torch.arange(WARP), words.long().view(-1, WARP)
    down = torch.where(lanes + 3 < WARP, lanes + 3, lanes)
    assert_equal_words(simulated["shuffle"], rows[:, down] + rows[:, lanes * 5 % WARP])


def philox_words(words: Tensor) -> Tensor:
    """Four words of each word's counter and key, [WORDS, 4] int64."""
    unsigned, place = words.long() & 0xFFFFFFFF, torch.arange(WORDS)
    *counter, low, high = (unsigned[place ^ k] for k in range(6))
    return torch.stack(reference.philox(counter, high << 32 | low), -1)


def check_normals(bits: Tensor, words: Tensor) -> None:
    """Box-Muller in double, by pairs of words; the bound that all devices share."""
    first, second = philox_words(words).bitwise_right_shift(8).double().view(-1, 2).unbind(-1)
    radius = (-2 * torch.log(first * 2**-24 + 2**-24)).sqrt()
    angle = 2 * torch.pi * second * 2**-24
    exact = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    error = (bits.view(torch.float32).double().view_as(exact) - exact).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * radius[:, None]).all()


def test_random_numbers(simulated, words: Tensor) -> None:
    expected = philox_words(words).flatten()
    assert_equal_words(simulated["philox"], expected)
    assert_same(simulated["uniforms"], (expected >> 8).float() * 2**-24)
    check_normals(simulated["normals"], words)


def assert_equal_words(words: Tensor, expected: Tensor) -> None:
    assert torch.equal(words.long() & 0xFFFFFFFF, (expected & 0xFFFFFFFF).flatten())


def test_matrices_arrive_as_the_manual_draws_them(simulated, words: Tensor) -> None:
    """Lane l has of each 8 x 8 matrix row l / 4, columns 2 (l % 4) and the next."""
    rows = words.view(-1, WARP, 4).clone()
    rows[:, ::5] = 0  # what was not wanted
    lanes = torch.arange(WARP)
    expected = torch.stack([rows[:, 8 * m + lanes // 4, lanes % 4] for m in range(4)], -1)
    assert torch.equal(simulated["matrices"].view_as(expected), expected)


def product_operands(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[W, 16, 16], [W, 16, 8] and [W, 16, 8] as the warps' lanes hold them, in float64."""

    def tame(words: Tensor) -> Tensor:
        bits = (words & 0x807F807F) | (((words >> 7 & 0x00070007) + 0x007C007C) << 7)
        return halves(bits.int(), torch.bfloat16).double().view(*words.shape, 2)

    unsigned = (words.long() & 0xFFFFFFFF).view(-1, WARP, 4)
    row, column = torch.arange(WARP) // 4, torch.arange(WARP) % 4 * 2
    a, b, sums = (torch.zeros(len(unsigned), 16, n, dtype=torch.float64) for n in (16, 8, 8))
    for k in range(4):
        for half in range(2):
            a[:, row + k % 2 * 8, column + half + k // 2 * 8] = tame(unsigned[..., k])[..., half]
        added = unsigned[..., (k + 1) % 4].bitwise_right_shift(8).double() * 2**-24 - 0.5
        sums[:, row + k // 2 * 8, column + k % 2] = added
    for k in range(2):
        for half in range(2):
            values = tame(unsigned[..., k] * 3 & 0xFFFFFFFF)[..., half]
            b[:, column + half + k * 8, row] = values
    return a, b, sums


def check_products(bits: Tensor, words: Tensor) -> None:
    a, b, sums = product_operands(words)
    exact, magnitude = sums + a @ b, sums.abs() + a.abs() @ b.abs()
    row, column = torch.arange(WARP) // 4, torch.arange(WARP) % 4 * 2
    got = bits.view(torch.float32).double().view(-1, WARP, 4)
    for k in range(4):
        place = (slice(None), row + k // 2 * 8, column + k % 2)
        assert ((got[..., k] - exact[place]).abs() <= SUM_ROUNDING * magnitude[place]).all()


def test_products_are_within_what_the_kernels_allow(simulated, words: Tensor) -> None:
    check_products(simulated["products"], words)


def box(tamed: Tensor) -> Tensor:
    """[128, 64]: rows from 40 on and columns from 16 on of the matrix of words, zeros beyond it."""
    matrix = halves(tamed, torch.bfloat16).view(128, 64)
    return torch.nn.functional.pad(matrix[40:, 16:], (0, 16, 0, 40))


def test_boxes_arrive_as_the_manual_draws_them(simulated) -> None:
    """Pack c of row r, 16 bytes, lies at place c ^ (r % 8) of the row's 128 bytes."""
    rows = torch.arange(128).view(-1, 1)
    packs = halves(simulated["box"], torch.int16).view(128, 8, 8)
    unswizzled = packs[rows, torch.arange(8) ^ rows % 8]
    assert torch.equal(unswizzled.reshape(128, 64), box(simulated["tamed"]).view(torch.int16))


def check_box_products(bits: Tensor, tamed: Tensor) -> None:
    """Warp w has rows 16 w to 16 w + 15, and of 16 x 8 tiles what it has of a warp's product."""
    matrix = halves(tamed, torch.bfloat16).view(128, 64).double()
    a = box(tamed)[8:72].double()
    b = torch.nn.functional.pad(matrix, (0, 0, 0, 128))  # [256, 64]
    exact, magnitude = a @ b.T, a.abs() @ b.abs().T
    thread = torch.arange(128).view(-1, 1)
    index = torch.arange(128)
    row = thread // WARP * 16 + thread % WARP // 4 + index // 2 % 2 * 8
    column = index // 4 * 8 + thread % 4 * 2 + index % 2
    got = bits.view(torch.float32).double().view(128, 128)
    assert magnitude[:, :128].min() > 0
    assert ((got - exact[row, column]).abs() <= 4 * SUM_ROUNDING * magnitude[row, column]).all()


def test_products_of_boxes_are_within_what_the_kernels_allow(simulated) -> None:
    check_box_products(simulated["box_products"], simulated["tamed"])


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_device_program_compiles(architecture: str, tmp_path: Path) -> None:
    need(NVCC, "nvcc is neither on PATH nor in CUDA_HOME")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    compile_for_device(tmp_path / "conformance.o", "-c", "-gencode", target)


def check_section(
    name: str, device: dict[str, Tensor], simulated: dict[str, Tensor], words: Tensor
) -> None:
    """Equal bits; what rounds in another way on a device is held to its bound."""
    bits, expected = device[name], simulated[name]
    if name == "products":
        check_products(bits, words)
    elif name == "normals":
        check_normals(bits, words)
    elif name == "box_products":
        check_box_products(bits, device["tamed"])
    elif name == "max_nan":
        assert_same_values(bits, expected.view(torch.float32))
    elif name in ("ballot", "shuffle", "philox", "matrices", "tamed", "box"):
        assert torch.equal(bits, expected)
    elif name in NARROW:
        assert_same(bits.short(), expected.short().view(NARROW[name]))
    elif name in ("packs", "single_elements"):
        assert_same(bits, halves(expected, torch.bfloat16))
    else:
        assert_same(bits, expected.view(torch.float32))


def mismatches(
    device: dict[str, Tensor], simulated: dict[str, Tensor], words: Tensor, sections: Iterable[str]
) -> list[str]:
    """All sections that are wrong on a device, each with the first words that differ."""
    wrong = []
    for name in sections:
        try:
            check_section(name, device, simulated, words)
        except AssertionError:
            got, expected = (
                [f"{word & 0xFFFFFFFF:08x}" for word in of[name].tolist()]
                for of in (device, simulated)
            )
            places = [i for i in range(len(got)) if got[i] != expected[i]]
            some = ", ".join(f"{i}: {got[i]} for {expected[i]}" for i in places[:4])
            wrong.append(f"{name}: {len(places)} of {len(got)} words differ ({some})")
    return wrong


def test_every_wrong_section_is_named(simulated, words: Tensor) -> None:
    """And zeros of either sign are equal where the larger of two is chosen."""
    device = {name: bits.clone() for name, bits in simulated.items()}
    zeros = simulated["max_nan"].view(torch.float32) == 0
    assert zeros.any()
    device["max_nan"][zeros] ^= -(2**31)
    assert mismatches(device, simulated, words, SECTIONS) == []
    for name in ("widen_half", "philox", "box_products"):
        device[name][5] ^= 1 << 22
    wrong = mismatches(device, simulated, words, SECTIONS)
    assert [line.split(":")[0] for line in wrong] == ["widen_half", "philox", "box_products"]
    assert all(" 1 of " in line and "(5: " in line for line in wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_device_equals_the_simulator(simulated, words: Tensor, tmp_path: Path) -> None:
    need(NVCC, "nvcc is neither on PATH nor in CUDA_HOME")
    program = tmp_path / "conformance"
    major, minor = torch.cuda.get_device_capability()
    name = f"{major}{minor}" + ("a" if major == 9 else "")
    target = f"arch=compute_{name},code=sm_{name}"
    compile_for_device(program, "-gencode", target, "-cudart=static")
    device = run(program, tmp_path, words)
    boxes = {"box", "box_products"} if (major, minor) != (9, 0) else set()  # not made there
    wrong = mismatches(device, simulated, words, [name for name in SECTIONS if name not in boxes])
    assert not wrong, "\n".join(wrong)
