"""The operators as documented functions. Each calls ``torch.ops.qat.<name>`` and adds but defaults."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchqat._call import call

__all__ = [
    "bcgd_step_",
    "fast_feature_affinity_loss",
    "feature_affinity_loss",
    "pack_codes",
    "quantize_weight",
    "recommend_feature_affinity",
    "staircase_codes",
    "staircase_relu",
    "ste_names",
    "unpack_codes",
    "weight_codes",
]


def staircase_relu(
    x: Tensor,
    alpha: Tensor,
    bits: int = 4,
    *,
    ste: str = "clipped_relu",
    alpha_grad: str = "three_valued",
    channel_dim: int = 1,
    save_codes: bool = False,
) -> Tensor:
    r"""Quantizes activations to the :math:`b`-bit staircase ReLU of step size :math:`\alpha`.

    .. math::
        \sigma(x, \alpha) = \begin{cases} 0 & x \le 0 \\
            \alpha \cdot \min(\lceil x / \alpha \rceil,\, 2^b - 1) & x > 0 \end{cases}

    A ceil quantizer with right-closed cells: ``x = k * alpha`` is left as it is, and the smallest positive
    ``x`` gives ``alpha``. Its slope is zero almost everywhere, so backward multiplies the gradient by the
    slope of a proxy function instead, the straight-through estimator ``ste`` (:func:`ste_names`), with
    :math:`q = (2^b - 1) \alpha`:

    ======================= =================================== =================================
    ``ste``                 slope                               kept for backward
    ======================= =================================== =================================
    ``identity``            1                                   2 bits per element
    ``relu``                1 for x > 0                         2 bits per element
    ``clipped_relu``        1 for 0 < x <= q                    2 bits per element
    ``log_tailed_relu``     1 up to q, then 1 / (x - q + 1)     x itself
    ``reverse_exponential`` exp(-x / q) for x > 0               x itself
    ======================= =================================== =================================

    The gradient of ``alpha`` is the sum over its elements of the incoming gradient times, by the rule
    ``alpha_grad``:

    ================ ========= ============================ ========= ==============================
    ``alpha_grad``   x <= 0    0 < x <= q                   x > q     kept for backward
    ================ ========= ============================ ========= ==============================
    ``exact``        0         the step index, up to 2^b-1  2^b - 1   the codes, see ``save_codes``
    ``three_valued`` 0         2^(b-1)                      2^b - 1   2 bits per element
    ``min``          0         1                            2^b - 1   2 bits per element
    ``pact``         0         0                            2^b - 1   2 bits per element
    ================ ========= ============================ ========= ==============================

    Where a slope is 0 the gradient is 0, whatever comes in. At ``x = NaN`` the result and both gradients are
    NaN. Where ``alpha`` is not > 0 every output and gradient that it governs is NaN; that is not an error
    because finding out would stall a GPU. The gradient of ``alpha`` is summed in an order that the shapes
    alone fix.

    Args:
        x: activations of any shape and memory format; float64, float32, bfloat16 or float16.
        alpha: step size, in the units of ``x``: one element (shape ``[]`` or ``[1]``), or one per channel
            (shape ``[x.size(channel_dim)]``), on the device of ``x``, of any of the four dtypes.
        bits: width :math:`b` of the codes, 1 to 8.
        ste: the straight-through estimator, one of :func:`ste_names`.
        alpha_grad: ``exact``, ``three_valued``, ``min`` or ``pact``.
        channel_dim: the dimension of ``x`` along which ``alpha`` lies; of no account when ``alpha`` has one
            element.
        save_codes: keep the step codes for backward in place of the 2 bits: 2 bits an element with 1 bit, 4
            with 2 and 3, 8 with 4 to 7, 16 with 8. Layers such as :class:`torchqat.nn.QuantConv2d` that read
            the result then keep these codes, not the result.

    Returns:
        Tensor: shape, dtype and memory format of ``x``.

    Raises:
        TypeError: ``x`` or ``alpha`` is not of one of the four dtypes, or is not a dense tensor.
        ValueError: ``bits`` is out of range, ``ste`` or ``alpha_grad`` unknown, ``alpha`` of a wrong shape or
            on another device.
        NotImplementedError: forward-mode differentiation. (A second derivative raises ``RuntimeError``.)

    Example:
        >>> x = torch.tensor([-1.0, 0.2, 0.6, 9.0], requires_grad=True)
        >>> alpha = torch.tensor(0.5, requires_grad=True)
        >>> y = staircase_relu(x, alpha, bits=2)
        >>> y.detach()
        tensor([0.0000, 0.5000, 1.0000, 1.5000])
        >>> y.sum().backward()
        >>> x.grad, alpha.grad
        (tensor([0., 1., 1., 0.]), tensor(7.))

    Source: Yin, Zhang, Lyu, Osher, Qi, Xin, "Blended coarse gradient descent for full quantization of deep
    neural networks" (2019), section 2: the staircase, its coarse derivatives and the rules for alpha. Yin,
    Lyu, Zhang, Osher, Qi, Xin, "Understanding straight-through estimator in training activation quantized
    neural nets" (2019): the estimators. ``log_tailed_relu``: Cai, He, Sun, Vasconcelos, "Deep learning with
    low precision by half-wave Gaussian quantization" (2017). ``pact``: Choi et al., "PACT: parameterized
    clipping activation" (2018).
    """
    # torch takes half a microsecond for each argument by keyword, and three for a call with few elements: the
    # operator's own defaults are left to it.
    options: dict[str, Any] = {}
    if ste != "clipped_relu":
        options["ste"] = ste
    if alpha_grad != "three_valued":
        options["alpha_grad"] = alpha_grad
    if type(channel_dim) is not int or channel_dim != 1:
        options["channel_dim"] = channel_dim
    if save_codes is not False:
        options["save_codes"] = save_codes
    return call(torch.ops.qat.staircase_relu, x, alpha, bits, **options)


def staircase_codes(x: Tensor, alpha: Tensor, bits: int = 4, *, channel_dim: int = 1) -> Tensor:
    r"""The step index of each activation: :math:`k` with ``staircase_relu(x, alpha, bits) == k * alpha``.

    Args:
        x: activations of any shape and memory format; float64, float32, bfloat16 or float16.
        alpha: step size, as in :func:`staircase_relu`.
        bits: width of the codes, 1 to 8.
        channel_dim: the dimension of ``x`` along which ``alpha`` lies.

    Returns:
        Tensor: uint8, shape and memory format of ``x``, values 0 to ``2**bits - 1``. NaN has no step: where
        ``x`` is NaN, or ``alpha`` is not > 0, the code is 0. Not differentiable.

    Raises:
        TypeError, ValueError: as :func:`staircase_relu`.

    Example:
        >>> staircase_codes(torch.tensor([-1.0, 0.2, 0.6, 9.0]), torch.tensor(0.5), bits=2)
        tensor([0, 1, 2, 3], dtype=torch.uint8)

    Source: as :func:`staircase_relu`.
    """
    return call(torch.ops.qat.staircase_codes, x, alpha, bits, channel_dim=channel_dim)


def ste_names() -> list[str]:
    """The straight-through estimators that :func:`staircase_relu` knows.

    Example:
        >>> ste_names()
        ['identity', 'relu', 'clipped_relu', 'log_tailed_relu', 'reverse_exponential']
    """
    return torch.ops.qat.ste_names()


def quantize_weight(
    weight: Tensor, bits: int, *, method: str = "exact", channel_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Quantizes weights to :math:`b` bits: a scale times small integers, the projection of BCGD.

    .. math::
        \min_{\delta \ge 0,\, q}\ \lVert w - \delta q \rVert^2, \qquad
        q_i \in \begin{cases} \{-1, 1\} & b = 1 \\
            \{0, \pm 1, \dots, \pm (2^{b-1} - 1)\} & b \ge 2 \end{cases}

    Two bits are ternary. At one bit :math:`\delta` is the mean of \|w\|, and the level of 0 is +1.

    ========== ===============================================================================================
    ``method`` how :math:`\delta` and q are found
    ========== ===============================================================================================
    ``exact``  the minimum above, at every width, to the rounding of float64
    ``lloyd``  q nearest to w for the step :math:`2 \max|w| / (2^b - 1)`, ties towards zero, then the best
               :math:`\delta` for this q: one step from the papers' start, and far from the minimum
    ``twn``    ternary only: q = sign(w) where \|w\| is at least 0.7 mean\|w\|, :math:`\delta` their mean
    ========== ===============================================================================================

    Weights that are all zero have scale 0. Where one of the weights that share a scale is NaN or infinite
    (or a float64 sum of theirs overflows), the scale and all of them are NaN. Results repeat bit for bit,
    whatever the number of threads. ``exact`` takes at most 16 bytes of scratch per weight.

    Args:
        weight: weights of any shape and memory format; float64, float32, bfloat16 or float16.
        bits: width :math:`b`, 1 to 8.
        method: ``exact``, ``lloyd`` or ``twn``. At one bit ``lloyd`` is ``exact``.
        channel_dim: one scale for each index of this dimension; None: one for all.

    Returns:
        tuple: the quantized weights (shape, dtype and memory format of ``weight``), and the scale, of shape
        ``[]`` or ``[weight.size(channel_dim)]``; float32 for bfloat16 and float16 weights. Not
        differentiable: neither ever requires grad.

    Raises:
        TypeError: ``weight`` is not of one of the four dtypes, or is not a dense tensor.
        ValueError: ``bits`` or ``channel_dim`` is out of range, ``method`` unknown, or ``twn`` with ``bits``
            other than 2.
        NotImplementedError: ``weight`` is differentiated by :func:`torch.func.grad`, ``vjp`` or ``jvp``,
            which would take the result for one whose derivative is zero. Detach it first.

    Example:
        >>> w = torch.tensor([0.9, -0.1, 1.1, -2.0])
        >>> quantize_weight(w, bits=2)
        (tensor([ 1.3333,  0.0000,  1.3333, -1.3333]), tensor(1.3333))

    Source: Yin, Zhang, Lyu, Osher, Qi, Xin, "Blended coarse gradient descent for full quantization of deep
    neural networks" (2019), section 3. ``twn``: Li, Zhang, Liu, "Ternary weight networks" (2016).
    """
    return call(torch.ops.qat.quantize_weight, weight, bits, method=method, channel_dim=channel_dim)


