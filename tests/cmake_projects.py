"""What tests share that build C++ projects outside the tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torchqat

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
CMAKE = shutil.which("cmake", path=PATH)
CXX = os.environ.get("CXX", "c++")


def missing(what):
    """Skips a test that lacks something; a failure where all tests must run, in .ci/run."""
    (pytest.fail if os.environ.get("TORCHQAT_REQUIRE_ALL") else pytest.skip)(what)


def run(*command, fails=False, **environment):
    """What the command prints, in one line; it must succeed, or fail where that is expected."""
    environment = {**os.environ, "PATH": PATH, **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = " ".join((result.stdout + result.stderr).split())
    assert (result.returncode != 0) == fails, output
    return output


def folder_of_build():
    """Where the library under test was built: the folder that it lies in, or `build` of this checkout."""
    library = Path(torchqat.build_info()["library"])
    for place in (library.parent, ROOT / "build"):
        facts, mine = place / "libtorchqat.json", library.with_suffix(".json")
        if (place / "CMakeCache.txt").is_file() and facts.is_file() and facts.read_text() == mine.read_text():
            return place
    missing("the folder that this library was built in is not here")


def configure(build, *options, source=ROOT / "tests/consumer", **kwargs):
    """Configures a project in a folder, on a machine that has no CUDA toolkit."""
    hidden = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("CUDA", "CUDAToolkit")]
    if shutil.which("ccache"):
        hidden.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    return run(CMAKE, "-S", source, "-B", build, *hidden, *options, **kwargs)


def compile_project(build, *targets):
    only = ["--target", *targets] if targets else []
    run(CMAKE, "--build", build, "--parallel", "2", *only, CCACHE_BASEDIR=str(build.parent))
