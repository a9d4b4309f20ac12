"""The feature-affinity losses as modules."""

from typing import Any

import torch
from torch import Tensor

from torchqat import functional as F

#: What the generator of a FastFeatureAffinityLoss starts from, unless it is given one.
PROBE_SEED = 0
DISTRIBUTIONS = ("gaussian", "rademacher")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FeatureAffinityLoss(torch.nn.Module):
    r"""How far the pairwise similarities of a student's pixels are from those of a teacher's:
    :func:`torchqat.functional.feature_affinity_loss` as a module.

    With A and B the features of student and teacher, each pixel's column divided by its norm plus ``eps``,
    and :math:`S = A^T A - B^T B` (N x N, N the number of pixels, never stored):

    .. math::
        \mathrm{l1:}\ \frac{1}{N^2} \sum_{i \ne j} |S_{ij}| \qquad
        \mathrm{fro:}\ \frac{1}{N^2} \sum_{ij} S_{ij}^2

    Args:
        norm: ``l1``, as the authors, or ``fro``, the squared Frobenius norm.
        reduction: ``mean`` over the batch, or ``sum``, as the authors.
        eps: what is added to the norm of a column.

    Shape:
        student (B, C, \*spatial), teacher (B, C', \*spatial), each float64, float32, bfloat16 or float16; the
        result is 0-dim, float32 (float64 where an input is).

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: an option is unknown or out of range; in forward, shapes that do not belong together.

    Example:
        >>> import torchqat
        >>> loss = torchqat.nn.FeatureAffinityLoss()
        >>> student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # two pixels at right angles,
        >>> teacher = torch.tensor([[[2.0, 2.0]]])              # and two that are alike
        >>> round(loss(student, teacher).item(), 4)
        0.5

    Source: Z. Li, B. Yang, P. Yin, Y. Qi, J. Xin, "Feature affinity assisted knowledge distillation and
    quantization of deep neural networks on label-free data", IEEE Access, 2023.
    """

    def __init__(self, norm: str = "l1", reduction: str = "mean", eps: float = 1e-5):
        super().__init__()
        self.norm = norm
        self.reduction = reduction
        self.eps = eps
        # The operator knows what its options may be: ask it rather than keep a second list.
        pixel = torch.empty(1, 1, 1, device="meta")
        F.feature_affinity_loss(pixel, pixel, **self.options())

    def options(self) -> dict[str, Any]:
        """What is passed on to the operator."""
        return {"norm": self.norm, "reduction": self.reduction, "eps": self.eps}

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.feature_affinity_loss(student, teacher, **self.options())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


