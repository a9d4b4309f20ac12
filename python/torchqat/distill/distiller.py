"""Student, teacher, taps, connectors and loss in one object."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchqat.distill.connector import resize_like
from torchqat.distill.loss import FAQDLoss, FAQDTerms, naming, what
from torchqat.distill.taps import FeatureTaps


class Distilled(NamedTuple):
    """What a :class:`Distiller` returns.

    Attributes:
        loss: to call ``backward`` on.
        logits: the student's, with their gradient.
        terms: what the loss is made of, a :class:`FAQDTerms`.
    """

    loss: Tensor
    logits: Tensor
    terms: FAQDTerms


class Distiller(nn.Module):
    r"""Runs a student beside its teacher and computes the loss of what they made of the same images.

    The teacher runs in eval mode and without gradients: neither its parameters nor its buffers change. It is
    no submodule: ``parameters()``, ``state_dict()`` and ``train()`` of the distiller are those of what is
    trained, the student, the connectors and the loss (where the probes' generator is), so that the state
    is what a checkpoint needs. ``to()`` moves the teacher too. Where the loss has no term that needs the
    teacher, it does not run; features are taken only where the loss looks at them.

    **Order.** ``prepare`` and ``calibrate`` the student, make the distiller, :meth:`build` it where a
    connector is lazy, and make the optimizer last. (``prepare`` keeps hooks, so that a student may be
    prepared in a distiller after a float warm-up; ``calibrate`` it then too, and make a new optimizer.)
    The optimizer gets the groups of the *student*, ``param_groups(distiller.student, ...)``, and the
    connectors in a plain group of their own, as below. :func:`torchqat.optim.param_groups` of the distiller
    itself keeps a :class:`Connector` float, but quantizes connectors that are convolutions or linear layers,
    takes the last of them for the last layer, and has other names to exclude.

    **Distributed training.** The student may be wrapped by DistributedDataParallel (``paths`` are those of
    the model inside). Connectors are outside of it: wrap each by itself.

    Args:
        student: the network to train; its output must be a tensor of logits.
        teacher: the network to learn from, of logits of the same shape.
        taps: which features are compared: a mapping of student's module paths to teacher's, or pairs, where
            a path may occur more than once. See :class:`FeatureTaps`.
        loss: a :class:`FAQDLoss`; None for one of its defaults.
        connectors: a module for the student's features at a path, by path: for example a
            :class:`Connector`. The attribute has them by path, with a slash for each dot, in the order of
            the taps.
        align_corners: how teacher's features of another grid are resized: see :func:`resize_like`.

    Shape:
        images are what both networks take. Features are (B, C, \*spatial); the teacher's are resized to the
        student's grid where they differ.

    Raises:
        TypeError: ``student``, ``teacher`` or a connector is no module, ``loss`` no FAQDLoss, or ``taps`` are
            not pairs of names.
        ValueError: student and teacher share modules or parameters (make one of a ``copy.deepcopy`` of the
            other); no taps where ``lambda_fa > 0``; a path that does not exist (the message suggests the
            nearest), or a connector for a path that is not tapped.
        RuntimeError: when called with gradients: features of the student that have none, though something of
            the student does, where ``lambda_fa > 0``: what makes them is frozen, or it runs inside
            ``torch.utils.checkpoint`` with ``use_reentrant=True``.
        When called: as :class:`FeatureTaps` and :class:`FAQDLoss` too.

    A warning tells once that the teacher was in training mode; it is in eval mode from then on.

    Example:
        >>> import torchqat
        >>> def network(width):
        ...     layers = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten()
        ...     return nn.Sequential(*layers, nn.Linear(width * 36, 10))
        >>> images = torch.randn(16, 1, 8, 8)
        >>> teacher = network(32).eval()  # ... which has been trained
        >>> student = torchqat.prepare(network(8), act_bits=2)
        >>> _ = torchqat.calibrate(student, [images])
        >>> loss = torchqat.distill.FAQDLoss(lambda_label=0)  # reads no labels
        >>> connectors = {"2": torchqat.distill.Connector(8)}
        >>> distiller = torchqat.distill.Distiller(student, teacher, {"2": "2"}, loss, connectors=connectors)
        >>> groups = torchqat.optim.param_groups(student, weight_bits=1)
        >>> groups.append({"name": "connectors", "params": list(distiller.connectors.parameters())})
        >>> optimizer = torchqat.optim.BCGD(groups, lr=0.01, momentum=0.9)
        >>> result = distiller(images)
        >>> result.loss.backward()
        >>> optimizer.step()

    Source: as :class:`FAQDLoss`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        taps: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        loss: FAQDLoss | None = None,
        *,
        connectors: Mapping[str, nn.Module] | None = None,
        align_corners: bool = True,
    ):
        super().__init__()
        loss = FAQDLoss() if loss is None else loss
        if not isinstance(loss, FAQDLoss):
            raise TypeError(f"Distiller: loss must be a FAQDLoss, got {what(loss)}")
        _check_model("student", student)
        _check_model("teacher", teacher)
        _check_apart(student, teacher)
        # The first of parameters() and state_dict(); its taps come last.
        super().__setattr__("student", student)
        self.loss = loss
        self.align_corners = align_corners
        self.pairs = _pairs(taps)
        if loss.lambda_fa and not self.pairs:
            raise ValueError("Distiller: taps must name features where lambda_fa > 0, got none")
        connectors = _connectors(connectors, [path for path, _ in self.pairs])
        self.connected = list(connectors)
        # By path, for states to load to where they belong: "block/relu" for "block.relu".
        self.connectors = nn.ModuleDict({_key(path): module for path, module in connectors.items()})
        self.warned = False
        self.student_taps = _tapped("student", student, [path for path, _ in self.pairs])
        try:
            self.teacher = teacher
        except ValueError:
            self.student_taps.remove()
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        """Another student or teacher is tapped in place of the one before."""
        if name not in ("student", "teacher"):
            return super().__setattr__(name, value)
        _check_model(name, value)
        _check_apart(*((value, self.teacher) if name == "student" else (self.student, value)))
        taps = _tapped(name, value, [pair[name == "teacher"] for pair in self.pairs])
        if name == "student":
            super().__setattr__(name, value)
        else:
            self.__dict__[name] = value  # past nn.Module's __setattr__: it is no submodule
        if before := self.__dict__.get(f"{name}_taps"):
            before.remove()
        super().__setattr__(f"{name}_taps", taps)

    def forward(self, images: Any, labels: Any = None) -> Distilled:
        """``labels`` are not looked at where the loss has ``lambda_label=0``."""
        teacher_logits, targets = self._ask_teacher(images)
        if self.loss.lambda_fa:
            logits, features = self.student_taps(images)
            self._check_gradients(logits, features)
        else:
            logits, features = self.student(images), {}
        compared = self._compared(features, targets)
        terms = self.loss(logits, teacher_logits, compared, labels, names=self._names())
        return Distilled(terms.loss, logits, terms)

    def build(self, images: Any) -> "Distiller":
        """Runs both networks and the loss but for the labels once, in eval mode and without gradients, so
        that a :class:`LazyConnector` gets its parameters, and logits and features that do not fit raise
        before training begins.

        Training modes are afterwards what they were, and so is what the loss keeps: the probes' generator
        has not moved. Returns the distiller.
        """
        modes = {module: module.training for module in self.modules()}
        kept = {name: value for name, value in self.loss.state_dict().items() if not is_lazy(value)}
        kept = copy.deepcopy(kept)
        self.eval()
        try:
            with torch.no_grad():
                teacher_logits, targets = self._ask_teacher(images)
                logits, features = self.student_taps(images)
                compared = list(self._compared(features, targets))
                self.loss.terms_of_teacher(logits, teacher_logits, compared, names=self._names())
        finally:
            self.loss.load_state_dict(kept, strict=False)  # without what was lazy
            for module, mode in modes.items():
                module.training = mode
        return self

    def remove(self) -> None:
        """Removes the hooks from both networks; the distiller computes no features any more.

        The end of a ``with`` block does it too, and so does the end of the distiller.
        """
        self.student_taps.remove()
        self.teacher_taps.remove()

    def __enter__(self) -> "Distiller":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.remove()

    @torch.no_grad()
    def _ask_teacher(self, images: Any) -> tuple[Any, dict[str, Tensor]]:
        if not self.loss.needs_teacher():
            return None, {}
        if any(module.training for module in self.teacher.modules()):
            if not self.warned:
                warnings.warn(
                    "Distiller: the teacher was in training mode; it is put in eval mode", stacklevel=6
                )
                self.warned = True
            self.teacher.eval()
        return self.teacher_taps(images) if self.loss.lambda_fa else (self.teacher(images), {})

    def _check_gradients(self, logits: Any, features: dict[str, Tensor]) -> None:
        """Else the loss of features is computed, and the student learns nothing from it."""
        constant = [path for path, feature in features.items() if not feature.requires_grad]
        if not (constant and torch.is_grad_enabled()):
            return
        outputs = [logits] if isinstance(logits, Tensor) else []
        if any(x.requires_grad for x in (*outputs, *self.student.parameters())):
            raise RuntimeError(
                f"Distiller: the student's features must have a gradient where lambda_fa > 0, got none at "
                f"{', '.join(map(repr, constant))}: what makes them is frozen, or it runs inside "
                "torch.utils.checkpoint with use_reentrant=True (False is fine)"
            )

    def _compared(
        self, features: dict[str, Tensor], targets: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of student's and teacher's features, on the student's grid."""
        for path, connector in zip(self.connected, self.connectors.values(), strict=True):
            if path in features:
                name = f"the connector of the student's {path!r}"
                features[path] = naming(name, connector, features[path])
        for name, (of_student, of_teacher) in zip(self._names(), self.pairs, strict=True) if targets else ():
            feature, target = features[of_student], targets[of_teacher]
            yield feature, naming(name, resize_like, target, feature, align_corners=self.align_corners)

    def _names(self) -> list[str]:
        return [f"the student's {student!r}, the teacher's {teacher!r}" for student, teacher in self.pairs]

    def _apply(self, *args: Any, **kwargs: Any) -> "Distiller":
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        return ", ".join(f"{student!r}: {teacher!r}" for student, teacher in self.pairs)


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Distiller: {name} must be a torch.nn.Module, got {what(model)}")


def _pairs(taps: Mapping[str, str] | Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    wanted = "Distiller: taps must be a mapping or pairs of module paths, student's and teacher's"
    if isinstance(taps, str):
        raise TypeError(f"{wanted}, as {{{taps!r}: {taps!r}}}, got {taps!r}")
    if not isinstance(taps, Iterable):
        raise TypeError(f"{wanted}, got {what(taps)}")
    pairs = list(taps.items() if isinstance(taps, Mapping) else taps)
    for pair in pairs:
        if isinstance(pair, str):
            raise TypeError(f"{wanted}, as {{{pair!r}: {pair!r}}}, got {pair!r}")
        if not isinstance(pair, Sequence) or [type(path) for path in pair] != [str, str]:
            raise TypeError(f"{wanted}, got {pair!r}")
    return [tuple(pair) for pair in pairs]


def _connectors(connectors: Any, paths: list[str]) -> dict[str, nn.Module]:
    """In the order of the taps, whatever theirs is: an optimizer's state goes by order."""
    if connectors is None:
        return {}
    if not isinstance(connectors, Mapping):
        raise TypeError(
            "Distiller: connectors must be a mapping of the student's paths to modules, "
            f"got {what(connectors)}"
        )
    if unknown := [path for path in connectors if path not in paths]:
        raise ValueError(f"Distiller: connectors must be for tapped paths {paths}, got {unknown}")
    for path, module in connectors.items():
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"Distiller: the connector of {path!r} must be a torch.nn.Module, got {what(module)}"
            )
    return {path: connectors[path] for path in dict.fromkeys(paths) if path in connectors}


def _key(path: str) -> str:
    """A path as a key of nn.ModuleDict, which takes no dots, no empty name and none of its own attributes."""
    key = path.replace(".", "/")
    return key if key and not hasattr(nn.ModuleDict(), key) else f"/{key}"


def _tapped(name: str, model: nn.Module, paths: list[str]) -> FeatureTaps:
    try:
        return FeatureTaps(model, paths)
    except ValueError as error:
        raise ValueError(f"{error} (the {name})") from None


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """What both have would be trained, quantized and put in eval mode as one."""
    for kind, members in (("modules", nn.Module.named_modules), ("parameters", nn.Module.named_parameters)):
        of_teacher = {id(member) for _, member in members(teacher)}
        shared = [name for name, member in members(student) if id(member) in of_teacher]
        if shared:
            got = "the same network" if student is teacher else f"the student's {shared[0]!r} in both"
            raise ValueError(
                f"Distiller: student and teacher must not share {kind}, got {got}: torchqat.prepare works "
                "in place, so make the student of copy.deepcopy(teacher)"
            )
