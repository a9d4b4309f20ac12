"""Calls of operators whose errors are those of Python functions."""

import re
from collections.abc import Callable
from typing import Any

# What torch says of an argument that does not fit the schema, before a dozen lines about the schema.
_MISFIT = re.compile(r"Expected a value of type '(.+)' for argument '(\w+)' but instead found type '(.+)'")


def call(operator: Callable, *args: Any, **options: Any) -> Any:
    """Calls an operator of ``torch.ops``; an argument of a wrong type raises a TypeError that names it."""
    # Types are looked at only when it went wrong: a call costs nothing more, and stand-ins for tensors pass.
    try:
        return operator(*args, **options)
    except RuntimeError as error:
        misfit = _MISFIT.search(str(error))
        if misfit is None:
            raise
        wanted, argument, came = misfit.groups()
    raise TypeError(f"{operator.__name__}: {argument} must be of type {wanted}, got {came}")
