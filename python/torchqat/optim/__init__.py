"""Optimizers for quantized networks."""

from torchqat.optim.bcgd import BCGD
from torchqat.optim.groups import param_groups

__all__ = ["BCGD", "param_groups"]
