"""Drives CMake, the only description of the build, and pins the torch that the library was built against."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Without build isolation nobody else compares them.
NEEDED, LIMIT = re.search(r"setuptools>=([\d.]+),<(\d+)", (ROOT / "pyproject.toml").read_text()).groups()
if [int(n) for n in re.findall(r"\d+", setuptools.__version__)[:3]] < [int(n) for n in NEEDED.split(".")]:
    sys.exit(
        f"torchqat: setuptools must be {NEEDED} or newer and older than {LIMIT}, "
        f"found {setuptools.__version__}; pip install 'setuptools>={NEEDED},<{LIMIT}' and try again"
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402 (setuptools below 70.1 has none)

OPTIONS = ("TORCHQAT_CUDA", "TORCHQAT_CUDA_ARCHITECTURES")


class CMakeBuild(build_ext):
    """Builds the library and installs it (with its headers and its CMake package) into the Python package."""

    def run(self) -> None:
        build = Path(os.environ.get("TORCHQAT_BUILD_DIR", ROOT / "build")).resolve()
        package = (ROOT / "python" if self.inplace else Path(self.build_lib).resolve()) / "torchqat"
        options = [f"-D{name}={os.environ[name]}" for name in OPTIONS if name in os.environ]
        options += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCHQAT_ABSOLUTE_RPATH={'ON' if self.inplace else 'OFF'}",
            "-DCMAKE_INSTALL_LIBDIR=lib",
        ]
        jobs = os.environ.get("TORCHQAT_JOBS", str(os.cpu_count()))
        self.cmake("-S", ROOT, "-B", build, "-G", "Ninja", *options)
        self.cmake("--build", build, "--target", "torchqat_python", "--parallel", jobs)
        self.cmake("--install", build, "--prefix", package)
        self.cmake("--install", build, "--prefix", package, "--component", "python")

    @staticmethod
    def cmake(*arguments: str | Path) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        program = shutil.which("cmake", path=path)
        if not program:
            sys.exit("torchqat: cmake is missing; install it (pip install cmake ninja) and try again")
        command = [program, *map(str, arguments)]
        if code := subprocess.run(command, env={**os.environ, "PATH": path}).returncode:
            sys.exit(f"torchqat: the build failed, its messages are above: {shlex.join(command)} gave {code}")


class PlatformWheel(bdist_wheel):
    """The library has no Python in it, so one wheel serves every Python of the platform.

    torchqat._bindings, which nothing needs, is there for the one Python that the wheel was built with.
    """

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


def torch_requirement() -> str:
    """The minor release of the torch that is here, whose C++ ABI the library is bound to."""
    try:
        major, minor = importlib.metadata.version("torch").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return "torch>=2.11,<2.16"
    return f"torch=={major}.{minor}.*"


setup(
    version=re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text())[1],
    install_requires=[torch_requirement()],
    ext_modules=[Extension("torchqat.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
