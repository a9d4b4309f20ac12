"""Quantization-aware training with very few bits: operators, modules and an optimizer for PyTorch."""

from typing import Any

import torch

from torchqat import _library

_BUILD = _library.load()

from torchqat import _vmap, distill, functional, nn, optim  # noqa: E402, F401  (they need the operators)
from torchqat.calibrate import calibrate  # noqa: E402
from torchqat.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from torchqat.memory_report import MemoryReport, memory_report  # noqa: E402
from torchqat.prepare import prepare  # noqa: E402

__version__: str = _BUILD["torchqat"]

#: What to give CMake as CMAKE_PREFIX_PATH, for find_package(TorchQAT) in a C++ project: a list, separated by
#: a semicolon, of where torchqat and torch are. ``python -m torchqat --cmake-prefix-path`` prints it.
cmake_prefix_path: str = _library.cmake_prefix_path(_BUILD)


def build_info() -> dict[str, Any]:
    """What this torchqat was built from.

    Returns:
        dict: ``torchqat``, ``torch`` and ``compiler`` (versions), ``cuda`` (version of the CUDA toolkit,
        ``None`` for a CPU-only build), ``cuda_architectures`` (list of names), ``commit`` (``None`` where it
        was not built from a git checkout), ``cpu_capability`` (the instruction set that its kernels choose
        here: ``DEFAULT``, ``AVX2`` or ``AVX512``), ``library`` (path of the shared library).

    Example:
        >>> import torchqat
        >>> torchqat.build_info()["torchqat"] == torchqat.__version__
        True
    """
    return {**_BUILD, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


__all__ = [
    "MemoryReport",
    "__version__",
    "build_info",
    "calibrate",
    "cmake_prefix_path",
    "distill",
    "functional",
    "load_checkpoint",
    "memory_report",
    "nn",
    "optim",
    "prepare",
    "save_checkpoint",
]
