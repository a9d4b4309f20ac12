"""What stands between the student's features and the teacher's."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Connector(nn.Module):
    r"""A 1x1 convolution of features with any number of spatial dimensions, with an optional ReLU behind it.

    It stands behind a student's features while the student is trained, and is thrown away then. The
    feature-affinity losses compare students and teachers of different numbers of channels without it; with
    it the student's channels need not agree with the teacher's directly.

    Its parameters stay float and have to be trained: give them to the optimizer in a group of their own,
    ``{"params": connector.parameters()}``, for which :class:`~torchqat.optim.BCGD` is plain SGD.

    Args:
        in_channels: the student's number of channels.
        out_channels: None: as many as come in, as the authors.
        relu: whether a ReLU follows, as the authors'.

    Shape:
        (B, in_channels, \*spatial) of 1 to 3 spatial dimensions to (B, out_channels, \*spatial).

    Attributes:
        weight: (out_channels, in_channels), drawn from U(-b, b), b = 1 / sqrt(in_channels), as
            ``nn.Conv2d`` does.
        bias: (out_channels,), drawn likewise.

    Raises:
        TypeError: a number of channels is no int; in forward, features that are no tensor.
        ValueError: a number of channels below 1; in forward, features of another rank or other channels.

    Example:
        >>> Connector(4, 8)(torch.ones(2, 4, 5, 6)).shape
        torch.Size([2, 8, 5, 6])

    Source: Li, Yang, Yin, Qi, Xin, "Feature affinity assisted knowledge distillation and quantization of deep
    neural networks on label-free data" (2023), and the authors' programs.
    """

    def __init__(self, in_channels: int, out_channels: int | None = None, *, relu: bool = False):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if isinstance(channels, bool) or not isinstance(channels, int):
                raise TypeError(f"{type(self).__name__}: {name} must be an int, got {channels!r}")
            if channels < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {channels}")
        self.relu = relu
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.size(1))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        _check_tensor("Connector", "features", features)
        rank, channels = features.dim() - 2, self.weight.size(1)
        if rank not in CONVOLUTIONS or features.size(1) != channels:
            raise ValueError(
                f"Connector: features must have shape (B, {channels}, *spatial) with 1 to 3 spatial "
                f"dimensions, got {list(features.shape)}"
            )
        weight = self.weight.view(*self.weight.shape, *[1] * rank)
        features = CONVOLUTIONS[rank](features, weight, self.bias)
        return F.relu(features) if self.relu else features

    def extra_repr(self) -> str:
        if isinstance(self.weight, UninitializedParameter):
            return f"relu={self.relu}"
        return f"{self.weight.size(1)}, {self.weight.size(0)}, relu={self.relu}"


class LazyConnector(nn.modules.lazy.LazyModuleMixin, Connector):
    """A :class:`Connector` that learns its number of channels from the first features it is given, as torch's
    lazy modules do; it is a Connector from then on.

    Its parameters exist before, without a shape. :meth:`Distiller.build` gives them one; make the optimizer
    after that.

    Args:
        out_channels: None: as many as come in.
        relu: whether a ReLU follows.

    Example:
        >>> connector = LazyConnector(relu=True)
        >>> _ = connector(torch.ones(2, 4, 5, 6))
        >>> connector
        Connector(4, 4, relu=True)
    """

    cls_to_become = Connector

    def __init__(self, out_channels: int | None = None, *, relu: bool = False):
        super().__init__(1, 1 if out_channels is None else out_channels, relu=relu)
        self.out_channels = out_channels
        self.weight, self.bias = UninitializedParameter(), UninitializedParameter()

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, features: Tensor) -> None:
        _check_tensor("Connector", "features", features)
        if features.dim() < 3:
            raise ValueError(
                f"Connector: features must have shape (B, C, *spatial), got {list(features.shape)}"
            )
        if self.has_uninitialized_params():
            channels = features.size(1)
            with torch.no_grad():
                self.weight.materialize((self.out_channels or channels, channels))
                self.bias.materialize((self.out_channels or channels,))
                self.reset_parameters()


def resize_like(features: Tensor, like: Tensor, *, align_corners: bool = True) -> Tensor:
    r"""Features on the grid of others: linear, bilinear or trilinear interpolation, by the number of spatial
    dimensions.

    Args:
        features: (B, C, \*spatial), 1 to 3 spatial dimensions; any number where the grids are equal.
        like: (B', C', \*spatial), whose spatial sizes are wanted.
        align_corners: whether the corner pixels keep their values, as the authors have it; else pixels are
            areas, as images are resized. See :func:`torch.nn.functional.interpolate`.

    Returns:
        Tensor: (B, C, \*spatial of ``like``); ``features`` itself where the grids are equal.

    Raises:
        TypeError: ``features`` or ``like`` is no tensor.
        ValueError: different numbers of spatial dimensions, or grids that differ in more than three.

    Example:
        >>> resize_like(torch.tensor([[[0.0, 3.0]]]), torch.ones(1, 5, 4))
        tensor([[[0., 1., 2., 3.]]])
    """
    _check_tensor("resize_like", "features", features)
    _check_tensor("resize_like", "like", like)
    if features.shape[2:] == like.shape[2:]:
        return features
    rank = features.dim() - 2
    if features.dim() != like.dim() or rank not in MODES:
        raise ValueError(
            "resize_like: features must have shape (B, C, *spatial) with as many spatial dimensions, 1 to 3, "
            f"as those they are fitted to, got {list(features.shape)} and {list(like.shape)}"
        )
    return F.interpolate(features, like.shape[2:], mode=MODES[rank], align_corners=align_corners)


def _check_tensor(function: str, name: str, features: Any) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(features).__name__}")
