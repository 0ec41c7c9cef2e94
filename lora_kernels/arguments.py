"""Checks of arguments that are numbers; a bool is none. What is refused is named, with what is allowed."""

from collections.abc import Callable
from typing import Any


def check_integer(name: str, value: Any, least: int) -> None:
    """ValueError unless value is an integer >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed: an integer >= {least}")


def check_number(name: str, value: Any, ok: Callable[[float], bool], allowed: str) -> None:
    """ValueError unless value is a number for which ok holds, which `allowed` says in words."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not ok(value):
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
