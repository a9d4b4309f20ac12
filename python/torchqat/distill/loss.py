"""The loss that a quantized student is distilled with."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchqat.nn import FeatureAffinityLoss

KINDS = ("mse", "kl")
# Beyond them float32 keeps few digits of the divergence, a difference of numbers that are nearly the same.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100


class FAQDTerms(NamedTuple):
    """A loss and what it is made of.

    Attributes:
        loss: the weighted sum, 0-dim, with its gradient.
        kd, fa, label: the terms without their weights, 0-dim, detached; None where the weight is 0 and the
            term was not computed. Reading their values waits for a GPU.
    """

    loss: Tensor
    kd: Tensor | None = None
    fa: Tensor | None = None
    label: Tensor | None = None


class FAQDLoss(nn.Module):
    r"""Feature-affinity assisted knowledge distillation: the loss of a student that is taught by a teacher.

    .. math::
        L = \lambda_{kd} L_{kd}(s, t) + \lambda_{fa} \sum_l \mathrm{FA}(F^S_l, F^T_l)
            + \lambda_{label} L_{ce}(s, y)

    s and t are the logits of student and teacher, y the labels, F their features at the taps l. With T the
    temperature,

    .. math::
        L_{kd} = \mathrm{mean}\, (s - t)^2 \ (\mathrm{mse}), \qquad
        L_{kd} = T^2\, \mathrm{KL}(\mathrm{softmax}(t / T) \,\Vert\, \mathrm{softmax}(s / T)) \ (\mathrm{kl})

    as means over the batch; for dense logits (B, classes, \*) over batch and pixels. A term of weight 0 is
    not computed, and what belongs to it is not looked at: with ``lambda_label=0`` labels are never read.

    Args:
        lambda_kd: weight of the logits' term.
        lambda_fa: weight of the features' term. 10 with a mean over the batch is the authors' 0.1 with a sum
            over 100 images.
        lambda_label: weight of the cross entropy with the labels; 0 trains without labels.
        kd: ``mse``, the authors' default, or ``kl``.
        temperature: T, from 0.01 to 100, for ``kl`` only. Its default is none of the authors'.
        fa: the loss of one pair of features: None for :class:`torchqat.nn.FeatureAffinityLoss`, or
            :class:`torchqat.nn.FastFeatureAffinityLoss`, or any module of (student, teacher).

    Shape:
        logits (B, classes, \*), of any floating dtype; what is computed from them is float32 (float64 where
        they are). Labels as :func:`torch.nn.functional.cross_entropy` takes them. The loss is 0-dim; of an
        empty batch it is NaN, as torch's means are. A class that the teacher gives -inf counts nothing.

    Raises:
        TypeError: a weight or ``temperature`` is no number, ``fa`` no module (a class is none); in forward:
            logits that are no tensor of a floating dtype, or features that are not in pairs.
        ValueError: a weight that is negative or not finite, or all are 0; ``kd`` unknown; ``temperature`` out
            of range; in forward: labels, teacher's logits or features that are missing where their weight
            is not 0, or logits of different shapes or without classes.

    Example:
        >>> import torchqat
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
        >>> criterion = torchqat.distill.FAQDLoss(lambda_fa=0, lambda_label=0)
        >>> criterion(student, teacher).loss
        tensor(2.)

    Source: Li, Yang, Yin, Qi, Xin, "Feature affinity assisted knowledge distillation and quantization of deep
    neural networks on label-free data" (2023); the weights and ``mse`` are the authors' programs'. They sum
    ``kl`` over the batch. ``kl``: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network"
    (2015).
    """

    def __init__(
        self,
        lambda_kd: float = 1.0,
        lambda_fa: float = 10.0,
        lambda_label: float = 0.3,
        *,
        kd: str = "mse",
        temperature: float = 4.0,
        fa: nn.Module | None = None,
    ):
        super().__init__()
        weights = {"lambda_kd": lambda_kd, "lambda_fa": lambda_fa, "lambda_label": lambda_label}
        for name, value in (*weights.items(), ("temperature", temperature)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"FAQDLoss: {name} must be a number, got {what(value)}")
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"FAQDLoss: {name} must be a finite number >= 0, got {value}")
        if not any(weights.values()):
            raise ValueError("FAQDLoss: one of lambda_kd, lambda_fa, lambda_label must be > 0, got 0 for all")
        if kd not in KINDS:
            raise ValueError(f"FAQDLoss: unknown kd {kd!r}; choose one of {', '.join(KINDS)}")
        if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"FAQDLoss: temperature must be a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}, "
                f"got {temperature}"
            )
        if not (fa is None or isinstance(fa, nn.Module)):
            raise TypeError(f"FAQDLoss: fa must be a torch.nn.Module or None, got {what(fa)}")
        self.lambda_kd = lambda_kd
        self.lambda_fa = lambda_fa
        self.lambda_label = lambda_label
        self.kd = kd
        self.temperature = temperature
        self.fa = FeatureAffinityLoss() if fa is None else fa

    def needs_teacher(self) -> bool:
        """Whether a term is there that compares with the teacher."""
        return bool(self.lambda_kd or self.lambda_fa)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        features: Iterable[tuple[Tensor, Tensor]] = (),
        labels: Any = None,
        *,
        names: Sequence[str] = (),
    ) -> FAQDTerms:
        """``features`` are pairs of student's and teacher's, on equal grids (:func:`resize_like`); ``names``,
        where given, are what errors call these pairs."""
        student_logits = _wide("student_logits", student_logits)
        terms = self.terms_of_teacher(student_logits, teacher_logits, features, names=names)
        if self.lambda_label:
            if labels is None:
                raise ValueError(
                    "FAQDLoss: labels must be given where lambda_label > 0, got None; "
                    "lambda_label=0 trains without"
                )
            terms["label"] = F.cross_entropy(student_logits, labels)
        loss = sum(getattr(self, f"lambda_{name}") * term for name, term in terms.items())
        return FAQDTerms(loss, **{name: term.detach() for name, term in terms.items()})

    def terms_of_teacher(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        features: Iterable[tuple[Tensor, Tensor]] = (),
        *,
        names: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """The terms that need no labels, ``kd`` and ``fa``, without their weights; none of weight 0."""
        student_logits = _wide("student_logits", student_logits)
        terms = {}
        if self.lambda_kd:
            terms["kd"] = self._distance(student_logits, _wide("teacher_logits", teacher_logits))
        if self.lambda_fa:
            terms["fa"] = self._affinity(features, names)
        return terms

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                "FAQDLoss: student and teacher must have logits of one shape, "
                f"got {list(student.shape)} and {list(teacher.shape)}"
            )
        if self.kd == "mse":
            return F.mse_loss(student, teacher)
        log_student, log_teacher = (F.log_softmax(x / self.temperature, 1) for x in (student, teacher))
        log_teacher = log_teacher.clamp(min=torch.finfo(log_teacher.dtype).min)  # -inf * 0 would be NaN
        divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
        return self.temperature**2 * divergence.mean()

    def _affinity(self, features: Iterable[tuple[Tensor, Tensor]], names: Sequence[str]) -> Tensor:
        losses = []
        for pair in features:
            if isinstance(pair, Tensor) or len(pair) != 2:
                raise TypeError(
                    f"FAQDLoss: features must be pairs of student's and teacher's, got {what(pair)}"
                )
            name = names[len(losses)] if names else f"pair {len(losses)} of features"
            loss = naming(name, self.fa, *pair)
            if loss.dim():
                raise ValueError(f"FAQDLoss: fa must return a 0-dim loss, got shape {list(loss.shape)}")
            losses.append(loss)
        if not losses:
            raise ValueError(
                "FAQDLoss: features must hold at least one pair where lambda_fa > 0, got none; "
                "lambda_fa=0 does without"
            )
        return sum(losses[1:], losses[0])

    def extra_repr(self) -> str:
        weights = f"{self.lambda_kd}, {self.lambda_fa}, {self.lambda_label}, kd={self.kd!r}"
        return weights + (f", temperature={self.temperature}" if self.kd == "kl" else "")


def what(thing: Any) -> str:
    """What came, for messages: a class itself is a usual mistake for one of its objects."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def naming(name: str, function: Callable, *args: Any, **options: Any) -> Any:
    """Calls a function; an error that is raised says what it was called for."""
    try:
        return function(*args, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        # Subclasses are made in ways of their own, and are looked for by type: torch.OutOfMemoryError.
        if type(error) not in (TypeError, ValueError, RuntimeError):
            raise
        raise type(error)(f"{error} ({name})") from error


def _wide(name: str, logits: Any) -> Tensor:
    """Logits in at least float32."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"FAQDLoss: {name} must be a tensor, got {what(logits)}")
    if not logits.is_floating_point():
        raise TypeError(f"FAQDLoss: {name} must be of a floating dtype, got {logits.dtype}")
    if logits.dim() < 2:
        raise ValueError(f"FAQDLoss: {name} must have shape (batch, classes, *), got {list(logits.shape)}")
    return logits if logits.dtype == torch.float64 else logits.float()
