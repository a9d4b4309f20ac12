"""Networks in files of the size they deserve: a b-bit weight takes b bits.

The file is a line of JSON that says what follows, then the bytes of each tensor in that order.
"""

import json
from pathlib import Path

import numpy as np
import torch
from checkpoint import written_whole
from torch import Tensor, nn
from torchqat import functional as QF
from torchqat.optim import BCGD


class PackingError(Exception):
    """The file is not one of ours, or of another network."""


def quantised_weights(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict]:
    """For each parameter that BCGD quantises: its bits, scale and channel dimension."""
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


def save(path: Path, model: nn.Module, quantised: dict[Tensor, dict] | None = None) -> int:
    """Writes a model's tensors, those in `quantised` as codes and scales. Returns the file's size."""
    parameters = dict(model.named_parameters())
    entries, chunks = {}, []
    for name, tensor in model.state_dict().items():
        how = (quantised or {}).get(parameters.get(name))
        entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if how is None:
            chunks.append(tensor.cpu().contiguous().numpy().tobytes())
        else:
            bits, scale, channel_dim = how["bits"], how["scale"], how["channel_dim"]
            codes = QF.weight_codes(tensor, scale, bits, channel_dim=channel_dim)
            chunks.append(scale.cpu().numpy().tobytes() + pack(codes.cpu(), bits))
            entry |= {"bits": bits, "channel_dim": channel_dim, "scales": scale.numel()}
        entries[name] = entry | {"bytes": len(chunks[-1])}
    header = json.dumps(entries, separators=(",", ":")).encode()
    with written_whole(path) as temporary:
        temporary.write_bytes(b"".join([header, b"\n", *chunks]))
    return path.stat().st_size


def load(path: Path) -> dict[str, Tensor]:
    """The state_dict that `save` wrote; quantised weights come back as scale * level, the values they had."""
    header, _, body = path.read_bytes().partition(b"\n")
    state, offset = {}, 0
    for name, entry in json.loads(header).items():
        chunk = body[offset : offset + entry["bytes"]]
        offset += entry["bytes"]
        shape, dtype = entry["shape"], getattr(torch, entry["dtype"])
        if "bits" not in entry:
            state[name] = torch.from_numpy(np.frombuffer(chunk, entry["dtype"]).copy()).view(shape)
            continue
        scale = torch.from_numpy(np.frombuffer(chunk, np.float32, entry["scales"]).copy())
        codes = unpack(chunk[4 * entry["scales"] :], entry["bits"], shape)
        if entry["channel_dim"] is not None:
            scale = scale.view([-1 if d == entry["channel_dim"] else 1 for d in range(len(shape))])
        state[name] = (scale * codes).to(dtype).view(shape)
    return state


def load_into(model: nn.Module, path: str) -> None:
    """Gives a model what a file holds."""
    try:
        model.load_state_dict(load(Path(path)))
    except OSError as error:
        raise PackingError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise PackingError(f"{path} does not hold the weights of this network") from None


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
    return 2 * levels - 1 if bits == 1 else levels - _top(bits)


def _top(bits: int) -> int:
    return 2 ** (bits - 1) - 1
