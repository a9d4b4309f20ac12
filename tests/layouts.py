"""Every way a tensor can lie in memory: name -> function of (device, dtype)."""

import torch

LAYOUTS = {
    "contiguous": lambda **o: torch.randn(3, 5, 7, 9, **o),
    "channels_last": lambda **o: torch.randn(3, 5, 7, 9, **o).to(memory_format=torch.channels_last),
    "transposed": lambda **o: torch.randn(9, 5, 33, **o).transpose(0, 2),
    "sliced": lambda **o: torch.randn(6, 10, 14, **o)[::2, 1:6, 3:11],
    "expanded": lambda **o: torch.randn(3, 5, 1, **o).expand(3, 5, 6),
    "unaligned": lambda **o: torch.randn(3 * 5 * 21 + 1, **o)[1:].view(3, 5, 21),
    "one_channel": lambda **o: torch.randn(4, 1, 6, **o),
}
