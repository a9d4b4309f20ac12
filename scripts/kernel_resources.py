"""What the compiler made of every CUDA kernel: registers, spills, shared memory, occupancy, memory accesses.

    kernel_resources.py record COMPILER ARGUMENT...   compiles, keeps what ptxas says
    kernel_resources.py report FOLDER                 prints what is kept in FOLDER
    kernel_resources.py check FOLDER                  fails where a kernel spills, and where one of
                                                      cuda/memory_bound_kernels.txt is missing or has narrower
                                                      accesses
    kernel_resources.py page FOLDER NVCC ARCH...      all of it in Markdown
    kernel_resources.py needs                         fails where there is no cuobjdump

CMake uses the first as the compiler launcher of nvcc (with --resource-usage) and the second after linking;
`make kernels-report` writes docs/cuda_kernels.md with the fourth, for the NVCC of that release. Accesses are
those of the SASS, which cuobjdump shows.
"""

import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from kernel_facts import SPILLS, SUFFIX, Kernel, arch_number, cuobjdump, occupancy, read_folder

LISTED = Path(__file__).resolve().parent.parent / "cuda/memory_bound_kernels.txt"

PAGE_HEAD = """# What the compiler says of the CUDA kernels

Written by `make kernels-report`, with the nvcc of CUDA {nvcc}. It tells how the kernels were compiled, not
how fast they run.

For each architecture: registers of a thread · spilled bytes of a thread · shared memory of a block in bytes ·
theoretical occupancy. That is the warps of as many blocks as fit on an SM at once, over the warps that it can
hold; a block has 256 threads and no dynamic shared memory."""

ACCESSES_HEAD = """
## Accesses to global memory

Instructions that load and store, as count x bytes. Kernels with 16-byte accesses also have single ones, for
what is unaligned or left over. `cuda/memory_bound_kernels.txt` tells which kernels must have wide ones,
because memory sets their pace."""


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


def percent(kernel: Kernel) -> str:
    share = occupancy(kernel)
    return "?" if share is None else f"{share:.0%}"


def report(folder: Path) -> int:
    kernels = read_folder(folder)
    print("arch    registers  shared B  stack B  spilled B  occupancy  kernel   (stack, spilled: per thread)")
    for k in kernels:
        numbers = f"{k.registers:>9} {k.shared:>9} {k.stack:>8} {k.spilled:>10} {percent(k):>10}"
        print(f"{k.arch:<7} {numbers}  {k.name}")
    most = max((k.registers for k in kernels), default=0)
    spilling = [k for k in kernels if k.spilled]
    ours = sum(k.ours for k in spilling)
    theirs = len(spilling) - ours
    print(f"{len(kernels)} kernels, at most {most} registers; {ours} of ours spill, {theirs} of libraries'")
    return 0 if kernels else 1  # a build of kernels that ptxas said nothing about is one that was not read


def listed_kernels() -> list[tuple[str, str, str]]:
    """Pattern, loads and stores of each line of the list."""
    lines = [line.rsplit(maxsplit=2) for line in LISTED.read_text().splitlines()]
    return [tuple(line) for line in lines if line and not line[0].startswith("#")]


def narrowed(kernel: Kernel, loads: str, stores: str) -> list[str]:
    """Where a kernel has fewer accesses of the listed width than are listed."""
    problems = []
    for kind, word, least in [("LDG", "loads", loads), ("STG", "stores", stores)]:
        count, width = map(int, least.split("x")) if least != "-" else (0, 0)
        found = kernel.count(kind, width)
        if found < count:
            has = accesses(kernel, kind) or "none"
            problems.append(f"{kernel.arch} {kernel.name}: {word} must have {count} x {width}, has {has}")
    return problems


def problems_of(kernels: list[Kernel], listed: list[tuple[str, str, str]]) -> list[str]:
    """Of the kernels of one architecture."""
    problems = [f"{k.arch} {k.name}: spills {k.spilled} bytes" for k in kernels if k.spilled]
    # What reads nothing was not compiled as it is written.
    problems += [f"{k.arch} {k.name}: no load from global memory" for k in kernels if not k.count("LDG", 1)]
    for pattern, loads, stores in listed:
        fitting = [k for k in kernels if fnmatchcase(k.name, pattern)]
        if not fitting:
            problems.append(f"{kernels[0].arch} {pattern}: is in {LISTED.name}, but no kernel has this name")
        problems += [problem for k in fitting for problem in narrowed(k, loads, stores)]
    return problems


def check(folder: Path) -> int:
    everything = read_folder(folder, with_accesses=True)
    kernels = [k for k in everything if k.ours]
    if not kernels:
        sys.exit(f"kernel_resources.py: {folder} has no kernels; build with CUDA first")
    for k in everything:
        if k.spilled and not k.ours:
            print(f"a library's kernel, left as it is: {k.arch} {k.name[:90]} spills {k.spilled} bytes")
    archs = sorted({k.arch for k in kernels}, key=arch_number)
    listed = listed_kernels()
    problems = [p for arch in archs for p in problems_of([k for k in kernels if k.arch == arch], listed)]
    print("\n".join(problems) or "no kernel spills, and the memory-bound ones are as wide as listed")
    print(f"{len(kernels)} kernels for {', '.join(archs)}: {len(problems)} problems")
    return 1 if problems else 0


def accesses(kernel: Kernel, kind: str) -> str:
    found = sorted(((size, n) for (k, size), n in kernel.accesses.items() if k == kind), reverse=True)
    return ", ".join(f"{n} x {size}" for size, n in found)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def page(folder: Path, nvcc: str, archs: list[str]) -> int:
    kernels = [k for k in read_folder(folder, with_accesses=True) if k.ours and k.arch in archs]
    there = [arch for arch in archs if any(k.arch == arch for k in kernels)]
    if not there:
        sys.exit(
            f"kernel_resources.py: {folder} has no kernels for {', '.join(archs)}; build with CUDA first"
        )
    resources, widths = [], []
    for name, group in groupby(kernels, lambda k: k.name):
        by_arch = {k.arch: k for k in group}
        of = [by_arch.get(arch) for arch in there]
        cells = [k and f"{k.registers} · {k.spilled} · {k.shared} · {percent(k)}" for k in of]
        resources.append([f"`{name}`", *(cell or "" for cell in cells)])
        both = [k and accesses(k, kind) for k in of for kind in ("LDG", "STG")]
        widths.append([f"`{name}`", *(cell or "" for cell in both)])
    print(PAGE_HEAD.format(nvcc=nvcc))
    for arch in sorted(set(archs) - set(there), key=arch_number):
        print(f"\nMissing: {arch}, which this nvcc does not know.")
    print("\n" + table(["kernel", *there], resources))
    print(ACCESSES_HEAD)
    print("\n" + table(["kernel", *(f"{arch} {w}" for arch in there for w in ("loads", "stores"))], widths))
    return 0


def main() -> int:
    match sys.argv[1:]:
        case ["record", *command] if command:
            return record(command)
        case ["report", folder]:
            return report(Path(folder))
        case ["check", folder]:
            return check(Path(folder))
        case ["page", folder, nvcc, *archs] if archs:
            return page(Path(folder), nvcc, archs)
        case ["needs"]:
            cuobjdump()
            if not shutil.which("c++filt"):
                sys.exit("kernel_resources.py: needs c++filt, of binutils")
            return 0
        case ["-h" | "--help"]:
            print(__doc__)
            return 0
    sys.exit(__doc__)


if __name__ == "__main__":
    sys.exit(main())