class FastFeatureAffinityLoss(FeatureAffinityLoss):
    r"""The feature-affinity loss seen through random probes:
    :func:`torchqat.functional.fast_feature_affinity_loss` with probes that are drawn anew at each call.

    With S as in :class:`FeatureAffinityLoss` and probes V (N x k), :math:`R = S V` is computed without S:

    .. math::
        \mathrm{l1:}\ \frac{1}{N^2 k} \sum_{ij} |R_{ij}| \qquad
        \mathrm{fro:}\ \frac{1}{N^2 k} \sum_{ij} R_{ij}^2

    **What it estimates.** With ``fro`` it is unbiased for the squared Frobenius loss. With ``l1`` it is
    **not** an estimate of :class:`FeatureAffinityLoss`'s l1: for Gaussian probes its mean is
    :math:`\sqrt{2/\pi}\, \lVert S \rVert_{2,1} / N^2`, the sum of the *Euclidean* norms of the rows of S (for
    Rademacher probes between 0.707 and 1 times that sum), where
    :math:`\lVert S \rVert_{2,1} \le \sum_{ij} |S_{ij}| \le \sqrt{N}\, \lVert S \rVert_{2,1}`.

    **How well.** All images of a batch share the probes. With M the mean over the batch of S² (their sum for
    ``reduction="sum"``), N^2 times the loss has the variance

    ======== =============== =================================================================================
    ``norm`` probes          variance
    ======== =============== =================================================================================
    ``fro``  ``gaussian``    :math:`\frac{2}{k} \lVert M \rVert_F^2`
    ``fro``  ``rademacher``  :math:`\frac{2}{k} (\lVert M \rVert_F^2 - \sum_i M_{ii}^2)`, never more
    ``l1``   ``gaussian``    of one image, with s the norms of the rows of S and c their cosines:
                             :math:`\frac{2}{\pi k} \sum_{ij} s_i s_j
                             (\sqrt{1 - c_{ij}^2} + c_{ij} \arcsin c_{ij} - 1)`
    ======== =============== =================================================================================

    so that the relative standard deviation of ``fro`` is at most :math:`\sqrt{2/k}` (37 % at k = 15, and
    often a third of that). With X the value of ``fro`` and Gaussian probes, for each t > 0:

    .. math::
        P\big(N^2 X \ge \mathrm{tr} M + 2 \lVert M \rVert_F \sqrt{t/k} + 2 \lVert M \rVert_2\, t/k \big)
            &\le e^{-t} \\
        P\big(N^2 X \le \mathrm{tr} M - 2 \lVert M \rVert_F \sqrt{t/k} \big) &\le e^{-t}

    In short, with :math:`\mathrm{tr} M` the exact value of :math:`N^2 X`, and :math:`\delta > 0`,

    .. math::
        P\big(|N^2 X - \mathrm{tr} M| \ge \delta\, \mathrm{tr} M \big)
            \le 2 \exp\big({-k} (\delta^2 / 4 - \delta^3 / 6)\big)

    whatever S is, which says something for :math:`\delta < 1.5` only: from there on the bound is no less
    than 2.

    **When it pays.** :func:`torchqat.functional.feature_affinity_loss` and
    :func:`torchqat.functional.fast_feature_affinity_loss` say what they cost, forward and backward together:
    for ``fro`` with C channels on both sides 10 N C² operations (or 6 N² C, where that is less) and 14 N C k,
    so that probes are cheaper only where k < 0.7 C. For ``l1`` the exact loss takes 4 N² C, and probes are
    cheaper where k < 0.28 N, if the other norm will do.
    :func:`torchqat.functional.recommend_feature_affinity` says which from the shapes.

    **Random numbers** come from a generator of its own, never from the global one, whose state is left as it
    is. Its state is in ``state_dict`` (as ``_extra_state``, a uint8 tensor), so that training goes on from a
    checkpoint with the probes that it would have drawn. Each forward draws, those of a validation under
    ``no_grad`` too. With a generator on the CPU the same numbers
    are drawn for features on any device, and copied there from pinned memory without waiting for the device.
    A CUDA graph needs one on the GPU, registered with ``CUDAGraph.register_generator_state``; the state of
    one kind does not load into the other. In distributed training each process draws the same probes.

    Args:
        probes: the number k of probes, the authors' 15 by default.
        generator: where the probes come from, for others to share; its state is loaded by ``load_state_dict``
            too. None: one on the CPU with the seed 0.
        norm: ``l1`` or ``fro``.
        reduction: ``mean`` over the batch, or ``sum``.
        eps: what is added to the norm of a column.
        distribution: ``gaussian``, or ``rademacher``: -1 and 1 with even odds.

    Shape:
        as :class:`FeatureAffinityLoss`. Probes are float32, float64 where a feature is.

    Raises:
        TypeError: ``probes`` is no int, or ``generator`` not a torch.Generator.
        ValueError: an option is unknown or out of range; in forward, shapes that do not belong together.
        RuntimeError: a generator on the CPU inside a CUDA graph; or a state that is not of a generator of the
            same device.

    Under ``torch.compile`` the drawing is a graph break: Dynamo does not trace generators.

    Example:
        >>> import torchqat
        >>> fast = torchqat.nn.FastFeatureAffinityLoss(probes=64, norm="fro")
        >>> exact = torchqat.nn.FeatureAffinityLoss(norm="fro")
        >>> student, teacher = torch.ones(2, 3, 4, 4), torch.eye(16).view(1, 16, 4, 4).expand(2, 16, 4, 4)
        >>> ratio = fast(student, teacher) / exact(student, teacher)
        >>> 0.5 < ratio.item() < 2
        True

    Source: as :class:`FeatureAffinityLoss`, where k = 15 and the generator is seeded anew, and with it all
    else that is random, at each call. Variance: Hutchinson's trace estimator for S². Tails: B. Laurent,
    P. Massart, "Adaptive estimation of a quadratic functional by model selection", 2000, lemma 1; the short
    one is Chernoff's, as for one chi-squared number of k degrees, the worst that S can be.
    """

    def __init__(
        self,
        probes: int = 15,
        generator: torch.Generator | None = None,
        *,
        norm: str = "l1",
        reduction: str = "mean",
        eps: float = 1e-5,
        distribution: str = "gaussian",
    ):
        super().__init__(norm, reduction, eps)
        if isinstance(probes, bool) or not isinstance(probes, int):
            raise TypeError(f"FastFeatureAffinityLoss: probes must be an int, got {probes!r}")
        if probes < 1:
            raise ValueError(f"FastFeatureAffinityLoss: probes must be at least 1, got {probes}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"FastFeatureAffinityLoss: generator must be a torch.Generator, got {generator!r}"
            )
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"FastFeatureAffinityLoss: unknown distribution {distribution!r}; "
                f"choose one of {', '.join(DISTRIBUTIONS)}"
            )
        self.probes = probes
        self.generator = torch.Generator().manual_seed(PROBE_SEED) if generator is None else generator
        self.distribution = distribution

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if not _belong_together(student, teacher):  # the operator says what is wrong; nothing is drawn for it
            return F.fast_feature_affinity_loss(student, teacher, torch.empty(0, 0), **self.options())
        wide = torch.float64 in (student.dtype, teacher.dtype)
        probes = self.draw(
            student.shape[2:].numel(), student.device, torch.float64 if wide else torch.float32
        )
        return F.fast_feature_affinity_loss(student, teacher, probes, **self.options())

    @torch.compiler.disable(reason="FastFeatureAffinityLoss draws from a generator of its own")
    def draw(self, pixels: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The next probes: (pixels, k) on ``device``."""
        source = self.generator.device
        across = source.type == "cpu" and torch.device(device).type == "cuda"
        if across and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "FastFeatureAffinityLoss: in a CUDA graph generator must be on the GPU, got one on the CPU"
            )
        where = {"generator": self.generator, "device": source, "dtype": dtype, "pin_memory": across}
        if self.distribution == "gaussian":
            drawn = torch.randn(pixels, self.probes, **where)
        else:
            drawn = torch.randint(2, (pixels, self.probes), **where).mul_(2).sub_(1)
        return drawn.to(device, non_blocking=across)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        try:
            self.generator.set_state(state.cpu())
        except (AttributeError, RuntimeError, TypeError) as error:
            raise RuntimeError(
                f"FastFeatureAffinityLoss: the state must be of a generator on {self.generator.device}, got "
                + (f"{state.numel()} values: {error}" if isinstance(state, Tensor) else repr(state))
            ) from None

    def extra_repr(self) -> str:
        return f"probes={self.probes}, {super().extra_repr()}, distribution={self.distribution!r}"


def _belong_together(student: Any, teacher: Any) -> bool:
    """Whether these are features that can be compared."""
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
        return False
    both = (student, teacher)
    return (
        all(f.dim() > 2 and f.size(1) and f.dtype in DTYPES and f.layout == torch.strided for f in both)
        and student.size(0) == teacher.size(0)
        and student.shape[2:] == teacher.shape[2:]
        and student.device == teacher.device
        and student.shape[2:].numel() > 0
    )
