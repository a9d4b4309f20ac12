"""Loops written in C++, built with the package of the library that is measured."""

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torchqat
from harness import Absent

SOURCE = Path(__file__).parent / "cpp"
BUILD = SOURCE.parents[1] / "build-benchmarks"


def load(name):
    """The library `name` of the project in SOURCE, in this process. Absent without CMake or a compiler."""
    loaded = build(name)
    if isinstance(loaded, Exception):
        raise loaded
    return loaded


@cache
def build(name):
    """Tries it once, however many contenders ask; returns the library, or what went wrong."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for tool in ("cmake", os.environ.get("CXX", "c++")):
        if not shutil.which(tool, path=path):
            return Absent(f"{tool} is not installed")
    prefix = f"-DCMAKE_PREFIX_PATH={torchqat.cmake_prefix_path}"
    configure = ["--fresh", "-S", str(SOURCE), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release", prefix]
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # benchmarks may run side by side
        for arguments in configure, ["--build", str(BUILD), "--target", name]:
            command = [shutil.which("cmake", path=path), *arguments]
            environment = {**os.environ, "PATH": path}
            finished = subprocess.run(command, env=environment, capture_output=True, text=True)
            if finished.returncode:
                return RuntimeError(f"cmake: {(finished.stderr or finished.stdout).strip()}")
        return ctypes.CDLL(str(BUILD / f"lib{name}.so"))
