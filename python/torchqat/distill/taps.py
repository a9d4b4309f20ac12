"""Feature maps from inside a model, by the names of its modules."""

import difflib
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


class FeatureTaps:
    """Calls a model and returns, with its output, what chosen modules inside it returned.

    The modules get forward hooks, which collect during a call of this object and are without effect in all
    other calls of the model: nothing is kept afterwards, also when the model raises. The hooks stay until
    :meth:`remove`, the end of a ``with`` block, or until this object is collected as garbage.

    A copy of the model (``copy.deepcopy``, pickle) has the hooks too, without effect; a copy of this object
    has a copy of the model, tapped. In backward, where ``torch.utils.checkpoint`` calls modules again,
    nothing is collected.

    ``torch.compile`` traces through the hooks without a graph break, and features carry gradients. Tap a
    compiled model before its first call: it does not see later hooks, and calling the taps then raises. What
    is changed in place inside a compiled model is not noticed.

    Args:
        model: any module; one wrapped by DistributedDataParallel or ``torch.compile`` too, whose ``paths``
            are then those of the model inside. (``nn.DataParallel`` makes copies, whose features are
            lost.) A module inside TorchScript calls no hooks.
        paths: names of modules, as ``model.named_modules()`` gives them.

    Raises:
        TypeError: ``paths`` is one string, or has something else in it; ``model`` is no module; when called:
            a tapped module returned something other than a tensor.
        ValueError: there is no module of that name; the message suggests the nearest.
        RuntimeError: when called: a tapped module was not called, or more than once, or its result was
            changed in place afterwards (as by ``nn.ReLU(inplace=True)``), or the hooks are removed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        >>> with FeatureTaps(model, ["1"]) as taps:
        ...     logits, features = taps(torch.randn(8, 1, 8, 8))
        >>> features["1"].shape
        torch.Size([8, 4, 6, 6])
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        if isinstance(paths, str):
            raise TypeError(f"FeatureTaps: paths must be a list of names, got the string {paths!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"FeatureTaps: model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.paths = list(dict.fromkeys(paths))
        modules = dict(_unwrapped(model).named_modules(remove_duplicate=False))
        for path in self.paths:
            if not isinstance(path, str):
                raise TypeError(f"FeatureTaps: paths must be a list of names, got {path!r} in it")
            if path not in modules:
                raise ValueError(f"FeatureTaps: {_no_such_module(path, model, modules)}")
        self.removed = False
        # Hooks know the collection and not this object: else the two would keep each other, and copies of the
        # model would copy what stands around it here, as the wrapper of torch.compile.
        self._collection = _Collection()
        hooks = [(modules[path], _Hook(self._collection, path)) for path in self.paths]
        self._handles = [module.register_forward_hook(hook) for module, hook in hooks]
        self._remove_at_the_end()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The model's output for these arguments, and the features by path."""
        if self.removed:
            raise RuntimeError("FeatureTaps: the hooks are removed")
        self._collection.calls = {path: [] for path in self.paths}
        try:
            output = self.model(*args, **kwargs)
            return output, {path: _only(path, calls) for path, calls in self._collection.calls.items()}
        finally:
            self._collection.calls = None

    def remove(self) -> None:
        """Removes the hooks; a second time there is nothing to do."""
        self._finalizer()
        self.removed = True

    def _remove_at_the_end(self) -> None:
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._finalizer.atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_finalizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remove_at_the_end()

    def __enter__(self) -> "FeatureTaps":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.remove()


class _Collection:
    """What hooks share with their taps: the calls by path, during a call of the taps. Copies are empty."""

    def __init__(self):
        self.calls: dict[str, list[tuple[Any, int]]] | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return _Collection, ()


class _Hook:
    """A forward hook that collects what a module returned."""

    def __init__(self, collection: _Collection, path: str):
        self.collection, self.path = collection, path

    def __call__(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        if self.collection.calls is not None:
            self.collection.calls[self.path].append((output, _version(output)))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _version(output: Any) -> int:
    """Grows whenever a tensor is changed in place, where that is counted."""
    uncounted = torch.compiler.is_compiling() or not isinstance(output, Tensor) or output.is_inference()
    return 0 if uncounted else output._version


def _only(path: str, calls: list[tuple[Any, int]]) -> Tensor:
    """The result of the one call there was."""
    if not calls:
        raise RuntimeError(
            f"FeatureTaps: {path!r} must be called once in a forward, got no call. (A compiled model must be "
            "tapped before its first call.)"
        )
    if len(calls) > 1:
        raise RuntimeError(
            f"FeatureTaps: {path!r} must be called once in a forward, got {len(calls)} calls: "
            "tap a module that is called once, for example the one around it"
        )
    ((output, version),) = calls
    if not isinstance(output, Tensor):
        raise TypeError(f"FeatureTaps: {path!r} must return a tensor, got {type(output).__name__}")
    if _version(output) != version:
        raise RuntimeError(
            f"FeatureTaps: the result of {path!r} was changed in place by what follows it: tap what follows, "
            "or make that not work in place"
        )
    return output


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def _no_such_module(path: str, model: nn.Module, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(path, [name for name in names if name], n=1, cutoff=0.0)
    nearest = f"; the nearest name is {near[0]!r}" if near else ""
    return f"{type(_unwrapped(model)).__name__} has no module {path!r}{nearest}"
