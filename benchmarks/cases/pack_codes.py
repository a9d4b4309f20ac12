"""Codes of 2 and 4 bits to that many bits and back, against the same in eager torch, plain and compiled."""

import torch
import torchqat.functional as F
from harness import Contender, Problem, renewable

OPS = ("pack_codes", "unpack_codes")


def pack(codes, bits):
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.view(-1, 8 // bits) << shifts).sum(1, dtype=torch.uint8)


def unpack(packed, bits, size):
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts & (2**bits - 1)).view(size)


def problems(device, quick):
    n = 2 ** (18 if quick else 28 if device == "cuda" else 24)
    return [problem(n, bits, device) for bits in (2, 4) for problem in (packing, unpacking)]


@renewable
def packing(n, bits, device):
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, device=device)
    return problem(f"pack {title(n, bits)}", n, bits, contenders(F.pack_codes, pack, codes, bits))


@renewable
def unpacking(n, bits, device):
    packed = torch.randint(0, 2**8, (n * bits // 8,), dtype=torch.uint8, device=device)
    return problem(f"unpack {title(n, bits)}", n, bits, contenders(F.unpack_codes, unpack, packed, bits, [n]))


def title(n, bits):
    return f"{n / 1e6:.2g} M codes of {bits} bits"


def problem(name, n, bits, makers):
    return Problem(name, n, makers, floor_bytes=n + n * bits // 8)


def contenders(ours, eager, *arguments):
    return [
        Contender("torchqat", lambda: lambda: ours(*arguments)),
        Contender("eager shifts", lambda: lambda: eager(*arguments)),
        Contender("torch.compile of it", lambda: compiled(eager, arguments), compiles=True),
    ]


def compiled(eager, arguments):
    function = torch.compile(eager, fullgraph=True)
    return lambda: function(*arguments)
