"""Lays the extension's sources out as kernel-builder of Hugging Face's `kernels` expects them.

    python packaging/export_kernels.py FOLDER

The folder holds build.toml (its edition 5), the sources, the binding on torch's stable ABI, and a
Python package with the ops as the extension registers them: no gradients, checks or reference, for
which there is calm_rt itself. kernel-builder makes one library a backend: the CPU's ops are in one
and those of CUDA in the other. CPU kernels are compiled once per instruction set, so each set has a
folder of one-line files with flags of its own.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import calm_rt

ROOT = Path(__file__).resolve().parents[1]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]
FLAGS = {  # as in CMakeLists.txt
    "portable": [],
    "avx2": AVX2,
    "avx512": [*AVX2, *AVX512, "-mprefer-vector-width=512"],
}
STANDARD = "-std=c++20"  # the builder takes C++17 for torch 2.11
COMMON = [STANDARD, "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
CAPABILITIES = ["8.0+PTX", "9.0a", "10.0"]  # as in CMakeLists.txt
BINDING = """\
#ifdef CUDA_KERNEL
#define CALM_RT_CUDA
#endif
#include "registration.h"  // of kernel-builder
#include "../csrc/ops.cpp"
"""
BUILD_INFO = 'inline constexpr const char kBuildInfo[] = "commit=exported\\nversion={}\\n";\n'
PACKAGE = '''\
"""The kernels of calm_rt {} as torch ops; the schemas stand in csrc/ops.cpp."""

from ._ops import ops

__all__ = ["ops"]
'''
FLAKE = """\
{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""


def export(folder: Path) -> None:
    """Writes the layout into a folder that does not exist yet."""
    source = folder / "csrc"
    ignore = shutil.ignore_patterns("simulator", "host.cpp")
    shutil.copytree(ROOT / "csrc", source, ignore=ignore)
    binding = source / "ops.cpp"
    binding.write_text(_for_the_builder(binding.read_text()))
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
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "build.toml").write_text(_build_file(folder))


def _for_the_builder(text: str) -> str:
    """ops.cpp with the builder's names and its macros for them; the CPU's ops in its library alone.

    Two versions of a kernel may be loaded at once, so the builder names namespace and module.
    """
    text, names = re.subn(
        r"(STABLE_TORCH_LIBRARY(?:_IMPL)?)\(calm_rt,", r"\1_EXPAND(TORCH_EXTENSION_NAME,", text
    )
    block = r"STABLE_TORCH_LIBRARY_IMPL_EXPAND\(TORCH_EXTENSION_NAME, CPU, m\) \{.*?\n\}\n"
    text, blocks = re.subn(block, r"#ifdef CPU_KERNEL\n\g<0>#endif\n", text, flags=re.DOTALL)
    module = r'extern "C" [^\n]* PyInit__C\(\) \{.*?\n\}\n'
    text, modules = re.subn(
        module, "REGISTER_EXTENSION(TORCH_EXTENSION_NAME)\n", text, flags=re.DOTALL
    )
    if (names, blocks, modules) != (4, 1, 1):
        raise RuntimeError("csrc/ops.cpp has changed its shape: see _for_the_builder")
    return text


def _build_file(folder: Path) -> str:
    general = {"name": "calm-rt", "version": 1, "edition": 5, "license": "MIT"}
    binding = ["torch-ext/torch_binding.cpp", "csrc/common/isa.cpp"]
    parts = [
        _table("general", **general, backends=["cpu", "cuda"]),
        _table("torch", src=binding, include=["csrc"], cxx_flags=[STANDARD]),
        _table("torch.stable-abi", cpu="2.11", cuda="2.11"),
    ]
    for isa, flags in FLAGS.items():
        defines = [f"-DCALM_ISA={isa}", f"-DCALM_ISA_{isa.upper()}"]
        parts.append(
            _table(
                f"kernel.cpu_{isa}",
                backend="cpu",
                depends=["torch"],
                include=["csrc"],
                cxx_flags=[*COMMON, *flags, *defines],
                src=_sources(folder, f"cpu_{isa}", "cpp"),
            )
        )
    parts.append(
        _table(
            "kernel.cuda",
            backend="cuda",
            depends=["torch"],
            include=["csrc"],
            cuda_capabilities=CAPABILITIES,
            cuda_flags=[STANDARD],
            src=_sources(folder, "csrc/kernels/cuda", "cu"),
        )
    )
    return "\n".join(parts)


def _sources(folder: Path, part: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in (folder / part).glob(f"*.{suffix}"))


def _table(title: str, **entries: str | int | list[str]) -> str:
    """A table of TOML; strings, numbers and lists are written there as in JSON."""
    lines = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in entries.items()]
    return "\n".join([f"[{title}]", *lines, ""])


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python packaging/export_kernels.py FOLDER, one that does not exist yet")
    export(Path(sys.argv[1]))