def weight_codes(weight: Tensor, scale: Tensor, bits: int, *, channel_dim: int | None = None) -> Tensor:
    r"""The integer level of each weight: the nearest to ``weight / scale``, ties towards zero.

    ``scale * codes`` is what :func:`quantize_weight` returns with ``method="exact"`` (and for weights that
    are quantized already, whatever the method, the codes are the levels they have).

    Args:
        weight: weights, quantized or not; float64, float32, bfloat16 or float16.
        scale: the scale that :func:`quantize_weight` returned for the same ``bits`` and ``channel_dim``.
        bits: width :math:`b`, 1 to 8.
        channel_dim: the dimension along which ``scale`` lies; None: ``scale`` is 0-dim.

    Returns:
        Tensor: int8, shape and memory format of ``weight``: -1 and 1 at one bit, else
        ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1``. For NaN, and where the scale is not > 0, the code is 0
        (at one bit 1 for NaN, else the sign). Not differentiable.

    Raises:
        TypeError: ``weight`` or ``scale`` is of a wrong dtype, or is not a dense tensor.
        ValueError: ``bits`` or ``channel_dim`` is out of range, or ``scale`` is of a wrong shape or on
            another device.

    Example:
        >>> w = torch.tensor([0.9, -0.1, 1.1, -2.0])
        >>> _, scale = quantize_weight(w, bits=2)
        >>> weight_codes(w, scale, bits=2)
        tensor([ 1,  0,  1, -1], dtype=torch.int8)

    Source: as :func:`quantize_weight`.
    """
    return call(torch.ops.qat.weight_codes, weight, scale, bits, channel_dim=channel_dim)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    r"""Codes of :math:`b` bits in :math:`b` bits each: what :func:`staircase_codes` returns, made small.

    Code :math:`i`, counted in row-major order, is in the bits :math:`i b \bmod 8` and up of the byte
    :math:`\lfloor i b / 8 \rfloor`; bits of the last byte that no code fills are 0.

    Args:
        codes: uint8 of any shape and strides, values 0 to ``2**bits - 1``. On a CPU larger ones are an error.
            Finding them would make the CPU wait for a GPU, so there the low ``bits`` bits of each are taken.
        bits: width :math:`b`: 1, 2, 4 or 8.

    Returns:
        Tensor: uint8, contiguous, of shape ``[ceil(codes.numel() * bits / 8)]``. Not differentiable.

    Raises:
        TypeError: ``codes`` is not uint8, or is not a dense tensor.
        ValueError: ``bits`` is none of these, or, on a CPU, a code has more bits.

    Example:
        >>> pack_codes(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8), bits=2)
        tensor([57,  2], dtype=torch.uint8)

    Source: of this library; the bits lie as in ``numpy.packbits(..., bitorder="little")``.
    """
    return call(torch.ops.qat.pack_codes, codes, bits)


