"""Build the extension with CMake; without a C++ compiler the package installs and runs on the
reference, and with CALM_RT_PURE=1 a wheel of Python alone is made for any platform."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PURE = os.environ.get("CALM_RT_PURE") == "1"


class CMakeBuild(build_ext):
    def run(self):
        cuda = os.environ.get("CALM_RT_CUDA", "AUTO")
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]  # may have flags or a launcher
        if shutil.which(compiler[0]) is None:
            if cuda == "ON":
                sys.exit(f"calm_rt: CALM_RT_CUDA=ON, but there is no C++ compiler {compiler[0]}")
            print("calm_rt: no C++ compiler, installing the pure-Python package", file=sys.stderr)
            return
        if missing := [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]:
            sys.exit(f"calm_rt: building needs {' and '.join(missing)}: pip install cmake ninja")
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = (
            subprocess.run(git, capture_output=True, text=True).stdout.strip()
            if (ROOT / ".git").exists() and shutil.which("git")
            else ""  # unpacked from an archive, perhaps inside another repository
        )
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": shutil.which(
                "ninja"
            ),  # a path cached by an isolated build is gone the next time
            "Python_EXECUTABLE": sys.executable,
            "CALM_RT_CUDA": cuda,
            "CALM_RT_COMMIT": commit or "unknown",
        }
        flags = [f"-D{key}={value}" for key, value in options.items()] + shlex.split(
            os.environ.get("CMAKE_ARGS", "")
        )
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags])
        subprocess.check_call(["cmake", "--build", str(build)])
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(target)])


setup(
    ext_modules=[] if PURE else [Extension("calm_rt._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={} if PURE else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
