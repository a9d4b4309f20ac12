"""One module per operator: `OPS`, the operators it is about, and `problems(device, quick)`."""

import importlib
import pkgutil


def names():
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name):
    return importlib.import_module(f"{__name__}.{name}")
