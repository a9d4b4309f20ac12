"""Codes of 2 and 4 bits to that many bits and back, against the same in eager torch, plain and compiled."""

import torch
import torchqat.functional as F
from harness import Contender, Problem

OPS = ("pack_codes", "unpack_codes")


def pack(codes, bits):
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.view(-1, 8 // bits) << shifts).sum(1, dtype=torch.uint8)


def unpack(packed, bits, size):
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts & (2**bits - 1)).view(size)


def problems(device, quick):
    n = 2 ** (18 if quick else 24)
    return [problem for bits in (2, 4) for problem in both_ways(n, bits, device)]


def both_ways(n, bits, device):
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, device=device)
    packed = F.pack_codes(codes, bits)
    size = f"{n / 1e6:.2g} M codes of {bits} bits"
    floor = n + packed.numel()
    return [
        Problem(f"pack {size}", n, contenders(F.pack_codes, pack, codes, bits), floor_bytes=floor),
        Problem(
            f"unpack {size}", n, contenders(F.unpack_codes, unpack, packed, bits, [n]), floor_bytes=floor
        ),
    ]


def contenders(ours, eager, *arguments):
    return [
        Contender("torchqat", lambda: lambda: ours(*arguments)),
        Contender("eager shifts", lambda: lambda: eager(*arguments)),
        Contender("torch.compile of it", lambda: compiled(eager, arguments), compiles=True),
    ]


def compiled(eager, arguments):
    function = torch.compile(eager, fullgraph=True)
    return lambda: function(*arguments)