def unpack_codes(packed: Tensor, bits: int, size: Sequence[int]) -> Tensor:
    r"""The codes that :func:`pack_codes` packed.

    Args:
        packed: uint8 of shape ``[ceil(prod(size) * bits / 8)]``, any stride.
        bits: width of the codes: 1, 2, 4 or 8.
        size: the shape that the codes had.

    Returns:
        Tensor: uint8, contiguous, of shape ``size``, values 0 to ``2**bits - 1``. Not differentiable.

    Raises:
        TypeError: ``packed`` is not uint8, or is not a dense tensor.
        ValueError: ``bits`` is none of these, ``size`` has a negative number, or ``packed`` is of another
            shape.

    Example:
        >>> unpack_codes(torch.tensor([57, 2], dtype=torch.uint8), bits=2, size=[5])
        tensor([1, 2, 3, 0, 2], dtype=torch.uint8)

    Source: as :func:`pack_codes`.
    """
    return call(torch.ops.qat.unpack_codes, packed, bits, size)


def bcgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    latents: list[Tensor],
    scales: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    *,
    lr: Tensor,
    bits: int,
    channel_dim: int | None = None,
    method: str = "exact",
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    blend: float = 1e-5,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""One step of blended coarse gradient descent (BCGD) over lists of tensors, in place.

    A parameter holds the quantized weight :math:`w`, its latent the float weight :math:`y` that is trained.
    With the gradient :math:`g` (negated by ``maximize``, divided by ``grad_scale``):

    .. math::
        y &\leftarrow (1 - \rho) y + \rho w \\
        d &\leftarrow g + \lambda y \\
        m &\leftarrow \mu m + (1 - \tau) d \quad (m \leftarrow d \text{ on the first step}) \\
        y &\leftarrow y - \eta m \quad (y - \eta (d + \mu m) \text{ with nesterov}) \\
        w &\leftarrow \mathrm{Proj}(y)

    ``params`` must hold what the step before, or ``quantize_weight``, made of ``latents`` and ``scales``: at
    one bit :math:`w` may be rebuilt from the two rather than read. The symbols are the
    blend :math:`\rho`, weight decay :math:`\lambda`, momentum :math:`\mu`, dampening :math:`\tau`, rate
    :math:`\eta`. All but the blend and the projection is ``torch.optim.SGD``. Most programs want
    :class:`torchqat.optim.BCGD`, which keeps the lists.

    The projection is that of ``quantize_weight``, with one difference: ``exact`` at three bits and more tries
    the scale before the step and step sizes 1/32 and 1/8 to either side, and takes the scale that fits best
    to the levels that the best of the five assigns. Started from the exact scale, the squared error of the
    projection then stays on average within 1 % (3 and 4 bits) and 5 % (8 bits) of the least possible over
    hundreds of steps of a noisy quadratic; a test states it. It can stay behind for some steps after a jump,
    and for good where few latents run far away from the rest, which matters most at eight bits. At one and
    two bits ``exact`` is the optimum at each step.

    Args:
        params: the quantized weights; float64, float32, bfloat16 or float16, in any mixture, on one device.
        grads: their gradients, in the parameters' dtypes.
        latents: the float weights; float64 for float64 parameters, else float32, and so are all that follow
            but ``steps``.
        scales: the scales of the weights, 0-dim, or one for each channel of ``channel_dim``.
        momentum_buffers: as the parameters in shape; an empty list when ``momentum`` is 0.
        steps: the number of steps each parameter has made, 0-dim float32; an empty list when ``momentum`` is
            0.
        lr: learning rate, one element, on the CPU or on the parameters' device.
        bits: width of the weights, 1 to 8; 2 is ternary.
        channel_dim: the dimension along which ``scales`` lie; ``None`` for one scale per tensor.
        method: ``exact``, ``lloyd`` or ``twn`` (ternary only).
        momentum: momentum factor.
        dampening: dampening of the momentum, from the second step on.
        weight_decay: weight decay, which acts on the blended latent.
        nesterov: Nesterov momentum; needs a momentum and no dampening.
        blend: how far the latent is drawn to the quantized weight, 0 to 1.
        maximize: ascend instead of descend.
        grad_scale: factor that the gradients were multiplied by, one element on the parameters' device.
        found_inf: one element on the parameters' device; unless it is 0, nothing changes at all.

    Nothing is read back from a device, so a step can be captured in a CUDA graph. Sums are added in an order
    that the shapes fix: a step repeats bit for bit. A scale whose latents are not all finite becomes NaN, and
    so do its weights.

    Raises:
        TypeError: a tensor of another dtype than named above, or not dense.
        ValueError: lists of different lengths, shapes that do not belong together, more than one device, a
            tensor that is there twice or overlaps itself, a number out of range, or a parameter that requires
            grad while grad mode is on (call it under :class:`torch.no_grad`).

    Example:
        >>> y = torch.tensor([0.5, -1.0, 0.25, 2.0])
        >>> w, scale = y.sign() * 0.9375, torch.tensor(0.9375)
        >>> grad = torch.tensor([0.0, 0.0, 5.0, 0.0])
        >>> bcgd_step_([w], [grad], [y], [scale], [], [], lr=torch.tensor(0.1), bits=1, blend=0.0)
        >>> w, scale
        (tensor([ 0.9375, -0.9375, -0.9375,  0.9375]), tensor(0.9375))

    Source: Yin, Zhang, Lyu, Osher, Qi, Xin, "Blended coarse gradient descent for full quantization of deep
    neural networks" (2019), algorithm 1."""
    call(
        torch.ops.qat.bcgd_step_,
        params,
        grads,
        latents,
        scales,
        momentum_buffers,
        steps,
        lr=lr,
        bits=bits,
        channel_dim=channel_dim,
        method=method,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        blend=blend,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def feature_affinity_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    norm: str = "l1",
    reduction: str = "mean",
    eps: float = 1e-5,
) -> Tensor:
    r"""Feature affinity (FA): how differently the student and the teacher see which pixels are alike.

    The features of an image are a matrix of channels times :math:`N` pixels, whose columns are brought to
    unit length, :math:`a = f / (\|f\|_2 + \varepsilon)`. With :math:`A` from the student and :math:`B` from
    the teacher,

    .. math::
        S = A^T A - B^T B, \qquad
        \mathrm{l1}: \frac{1}{N^2} \sum_{i \ne j} |S_{ij}|, \qquad
        \mathrm{fro}: \frac{1}{N^2} \sum_{i, j} S_{ij}^2,

    the mean or the sum over the batch. The two may have different numbers of channels, and what is compared
    does not change when the channels of either are rotated. Labels have no part in it.

    :math:`S` has :math:`N^2` elements and is never stored: ``l1`` makes it tile by tile and drops it;
    ``fro`` uses the Gram matrices of the channels, :math:`\|S\|_F^2 = \|AA^T\|_F^2 + \|BB^T\|_F^2 -
    2\|AB^T\|_F^2`, or where there are few pixels, less than about 1.7 times the channels, :math:`S` itself
    (the form that needs fewer operations). The gradient is computed along with the loss, and is all that is
    kept for backward: a tensor like the student's features, float32 where they are of half precision, whose
    range it can leave. The work on an image, forward and backward, is with :math:`C` channels in both
    :math:`4 N^2 C` operations for ``l1`` on a CPU (half of :math:`S` is enough; :math:`6 N^2 C` on a GPU),
    and the lesser of :math:`10 N C^2` and :math:`6 N^2 C` for ``fro``.

    ``fro`` is computed in float64, whatever the features: where the student is close to the teacher the loss
    is a small difference of large numbers, of which float32 keeps no digit at a relative distance of 1e-3.
    Float64 products run at half the float32 rate on CPUs; on many GPUs they are far slower than that, and on
    none have they been measured. Columns whose squares float64 cannot hold, of norms beyond about 1e154 or
    below 1e-154, count as zeros. ``l1`` is computed in float32 (float64 for float64 features); its gradient
    follows the signs of :math:`S`, and those of elements below about 1e-6 are rounding. Neither uses TF32 or
    bfloat16 products, whatever ``torch.set_float32_matmul_precision`` says, and autocast changes nothing.

    Besides the gradient, the work needs some memory: on a CPU, in each thread, a buffer of up to 4 MiB of
    unit columns of an image, and for ``fro`` the matrices of channels (:math:`3 C^2` numbers of float64) or
    of pixels (:math:`N^2`, where there are few). Where the batch is large beside that, forward and backward
    take less than twice the bytes of student and teacher.

    Args:
        student: features of shape (batch, channels, \*spatial), any number of spatial dimensions; float64,
            float32, bfloat16 or float16.
        teacher: features with the same batch and spatial sizes, of any number of channels and any of the four
            dtypes, on the same device. (:mod:`torchqat.distill` resizes.)
        norm: ``l1`` or ``fro``. The diagonal of :math:`S` counts for ``fro``, and not for ``l1``.
        reduction: ``mean`` or ``sum`` over the batch; over an empty batch both are 0.
        eps: :math:`\varepsilon`, >= 0. A column of zeros, which is what ReLU leaves of some pixels, is a unit
            column of zeros, and its gradient is defined to be 0.

    Returns:
        Tensor: the loss, 0-dim; float32, or float64 where an input is float64. Both inputs may require grad;
        gradients have the dtype and memory format of their input.

    Raises:
        TypeError: an input is not of one of the four dtypes, or is not a dense tensor.
        ValueError: fewer than three dimensions, different batch or spatial sizes, no channels, no pixels,
            different devices, an unknown ``norm`` or ``reduction``, or ``eps`` negative or not finite.
        NotImplementedError: forward-mode differentiation, and a second derivative (RuntimeError where both
            are taken by ``torch.func``).

    Example:
        >>> student = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]], requires_grad=True)  # two pixels, alike
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # orthogonal
        >>> loss = feature_affinity_loss(student, teacher, eps=0)
        >>> loss.item()  # S is [[0, 1], [1, 0]]
        0.5

    Source: Li, Yang, Yin, Qi, Xin, "Feature affinity assisted knowledge distillation and quantization of deep
    neural networks on label-free data", IEEE Access (2023), the feature affinity loss; the authors' code has
    ``norm="l1"``, ``reduction="sum"``.
    """
    return call(
        torch.ops.qat.feature_affinity_loss, student, teacher, norm=norm, reduction=reduction, eps=eps
    )


