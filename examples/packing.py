"""Networks in files of the size they deserve: a b-bit weight takes b bits.

The first line of a file names the format and has the CRC-32 of the rest, the second is JSON that says what
follows: the bytes of each tensor, in that order. Of a quantized one these are its scales, then its codes.
"""

import io
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from checkpoint import written_whole
from torch import Tensor, nn
from torchqat import functional as QF
from torchqat.optim import BCGD

MAGIC = b"torchqat packed network 1 "
FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DTYPES = FLOATS | {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}


class PackingError(ValueError):
    """The file is damaged, not one of ours, or of another network; the message says which."""


def quantized_weights(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict]:
    """For each parameter that BCGD quantizes: its bits, scale and channel dimension."""
    if not isinstance(optimizer, BCGD):
        return {}
    return {
        parameter: {
            "bits": group["quant_bits"],
            "scale": optimizer.state[parameter]["scale"],
            "channel_dim": group["channel_dim"],
        }
        for group in optimizer.param_groups
        if group.get("quant_bits")
        for parameter in group["params"]
    }


def save(path: Path, model: nn.Module, quantized: dict[Tensor, dict] | None = None) -> int:
    """Writes a model's tensors, those in `quantized` as codes and scales. Returns the file's size."""
    parameters = dict(model.named_parameters())
    entries, chunks = {}, []
    for name, tensor in model.state_dict().items():
        how = (quantized or {}).get(parameters.get(name))
        entries[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if how is None:
            chunks.append(_bytes(tensor))
        else:
            bits, scale, channel_dim = how["bits"], how["scale"], how["channel_dim"]
            codes = QF.weight_codes(tensor, scale, bits, channel_dim=channel_dim)
            chunks += [_bytes(scale), pack(codes.cpu(), bits)]
            dim = None if channel_dim is None else channel_dim % tensor.dim()
            entries[name] |= {"bits": bits, "channel_dim": dim}
    rest = b"".join([json.dumps(entries, separators=(",", ":")).encode(), b"\n", *chunks])
    with written_whole(path) as temporary:
        temporary.write_bytes(_first_line(rest) + rest)
    return path.stat().st_size


def load(path: str | Path) -> dict[str, Tensor]:
    """The state_dict that `save` wrote; quantized weights come back as scale * level, the values they had.

    Runs no code from the file. Raises a ValueError that names the file where it is not whole and right.
    """
    entries, body = _read(Path(path))
    try:
        return {name: _tensor(entry, body) for name, entry in entries.items()}
    except (ValueError, RuntimeError, TypeError) as error:
        raise PackingError(f"{path} has a tensor that cannot be: {str(error).splitlines()[0]}") from None


def load_into(model: nn.Module, path: str) -> None:
    """Gives a float model what a file holds."""
    try:
        state = load(path)
    except OSError as error:
        raise PackingError(f"cannot read {path}: {error.strerror}") from None
    if any(name.endswith(".alpha") for name in state):  # the step size of a quantized activation
        raise PackingError(f"{path} is quantized already; a float.tqat is wanted")
    if not all(value.isfinite().all() for value in state.values()):
        raise PackingError(f"{path} has values that are not finite")
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise PackingError(f"{path} is of another network, of another --model or --dataset") from None


def _first_line(rest: bytes) -> bytes:
    return MAGIC + b"%08x\n" % zlib.crc32(rest)


def _read(path: Path) -> tuple[dict[str, dict], io.BytesIO]:
    """The header of a file and what follows it, of the length that the header says."""
    first, newline, rest = path.read_bytes().partition(b"\n")
    if not first.startswith(MAGIC):
        raise PackingError(f"{path} is not a packed network")
    if first + newline != _first_line(rest):
        raise PackingError(f"{path} is damaged or cut short")
    header, _, body = rest.partition(b"\n")
    try:
        entries = json.loads(header)
        wanted = sum(sum(_sizes(entry)) for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PackingError(f"{path}: its header is wrong") from None
    if wanted != len(body):
        raise PackingError(f"{path}: its header does not fit the {len(body)} bytes of tensors")
    return entries, io.BytesIO(body)


def _sizes(entry: dict) -> tuple[int, int]:
    """How many bytes of scales and of values or codes. ValueError for an entry that `save` does not write."""
    shape, dtype, bits, dim = (entry.get(key) for key in ("shape", "dtype", "bits", "channel_dim"))
    quantized = "bits" in entry
    right = (
        entry.keys() == {"shape", "dtype"} | ({"bits", "channel_dim"} if quantized else set())
        and isinstance(shape, list)
        and all(type(n) is int and n >= 0 for n in shape)
        and dtype in (FLOATS if quantized else DTYPES)
        and (not quantized or (type(bits) is int and 1 <= bits <= 8))
        and (dim is None or (type(dim) is int and 0 <= dim < len(shape)))
    )
    if not right:
        raise ValueError
    n = math.prod(shape)
    if not quantized:
        return 0, n * DTYPES[dtype].itemsize
    return (1 if dim is None else shape[dim]) * _scale_dtype(dtype).itemsize, -(-n * bits // 8)


def _tensor(entry: dict, body: io.BytesIO) -> Tensor:
    """The next tensor of the body."""
    shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
    scale_bytes, value_bytes = _sizes(entry)
    if "bits" not in entry:
        return _from_bytes(body.read(value_bytes), dtype).view(shape)
    scale = _from_bytes(body.read(scale_bytes), _scale_dtype(entry["dtype"]))
    if entry["channel_dim"] is not None:
        scale = scale.view([-1 if d == entry["channel_dim"] else 1 for d in range(len(shape))])
    return (scale * unpack(body.read(value_bytes), entry["bits"], shape)).to(dtype).view(shape)


def _scale_dtype(dtype: str) -> torch.dtype:
    return torch.float64 if dtype == "float64" else torch.float32


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


def _from_bytes(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def pack(codes: Tensor, bits: int) -> bytes:
    """Integer levels in `bits` bits each: at one bit 1 stands for +1, else counted from the lowest."""
    codes = codes.flatten().short()
    levels = (codes > 0 if bits == 1 else codes + _top(bits)).to(torch.uint8)
    planes = np.unpackbits(levels.numpy()[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(planes, bitorder="little").tobytes()


def unpack(packed: bytes, bits: int, shape: list[int]) -> Tensor:
    """What `pack` packed."""
    n = int(np.prod(shape))
    planes = np.unpackbits(np.frombuffer(packed, np.uint8), count=n * bits, bitorder="little").reshape(
        n, bits
    )
    levels = torch.from_numpy(np.packbits(planes, axis=1, bitorder="little").astype(np.float32)).view(shape)
    if (levels > max(2 * _top(bits), 1)).any():
        raise ValueError(f"codes that {bits} bits do not have")
    return 2 * levels - 1 if bits == 1 else levels - _top(bits)


def _top(bits: int) -> int:
    return 2 ** (bits - 1) - 1
