"""Registers, shared memory and spills of every CUDA kernel, as ptxas told them when it was compiled.

    python scripts/kernel_resources.py record COMPILER ARGUMENT...   compiles, keeps what ptxas says
    python scripts/kernel_resources.py report FOLDER                 prints what is kept in FOLDER
    python scripts/kernel_resources.py accesses FOLDER [ARCH]        Markdown, with the widths of all global
                                                                     loads and stores (needs cuobjdump)

CMake uses the first as the compiler launcher of nvcc (with --resource-usage) and the second after linking;
docs/cuda_kernels.md is what the third prints.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SUFFIX = ".resources.txt"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
CODE_FOR = re.compile(r"code for (sm_\w+)")
FUNCTION = re.compile(r"Function : (\w+)")
ACCESS = re.compile(r"\b(LDG|STG)\.E([.\w]*) ")
ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
OURS = re.compile(r"^_ZN8torchqat")

ACCESSES_HEAD = """# What the compiler says of the CUDA kernels

{arch}. Registers and spilled bytes are for each thread. Loads and stores are the instructions that access
global memory, as count x bytes; kernels with 16-byte accesses also have single ones, for what is unaligned or
left over. Made by `python scripts/kernel_resources.py accesses`: it tells how the kernels were compiled, not
how fast they run.

| kernel | registers | spilled B | loads | stores |
|---|---|---|---|---|"""


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0
    accesses: Counter = field(default_factory=Counter)  # of (LDG or STG, bytes)


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


def name_all(kernels: list[Kernel]):
    for kernel, name in zip(kernels, demangle([k.name for k in kernels]), strict=True):
        kernel.name = name
    kernels.sort(key=lambda k: (k.name, k.arch))


def report(folder: Path) -> int:
    kernels = [k for file in sorted(folder.rglob("*" + SUFFIX)) for k in parse(file.read_text())]
    name_all(kernels)
    print("arch    registers  shared B  stack B  spilled B  kernel   (shared: static; stack: per thread)")
    for k in kernels:
        print(f"{k.arch:<7} {k.registers:>9} {k.shared:>9} {k.stack:>8} {k.spilled:>10}  {k.name}")
    spilling = sum(k.spilled > 0 for k in kernels)
    most = max((k.registers for k in kernels), default=0)
    print(f"{len(kernels)} kernels, at most {most} registers, {spilling} of them spill")
    return 0 if kernels else 1  # a build of kernels that ptxas said nothing about is one that was not read


def cuobjdump() -> str:
    """The toolkit's, or the one that Triton carries."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        from triton import backends
    except ImportError:
        sys.exit("kernel_resources.py: needs cuobjdump, of the CUDA toolkit or of the triton package")
    return str(Path(next(iter(backends.__path__)), "nvidia/bin/cuobjdump"))


def read_accesses(sass: str, kernels: list[Kernel]):
    """Counts the global loads and stores in the code of each kernel."""
    by_name = {(k.name, k.arch): k for k in kernels}
    arch, current = "", None
    for line in sass.splitlines():
        if match := FUNCTION.search(line):
            current = by_name.get((match[1], arch))
        elif match := CODE_FOR.search(line):
            arch = match[1]
        elif current and (match := ACCESS.search(line)):
            width = next((ACCESS_BYTES[part] for part in match[2].split(".") if part in ACCESS_BYTES), 4)
            current.accesses[match[1], width] += 1


def accesses(folder: Path, arch: str = "sm_90") -> int:
    kernels, program = [], cuobjdump()
    for file in sorted(folder.rglob("*" + SUFFIX)):
        own = [k for k in parse(file.read_text()) if k.arch == arch and OURS.search(k.name)]
        listing = [program, "-sass", "-arch", arch, str(file).removesuffix(SUFFIX)]
        read_accesses(subprocess.run(listing, capture_output=True, text=True, check=True).stdout, own)
        kernels += own
    if not kernels:
        sys.exit(f"kernel_resources.py: {folder} has no kernels for {arch}; build with CUDA first")
    name_all(kernels)
    print(ACCESSES_HEAD.format(arch=arch))
    for k in kernels:
        widths = {"LDG": [], "STG": []}
        for (kind, size), count in sorted(k.accesses.items(), reverse=True):
            widths[kind].append(f"{count} x {size}")
        loads, stores = (", ".join(found) for found in widths.values())
        print(f"| `{k.name}` | {k.registers} | {k.spilled} | {loads} | {stores} |")
    for k in kernels:  # what reads nothing was not compiled as it is written
        if not any(kind == "LDG" for kind, _ in k.accesses):
            sys.exit(f"kernel_resources.py: {k.name} has no load from global memory")
    return 0


def main() -> int:
    match sys.argv[1:]:
        case ["record", *command] if command:
            return record(command)
        case ["report", folder]:
            return report(Path(folder))
        case ["accesses", folder, *arch] if len(arch) <= 1:
            return accesses(Path(folder), *arch)
    sys.exit(__doc__)


if __name__ == "__main__":
    sys.exit(main())
