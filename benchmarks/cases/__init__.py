"""One module per operator, and some about more than one: `OPS`, the operators it is about, and
`problems(device, quick)`, a list or what makes one after the other."""

import importlib
import pkgutil


def names():
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name):
    return importlib.import_module(f"{__name__}.{name}")
