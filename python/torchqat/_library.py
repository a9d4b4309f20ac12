"""Finds libtorchqat.so, checks that this torch is the one it was built against, and loads it."""

import json
import os
from pathlib import Path
from typing import Any

import torch

_REBUILD = "Rebuild torchqat against the installed torch (pip install --no-build-isolation <its checkout>)"


def _find() -> Path:
    """The file that the environment variable TORCHQAT_LIBRARY names, else the one beside this package."""
    named = os.environ.get("TORCHQAT_LIBRARY")
    path = Path(named) if named else Path(__file__).parent / "lib" / "libtorchqat.so"
    if path.is_file():
        return path.resolve()
    origin = "TORCHQAT_LIBRARY names a file that is not there" if named else "the library has not been built"
    raise ImportError(f"torchqat: {origin}: {path}. Run `make build` in the checkout, or pip install it.")


def _facts(library: Path) -> dict[str, Any]:
    """What CMake wrote down beside the library when it built it."""
    path = library.with_suffix(".json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ImportError(f"torchqat: cannot read the build facts {path} ({error}). {_REBUILD}.") from error


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def check_torch(built: dict[str, Any], torch_version: str, torch_cuda: str | None) -> None:
    """Raises a readable ImportError where the dynamic linker would speak of undefined symbols."""
    if _minor(built["torch"]) != _minor(torch_version):
        raise ImportError(
            f"torchqat {built['torchqat']} was built against torch {built['torch']}, but torch "
            f"{torch_version} is installed. {_REBUILD}, or install torch {'.'.join(_minor(built['torch']))}."
        )
    if built["cuda"] and (not torch_cuda or built["cuda"].split(".")[0] != torch_cuda.split(".")[0]):
        runs_on = f"for CUDA {torch_cuda}" if torch_cuda else "a CPU-only build"
        raise ImportError(
            f"torchqat {built['torchqat']} was built with CUDA {built['cuda']} against torch "
            f"{built['torch']}, but the installed torch {torch_version} is {runs_on}. {_REBUILD}."
        )


def _mark_compile_caches(library: Path) -> None:
    """torch.compile keeps graphs from process to process, by keys that do not know our operators: a graph
    made with another build of the library would call operators that have changed. The keys get the time of
    this build."""
    config = torch.compiler.config
    config.cache_key_tag = f"{config.cache_key_tag} torchqat {library.stat().st_mtime_ns}".lstrip()


def cmake_prefix_path(facts: dict[str, Any]) -> str:
    """Where CMake finds the library (a build folder, or the prefix of an installation) and its torch."""
    folder = Path(facts["library"]).parent
    built_here = (folder / "TorchQATConfig.cmake").is_file()
    return f"{folder if built_here else folder.parent};{torch.utils.cmake_prefix_path}"


def load() -> dict[str, Any]:
    """Loads the library and returns its build facts."""
    library = _find()
    facts = _facts(library)
    check_torch(facts, torch.__version__, torch.version.cuda)
    torch.ops.load_library(str(library))
    _mark_compile_caches(library)
    return {**facts, "library": str(library)}
