"""Lays the extension's sources out as kernel-builder of Hugging Face's `kernels` expects them.

    python packaging/export_kernels.py FOLDER

The folder holds build.toml, the sources as they are, the binding with torch's stable ABI, and a
Python package with the ops as the extension registers them: no gradients, checks or reference, for
which there is calm_rt itself. CPU kernels are compiled once per instruction set, so each set has a
folder of one-line files with flags of its own.
"""

import re
import shutil
import sys
from pathlib import Path

import calm_rt

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {  # as in CMakeLists.txt
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni "
    "-mprefer-vector-width=512".split(),
}
COMMON = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
BINDING = """\
#define CALM_RT_CUDA
#define TORCH_TARGET_VERSION 0x020b000000000000
#include "../csrc/ops.cpp"
"""
BUILD_INFO = 'inline constexpr const char kBuildInfo[] = "commit=exported\\nversion={}\\n";\n'
PACKAGE = '''\
"""The kernels of calm_rt {} as torch ops; the schemas stand in csrc/ops.cpp."""

from ._ops import ops

__all__ = ["ops"]
'''


def export(folder: Path) -> None:
    """Writes the layout into a folder that does not exist yet."""
    source = folder / "csrc"
    ignore = shutil.ignore_patterns("simulator", "host.cpp")
    shutil.copytree(ROOT / "csrc", source, ignore=ignore)
    binding = source / "ops.cpp"
    # two versions of a kernel may be loaded at once: the namespace is the builder's
    text = binding.read_text()
    text = re.sub(r"(STABLE_TORCH_LIBRARY\w*)\(calm_rt,", r"\1(TORCH_EXTENSION_NAME,", text)
    binding.write_text(text)
    (source / "build_info.h").write_text(BUILD_INFO.format(calm_rt.__version__))
    (folder / "torch-ext" / "calm_rt").mkdir(parents=True)
    (folder / "torch-ext" / "torch_binding.cpp").write_text(BINDING)
    package = folder / "torch-ext" / "calm_rt" / "__init__.py"
    package.write_text(PACKAGE.format(calm_rt.__version__))
    for isa in FLAGS:
        (folder / f"cpu_{isa}").mkdir()
        for path in sorted((source / "kernels" / "cpu").glob("*.cpp")):
            line = f'#include "../csrc/kernels/cpu/{path.name}"\n'
            (folder / f"cpu_{isa}" / path.name).write_text(line)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    (folder / "build.toml").write_text(_build_file(folder))


def _build_file(folder: Path) -> str:
    files = {kind: _sources(folder, f"cpu_{kind}", "cpp") for kind in FLAGS}
    parts = [
        "[general]",
        'name = "calm-rt"',
        "version = 1",
        'license = "MIT"',
        'backends = ["cpu", "cuda"]',
        "\n[torch]",
        _list("src", ["torch-ext/torch_binding.cpp"]),
        _list("include", [".", "csrc"]),
        "\n[torch.stable-abi]",
        'cpu = "2.11"',
        'cuda = "2.11"',
    ]
    for isa, flags in FLAGS.items():
        defines = [f"-DCALM_ISA={isa}", f"-DCALM_ISA_{isa.upper()}"]
        parts += [f"\n[kernel.cpu_{isa}]", 'backend = "cpu"', 'depends = ["torch"]']
        parts += [_list("include", ["csrc"]), _list("cxx-flags", [*COMMON, *flags, *defines])]
        extra = ["csrc/common/isa.cpp"] if isa == "portable" else []
        parts.append(_list("src", files[isa] + extra))
    parts += ["\n[kernel.cuda]", 'backend = "cuda"', 'depends = ["torch"]']
    parts += [_list("cuda-capabilities", ["8.0", "9.0", "10.0"]), _list("include", ["csrc"])]
    parts.append(_list("src", _sources(folder, "csrc/kernels/cuda", "cu")))
    return "\n".join(parts) + "\n"


def _sources(folder: Path, part: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in (folder / part).glob(f"*.{suffix}"))


def _list(name: str, values: list[str]) -> str:
    return f"{name} = [{', '.join(repr(value).replace(chr(39), chr(34)) for value in values)}]"


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python packaging/export_kernels.py FOLDER, one that does not exist yet")
    export(Path(sys.argv[1]))
