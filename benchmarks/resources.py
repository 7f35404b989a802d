"""What every CUDA kernel of the built extension takes of a multiprocessor, from its machine code.

    python benchmarks/resources.py

A Markdown table: registers a thread, bytes of static shared memory a block, and bytes of stack and
local memory a thread, which should be none, for each architecture. Needs no GPU. What a launch asks
for beside that the code does not say: the rings of the bound_groups kernels, 48 to 193 KiB.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from calm_rt.ops.check import check


class Kernel(NamedTuple):
    """One kernel's machine code for one architecture.

    symbol: its mangled name.  file: stem of its source.
    """

    file: str
    symbol: str
    architecture: str
    registers: int
    stack: int
    shared: int
    local: int


def extension() -> Path:
    """The extension that Python would load."""
    spec = importlib.util.find_spec("calm_rt._C")
    check(spec is not None, "extension", "calm_rt._C to be built", "none")
    return Path(spec.origin)


def find_cuobjdump() -> str | None:
    """On PATH, or of the package nvidia-cuda-cuobjdump."""
    path = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        path = path or next(map(str, sorted(Path(folder).glob("*/bin/cuobjdump"))), None)
    return path


def dump(*options: str) -> str:
    """What cuobjdump says of the extension."""
    command = [find_cuobjdump(), *options, extension()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels() -> list[Kernel]:
    """Every kernel for every architecture; none for an extension without CUDA."""
    found, architecture, file = [], "", ""
    usage = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    symbol = ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"identifier = (.*)", line):
            file = Path(match[1]).stem
        elif match := re.match(r" Function (\S+):", line):
            symbol = match[1]
        elif match := usage.search(line):
            found.append(Kernel(file, symbol, architecture, *map(int, match.groups())))
    return found


def readable(symbols: list[str]) -> list[str]:
    """Names as in the source, without their parameters, where binutils are there."""
    if shutil.which("c++filt") is None:
        return symbols
    given = "\n".join(symbols)
    names = subprocess.run(["c++filt"], input=given, capture_output=True, text=True).stdout
    shown = []
    for name in names.splitlines():
        name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        shown.append(re.sub(r"\((int|bool)\)", "", name).split("(")[0].replace("calm_rt::", ""))
    return shown


def table() -> str:
    lines = [
        "| file | kernel | architecture | registers | static shared | stack | local |",
        "|---|---|---|---|---|---|---|",
    ]
    every = kernels()
    for kernel, name in zip(every, readable([k.symbol for k in every]), strict=True):
        cells = [kernel.file, name, kernel.architecture, kernel.registers, kernel.shared]
        lines.append(f"| {' | '.join(map(str, [*cells, kernel.stack, kernel.local]))} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if find_cuobjdump() is None:
        sys.exit("resources: cuobjdump is missing; pip install nvidia-cuda-cuobjdump")
    print(table())


if __name__ == "__main__":
    from json_rows import run  # beside this script; its tests load it from elsewhere

    run(main)