def fast_feature_affinity_loss(
    student: Tensor,
    teacher: Tensor,
    probes: Tensor,
    *,
    norm: str = "l1",
    reduction: str = "mean",
    eps: float = 1e-5,
) -> Tensor:
    r"""Fast feature affinity (FFA): an estimate of feature affinity by random probes.

    With :math:`S` as in :func:`feature_affinity_loss` and :math:`k` random columns :math:`v` of independent
    elements of mean 0 and variance 1,

    .. math::
        \mathrm{l1}: \frac{1}{k N^2} \sum_v \|S v\|_1, \qquad
        \mathrm{fro}: \frac{1}{k N^2} \sum_v \|S v\|_2^2,

    where :math:`Sv = A^T(Av) - B^T(Bv)` never needs :math:`S`. What they estimate:

    - ``fro`` is an unbiased estimate of the exact ``fro``, with a relative standard deviation of at most
      :math:`\sqrt{2/k}`. :class:`torchqat.nn.FastFeatureAffinityLoss` has its variance and its tails.
      Images share the probes, so that a batch is not much surer than an image.
    - ``l1`` with Gaussian probes is an unbiased estimate of
      :math:`\sqrt{2/\pi} \sum_i \|S_{i\cdot}\|_2 / N^2`, a sum of the lengths of rows (the l2,1 norm). It
      does **not** estimate the exact ``l1``, the sum of magnitudes, which lies between that sum of lengths
      and :math:`\sqrt N` times it (but for the diagonal).

    The diagonal counts for both. The work on an image, forward and backward, is :math:`14 N C k` operations
    in float64: ``fro`` is cheaper than the exact one where :math:`k` is below about :math:`0.7 C`
    (:math:`0.75 C` for forward alone), and where features are narrower the exact loss is both cheaper and
    exact; :func:`recommend_feature_affinity` compares. For ``l1`` the exact loss takes :math:`4 N^2 C`.

    Args:
        student, teacher, norm, reduction, eps: as in :func:`feature_affinity_loss`.
        probes: random numbers of shape (pixels, k), the same for all images; one of the four dtypes, on the
            device of the features. :class:`torchqat.nn.FastFeatureAffinityLoss` draws them.

    Returns:
        Tensor: the loss, 0-dim, as of :func:`feature_affinity_loss`.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`feature_affinity_loss`; ValueError also for
            probes of another shape or device, or probes that require grad.

    Example:
        >>> student = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> probes = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> fast_feature_affinity_loss(student, teacher, probes, norm="fro", eps=0).item()
        0.5

    Source: as :func:`feature_affinity_loss`, the fast feature affinity loss.
    """
    return call(
        torch.ops.qat.fast_feature_affinity_loss,
        student,
        teacher,
        probes,
        norm=norm,
        reduction=reduction,
        eps=eps,
    )


def recommend_feature_affinity(
    student_channels: int, teacher_channels: int, pixels: int, *, probes: int = 15
) -> str:
    """Which feature affinity loss takes fewer operations for features of these sizes, with ``norm="fro"``.

    Args:
        student_channels, teacher_channels: numbers of channels.
        pixels: the number of pixels, the product of the spatial sizes.
        probes: the number of probes of the fast loss.

    Returns:
        str: ``"fast"`` where :func:`fast_feature_affinity_loss` takes fewer floating-point operations, for
        forward and backward together, than :func:`feature_affinity_loss`, else ``"exact"``.

    Raises:
        TypeError: an argument is no int.
        ValueError: an argument is not > 0.

    Example:
        >>> recommend_feature_affinity(16, 16, 32 * 32), recommend_feature_affinity(256, 256, 14 * 14)
        ('exact', 'fast')
    """
    return call(
        torch.ops.qat.recommend_feature_affinity, student_channels, teacher_channels, pixels, probes=probes
    )
