"""Step sizes from data: what each StaircaseReLU sees decides where it starts."""

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from torchqat.nn import StaircaseReLU


def calibrate(model: nn.Module, batches: Iterable) -> nn.Module:
    """Sets the step size of every StaircaseReLU of a model to the one that fits its inputs best, in place.

    Best is the least mean squared error of the staircase against the positive part of what the module was
    given, over all batches; per channel where the module has a step per channel. All modules are set from
    one pass over the data, in which they act as plain ReLUs: each step size fits the activations of the
    network before quantization. (Fitting them one after the other, each to the already quantized ones
    before it, costs a pass per layer; training adapts the rest.) The inputs are counted in histograms, so
    that memory does not grow with the data.

    The pass runs without gradients and in eval mode. Training modes, the statistics of batch
    normalization and the state of the random generators are afterwards what they were; the same batches
    give the same step sizes. Step sizes are never less than the module's ``alpha_min``. A module that is
    never called or never sees a positive value keeps its step size, and a warning names it; another names
    those that are called more than once per batch.

    Args:
        model: a model with StaircaseReLUs, for example from :func:`torchqat.prepare`.
        batches: what to run: an iterable of input tensors, of tuples or lists that begin with one (as a
            data loader gives ``(images, labels)``), or of dicts of keyword arguments. A few hundred
            samples are enough. They are moved to the device of the model's first parameter.

    Returns:
        nn.Module: ``model``.

    Raises:
        ValueError: the model has no StaircaseReLU, there is no batch, or a StaircaseReLU is given NaN or
            infinity. No step size has changed then.
        TypeError: ``batches`` is one tensor, or a batch has none of the forms above.
        RuntimeError: ``batches`` calibrates the model while it is being calibrated.

    Example:
        >>> import torchqat
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), torchqat.nn.StaircaseReLU(bits=1))
        >>> _ = nn.init.ones_(model[0].weight)
        >>> _ = torchqat.calibrate(model, [torch.tensor([[-5.0], [1.0], [3.0]])])
        >>> round(model[1].alpha.item(), 2)  # at one bit the best step is the mean of what is positive
        2.0
    """
    if isinstance(batches, Tensor):
        raise TypeError("calibrate: batches must be an iterable of batches, got one tensor: give [images]")
    observers = {
        module: _Observer(name, module)
        for name, module in model.named_modules()
        if isinstance(module, StaircaseReLU)
    }
    if not observers:
        raise ValueError("calibrate: the model has no StaircaseReLU; make them with torchqat.prepare")
    for module, observer in observers.items():
        if any(isinstance(hook, _Observer) for hook in module._forward_hooks.values()):
            raise RuntimeError(
                f"calibrate: '{observer.name}' is being calibrated already: one calibration at a time"
            )
    device = next(model.parameters()).device
    count = 0
    with _as_it_was(model, device), contextlib.ExitStack() as hooks, torch.no_grad():
        for observer in observers.values():
            hooks.callback(observer.module.register_forward_hook(observer, with_kwargs=True).remove)
        for batch in batches:
            _run(model, batch, device)
            count += 1
    if count == 0:
        raise ValueError("calibrate: batches is empty")
    for observer in observers.values():
        observer.set_alpha()
    _warn("these StaircaseReLUs keep their step size", [o.kept for o in observers.values() if o.kept])
    shared = [f"{o.name}: {o.calls / count:g} calls a batch" for o in observers.values() if o.calls > count]
    _warn("these StaircaseReLUs have one step size for several calls", shared)
    return model


class _Observer:
    """A forward hook: counts what a StaircaseReLU is given, and lets it act as a ReLU."""

    def __init__(self, name: str, module: StaircaseReLU):
        self.name, self.module = name or type(module).__name__, module
        self.counts = torch.ops.qat._empty_magnitude_counts(module.alpha.numel())
        self.calls = 0
        self.kept = ""  # why the step size stays, where it does

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        if not torch.isfinite(x).all():
            raise ValueError(f"calibrate: the input of '{self.name}' has NaN or infinity in it")
        self.calls += 1
        torch.ops.qat._count_magnitudes(x, self.counts)
        return torch.relu(x)

    def set_alpha(self) -> None:
        alpha = self.module.alpha.detach()
        steps = torch.ops.qat._best_step_sizes(
            self.counts, self.module.bits
        )  # NaN where nothing was positive
        missing = sum(map(math.isnan, steps))
        if missing:
            of = f" in {missing} of {len(steps)} channels" if len(steps) > 1 else ""
            self.kept = f"{self.name}: " + (f"no positive input{of}" if self.calls else "never called")
        found = [step if math.isnan(step) else max(step, self.module.alpha_min) for step in steps]
        found = torch.tensor(found, dtype=alpha.dtype, device=alpha.device).view_as(alpha)
        alpha.copy_(torch.where(found.isnan(), alpha, found))


@contextlib.contextmanager
def _as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode inside; training modes and random generators as before outside."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _run(model: nn.Module, batch: object, device: torch.device) -> None:
    if isinstance(batch, dict):
        model(
            **{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        )
        return
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            "calibrate: a batch must be a tensor, a tuple or list that begins with one, or a dict, "
            f"got {type(x).__name__}"
        )
    model(x.to(device))


def _warn(what: str, lines: list[str]) -> None:
    if lines:
        warnings.warn(f"calibrate: {what}:\n  " + "\n  ".join(lines), stacklevel=3)
