"""Registers, shared memory and spills of every CUDA kernel, as ptxas told them when it was compiled.

    python scripts/kernel_resources.py record COMPILER ARGUMENT...   compiles, keeps what ptxas says
    python scripts/kernel_resources.py report FOLDER                 prints what is kept in FOLDER

CMake uses the first as the compiler launcher of nvcc (with --resource-usage) and the second after linking.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".resources.txt"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0


def record(command: list[str]) -> int:
    """Runs the compiler; its ptxas lines go to a file, everything else to stderr as usual."""
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    info, rest = [], []
    for line in result.stderr.splitlines(keepends=True):
        (info if line.startswith("ptxas info") or SPILLS.search(line) else rest).append(line)
    sys.stderr.write("".join(rest))
    if result.returncode == 0 and info and "-o" in command:
        Path(command[command.index("-o") + 1] + SUFFIX).write_text("".join(info))
    return result.returncode


def parse(text: str) -> list[Kernel]:
    kernels = []
    for line in text.splitlines():
        if match := ENTRY.search(line):
            kernels.append(Kernel(name=match[1], arch=match[2]))
        elif kernels and (match := SPILLS.search(line)):
            kernels[-1].stack = int(match[1])
            kernels[-1].spilled = int(match[2]) + int(match[3])
        elif kernels and (match := USED.search(line)):
            kernels[-1].registers = int(match[1])
            kernels[-1].shared = int(match[2] or 0)
    return kernels


def short_name(demangled: str) -> str:
    """Template name and arguments, without result type, parameters and our own namespaces."""
    depth = 0
    for i, c in enumerate(demangled):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0 and not demangled.startswith("(anonymous namespace)", i):
            demangled = demangled[:i]
            break
    demangled = re.sub(r"\(anonymous namespace\)::|(?:torchqat|cuda|math|c10)::", "", demangled)
    return demangled.removeprefix("void ")


def demangle(names: list[str]) -> list[str]:
    if not names or not shutil.which("c++filt"):
        return names
    filtered = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [short_name(line) for line in filtered.stdout.splitlines()]


def report(folder: Path) -> int:
    kernels = [k for file in sorted(folder.rglob("*" + SUFFIX)) for k in parse(file.read_text())]
    for kernel, name in zip(kernels, demangle([k.name for k in kernels]), strict=True):
        kernel.name = name
    kernels.sort(key=lambda k: (k.name, k.arch))
    print("arch    registers  shared B  stack B  spilled B  kernel   (shared: static; stack: per thread)")
    for k in kernels:
        print(f"{k.arch:<7} {k.registers:>9} {k.shared:>9} {k.stack:>8} {k.spilled:>10}  {k.name}")
    spilling = sum(k.spilled > 0 for k in kernels)
    most = max((k.registers for k in kernels), default=0)
    print(f"{len(kernels)} kernels, at most {most} registers, {spilling} of them spill")
    return 0 if kernels else 1  # a build of kernels that ptxas said nothing about is one that was not read


def main() -> int:
    match sys.argv[1:]:
        case ["record", *command] if command:
            return record(command)
        case ["report", folder]:
            return report(Path(folder))
    sys.exit(__doc__)


if __name__ == "__main__":
    sys.exit(main())
