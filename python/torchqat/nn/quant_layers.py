"""Drop-in layers that keep the packed codes of a staircase for backward, in place of its output."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair


class _KeepsCodes:
    """What the classes below have in common: a state, a repr and results like those of their torch class."""

    #: Whether backward computes the result again for the normalization that reads it.
    recompute = False


class _QuantConv(_KeepsCodes):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self._padding()
        if padding is None or torch.compiler.is_exporting():
            return super()._conv_forward(input, weight, bias)
        return torch.ops.qat._convolution(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, self.recompute
        )

    def _padding(self) -> Any:
        """The zeros on each side, or None where the convolution pads with something else, or unevenly."""
        if self.padding_mode != "zeros":
            return None
        if self.padding == "valid":
            return [0] * len(self.kernel_size)
        if self.padding == "same":
            both = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return None if any(n % 2 for n in both) else [n // 2 for n in both]
        return self.padding


class QuantConv1d(_QuantConv, nn.Conv1d):
    pass


class QuantConv2d(_QuantConv, nn.Conv2d):
    pass


class QuantLinear(_KeepsCodes, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return super().forward(input)
        return torch.ops.qat._linear(input, self.weight, self.bias)


class QuantMaxPool2d(_KeepsCodes, nn.MaxPool2d):
    def forward(self, input: Tensor):
        if self.return_indices or torch.compiler.is_exporting():
            return super().forward(input)
        kernel_size, stride = _pair(self.kernel_size), _pair(self.stride)
        return torch.ops.qat._max_pool2d(
            input, kernel_size, stride, _pair(self.padding), _pair(self.dilation), self.ceil_mode
        )
