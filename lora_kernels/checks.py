"""Checks of arguments that are numbers (a bool is none), which name what is refused and what is allowed; warnings."""

import sys
import warnings
from collections.abc import Callable
from typing import Any


def check_integer(name: str, value: Any, least: int) -> None:
    """ValueError unless value is an integer >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed: an integer >= {least}")


def warn(message: str) -> None:
    """A UserWarning at the line outside this package that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(f"{__package__}."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def check_number(name: str, value: Any, ok: Callable[[float], bool], allowed: str) -> None:
    """ValueError unless value is a number for which ok holds, which `allowed` says in words."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not ok(value):
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
