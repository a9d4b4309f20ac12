"""Drop-in layers that keep the packed codes of a staircase for backward, in place of its output."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair


def _is_recorded() -> bool:
    """Whether forward goes into a program for others to run, which knows torch's own layers alone."""
    # torch 2.11's compiler takes is_exporting() for true: what it reads is asked instead.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def zeros_around(conv: nn.Module) -> Any:
    """The zeros on each side, or None where a convolution pads with something else, or unevenly."""
    if conv.padding_mode != "zeros":
        return None
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    if conv.padding == "same":
        both = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(n % 2 for n in both) else [n // 2 for n in both]
    return conv.padding


def why_floats(layer: nn.Module) -> str | None:
    """Why a layer would keep floats whatever it reads; None where it would not."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and zeros_around(layer) is None:
        return f"it pads with padding={layer.padding!r}, padding_mode={layer.padding_mode!r}"
    if isinstance(layer, nn.MaxPool2d) and layer.return_indices:
        return "it returns indices"
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and layer.running_mean is None:
        return "it has no running statistics"
    return None


class _QuantConv:
    #: Whether a normalization that reads the result has it computed again in backward, rather than keep it.
    recompute = False

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = zeros_around(self)
        if padding is None or _is_recorded():
            return super()._conv_forward(input, weight, bias)
        return torch.ops.qat._convolution(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, self.recompute
        )


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``torch.nn.Conv1d`` that keeps codes; all that is said of :class:`QuantConv2d` holds."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    r"""``torch.nn.Conv2d`` that keeps the codes of its input for backward, where its input is on the steps of
    a :class:`StaircaseReLU`.

    The gradient of the weights needs the input once more. After a staircase every element of it is
    :math:`k \alpha` with :math:`k` of :math:`b` bits: what is kept is the packed codes, which the staircase
    keeps for its own backward pass anyway (``save_codes``), and all layers that read the same activation
    share. With one bit that is 2 bits an element, with 2 and 3 it is 4, with 4 to 7 it is 8 (16 with 8),
    where the plain layer keeps 32. Backward makes the very same floats again, so that outputs and gradients
    are those of the plain layer bit by bit.

    Arguments, state and results are those of ``torch.nn.Conv2d``: a module of that class becomes one of this
    by ``module.__class__ = QuantConv2d``, as :func:`torchqat.prepare` does it. An input that is no
    staircase's output (images, sums, results of dropout, or one that something has written into), another
    ``padding_mode`` than zeros, or a staircase that keeps no codes: then it is the plain layer. Views of the
    activation (``flatten``, ``reshape``, slices) and :class:`QuantMaxPool2d` may lie between. Whether the
    input is a staircase's output is found out at each call, by autograd's own record of the tensor.

    **No value is compared.** What writes into the activation behind autograd's back, between the staircase
    and this layer, is not seen: ``y.data.mul_()``, NumPy arrays that share its memory, a collective inside a
    ``torch.autograd.Function``. The gradient is then that of what the staircase gave. Write with autograd or
    under ``torch.no_grad()``, which are seen, or give the staircase ``save_codes=False`` (and exclude it from
    :func:`torchqat.prepare`, which sets that).

    Attributes:
        recompute: ``True`` where :class:`QuantBatchNorm2d` reads the result and shall have it computed again
            in backward (``prepare(..., recompute=True)``).

    Raises:
        RuntimeError: as ``torch.nn.Conv2d``; in backward where the weight, or the step size given to the
            operator, has been changed in place since. (A StaircaseReLU gives the operator a copy.)
        NotImplementedError: a second derivative.

    Example:
        >>> import torchqat
        >>> act = torchqat.nn.StaircaseReLU(bits=2)
        >>> conv = torchqat.nn.QuantConv2d(8, 16, kernel_size=3)
        >>> conv(act(torch.randn(1, 8, 5, 5))).shape
        torch.Size([1, 16, 3, 3])
    """


class QuantLinear(nn.Linear):
    """``torch.nn.Linear`` that keeps codes: what is said of :class:`QuantConv2d` holds. Inputs of two
    dimensions or more, without gaps in memory; with others it is the plain layer.

    Example:
        >>> import torchqat
        >>> net = nn.Sequential(torchqat.nn.StaircaseReLU(bits=1), torchqat.nn.QuantLinear(8, 3))
        >>> net(torch.randn(4, 8)).shape
        torch.Size([4, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_recorded():
            return super().forward(input)
        return torch.ops.qat._linear(input, self.weight, self.bias)


def max_pool2d(
    input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    """``torch.nn.functional.max_pool2d`` as :class:`QuantMaxPool2d` does it; `prepare` has it called."""
    arguments = (kernel_size, stride, padding, dilation, ceil_mode)
    if isinstance(input, fx.Proxy):  # as torch's own, it stays one call
        return input.tracer.create_proxy("call_function", max_pool2d, (input, *arguments, return_indices), {})
    if return_indices or _is_recorded():
        return F.max_pool2d(input, *arguments, return_indices)
    stride = kernel_size if stride is None else stride
    return torch.ops.qat._max_pool2d(
        input, _pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation), ceil_mode
    )


class QuantMaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` that, of an input on the steps of a staircase, keeps the places of the maxima
    alone, in the smallest integer type that holds them. Layers that read the result go on with the codes of
    the staircase. Any other input, or ``return_indices``: the plain layer.

    Example:
        >>> import torchqat
        >>> pool = torchqat.nn.QuantMaxPool2d(2)
        >>> pool(torchqat.nn.StaircaseReLU(bits=1)(torch.randn(1, 1, 4, 4))).shape
        torch.Size([1, 1, 2, 2])
    """

    def forward(self, input: Tensor):
        return max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class _QuantBatchNorm:
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):  # as torch's own, it stays one call
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        tracks = self.training and self.track_running_stats and self.running_mean is not None
        if not tracks or _is_recorded():
            return super().forward(input)
        self._check_input_dim(input)
        F._verify_batch_size(input.size())
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the mean over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        return torch.ops.qat._batch_norm(
            input, self.weight, self.bias, self.running_mean, self.running_var, momentum or 0.0, self.eps
        )


class QuantBatchNorm1d(_QuantBatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``; all that is said of :class:`QuantBatchNorm2d` holds."""


class QuantBatchNorm2d(_QuantBatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` that, in training, does not keep an input that comes straight from a
    :class:`QuantConv2d` with ``recompute``: it keeps the statistics of the batch, and backward computes the
    convolution again, from the codes of *its* input. The running statistics are updated once, and the
    gradients are those of the plain layers bit by bit, where the convolution takes the same algorithm both
    times (on a GPU: without ``torch.backends.cudnn.benchmark``). A staircase's output is kept as its codes;
    with any other input it is the plain layer.

    Example:
        >>> import torchqat
        >>> conv = torchqat.nn.QuantConv2d(3, 8, kernel_size=3, bias=False)
        >>> conv.recompute = True
        >>> torchqat.nn.QuantBatchNorm2d(8)(conv(torch.randn(2, 3, 5, 5))).shape
        torch.Size([2, 8, 3, 3])
    """


#: The layer that takes the place of a torch one.
QUANT_LAYERS = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
    nn.MaxPool2d: QuantMaxPool2d,
    nn.BatchNorm1d: QuantBatchNorm1d,
    nn.BatchNorm2d: QuantBatchNorm2d,
}
