"""Which modules a caller wants left alone."""

from collections.abc import Iterable

from torch import nn


class Excluded:
    """Whether a module is to be left alone: by its name, by its type, or as a part of one that is."""

    def __init__(self, caller: str, exclude: str | type | Iterable[str | type], model: nn.Module):
        if isinstance(exclude, (str, type)):
            exclude = (exclude,)
        if isinstance(exclude, nn.Module) or not isinstance(exclude, Iterable):
            raise TypeError(f"{caller}: exclude takes module names and types, got {type(exclude).__name__}")
        exclude = tuple(exclude)
        types = tuple(e for e in exclude if isinstance(e, type))
        names = {e for e in exclude if isinstance(e, str)}
        if len(types) + len(names) < len(set(exclude)):
            raise TypeError(f"{caller}: exclude takes module names and types, got {exclude!r}")
        modules = dict(model.named_modules(remove_duplicate=False))
        unknown = sorted(names - modules.keys())
        if unknown:
            raise ValueError(f"{caller}: exclude names no module of the model: {', '.join(unknown)}")
        self.names = names | {name for name, module in modules.items() if isinstance(module, types)}

    def __call__(self, name: str) -> bool:
        return any(name == e or e == "" or name.startswith(e + ".") for e in self.names)
