"""What ptxas and the SASS say of CUDA kernels, and how many of their blocks an SM holds."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SUFFIX = ".resources.txt"  # beside the object: ptxas' lines
THREADS = 256  # of every block: kThreads in cuda/launch.cuh. None asks for dynamic shared memory.

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
CODE_FOR = re.compile(r"code for (sm_\w+)")
FUNCTION = re.compile(r"Function : (\w+)")
ACCESS = re.compile(r"\b(LDG|STG)\.E([.\w]*) ")
ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one SM share. Registers are given to warps, shared memory to blocks."""

    warps: int
    blocks: int
    shared: int  # bytes
    partitions: int = 4  # each has as much of the registers
    registers: int = 65536
    registers_at_once: int = 256
    shared_at_once: int = 128
    shared_reserved: int = 1024  # the driver's, in each block


# CUDA C++ Programming Guide, "Compute Capabilities": technical specifications per compute capability. What is
# allocated at once, and how it is counted, is in cuda_occupancy.h of the toolkit.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(warps=64, blocks=32, shared=164 * 1024),
    "sm_86": Multiprocessor(warps=48, blocks=16, shared=100 * 1024),
    "sm_89": Multiprocessor(warps=48, blocks=24, shared=100 * 1024),
    "sm_90": Multiprocessor(warps=64, blocks=32, shared=228 * 1024),
    "sm_100": Multiprocessor(warps=64, blocks=32, shared=228 * 1024),
    "sm_120": Multiprocessor(warps=48, blocks=24, shared=100 * 1024),
}


@dataclass
class Kernel:
    name: str
    arch: str
    symbol: str = ""
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0
    accesses: Counter = field(default_factory=Counter)  # of (LDG or STG, bytes)

    @property
    def ours(self) -> bool:
        return self.symbol.startswith("_ZN8torchqat")

    def count(self, kind: str, width: int) -> int:
        """Accesses of at least that many bytes."""
        return sum(n for (k, size), n in self.accesses.items() if k == kind and size >= width)


def arch_number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def blocks_at_once(arch: str, registers: int, shared: int, threads: int = THREADS) -> int:
    """Blocks that are resident on an SM at the same time, as far as the kernel's own needs tell."""
    sm, warps = MULTIPROCESSORS[arch], -(-threads // 32)
    per_warp = round_up(max(registers, 1) * 32, sm.registers_at_once)
    by_registers = sm.registers // sm.partitions // per_warp * sm.partitions // warps
    by_shared = sm.shared // round_up(shared + sm.shared_reserved, sm.shared_at_once)
    return min(sm.warps // warps, sm.blocks, by_registers, by_shared)


def occupancy(kernel: Kernel) -> float | None:
    """Resident warps over those that fit; None where the limits of the architecture are not known here."""
    if kernel.arch not in MULTIPROCESSORS:
        return None
    blocks = blocks_at_once(kernel.arch, kernel.registers, kernel.shared)
    return blocks * (THREADS // 32) / MULTIPROCESSORS[kernel.arch].warps


def parse(text: str) -> list[Kernel]:
    kernels = []
    for line in text.splitlines():
        if match := ENTRY.search(line):
            kernels.append(Kernel(name=match[1], symbol=match[1], arch=match[2]))
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


def cuobjdump() -> str:
    """The toolkit's, or the one that Triton carries."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        from triton import backends
    except ImportError:
        sys.exit("kernel_resources.py: needs cuobjdump, of the CUDA toolkit or of the triton package")
    carried = Path(next(iter(backends.__path__)), "nvidia/bin/cuobjdump")
    if not carried.exists():
        sys.exit(f"kernel_resources.py: needs cuobjdump, of the CUDA toolkit; there is no {carried} either")
    return str(carried)


def read_accesses(sass, kernels: list[Kernel]):
    """Counts the global loads and stores in the code of each kernel; `sass`: lines."""
    by_name = {(k.symbol, k.arch): k for k in kernels}
    arch, current = "", None
    for line in sass:
        if "G.E" in line:
            if current and (match := ACCESS.search(line)):
                width = next((ACCESS_BYTES[part] for part in match[2].split(".") if part in ACCESS_BYTES), 4)
                current.accesses[match[1], width] += 1
        elif match := FUNCTION.search(line):
            current = by_name.get((match[1], arch))
        elif match := CODE_FOR.search(line):
            arch = match[1]


def read_object(record: Path, with_accesses: bool) -> list[Kernel]:
    kernels = parse(record.read_text())
    if with_accesses:
        listing = [cuobjdump(), "-sass", str(record).removesuffix(SUFFIX)]
        with subprocess.Popen(listing, stdout=subprocess.PIPE, text=True) as process:
            read_accesses(process.stdout, kernels)
        if process.returncode:
            sys.exit(f"kernel_resources.py: {' '.join(listing)} failed")
    return kernels


def read_folder(folder: Path, with_accesses: bool = False) -> list[Kernel]:
    """All kernels of the objects in a build folder, by name and architecture."""
    if not folder.is_dir():
        sys.exit(f"kernel_resources.py: no folder {folder}")
    records = sorted(folder.rglob("*" + SUFFIX))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # it is cuobjdump that takes the time
        kernels = [k for own in pool.map(lambda r: read_object(r, with_accesses), records) for k in own]
    for kernel, name in zip(kernels, demangle([k.symbol for k in kernels]), strict=True):
        kernel.name = name
    return sorted(kernels, key=lambda k: (k.name, arch_number(k.arch)))
