"""How sums are cut into parts for several blocks of a GPU to make; the parts are then added up in a fixed order."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def in_parts(length: int, step: int, programs: int, target: int, worth: int = 1, least: int = 1) -> tuple[int, int]:
    """How many parts to cut a sum of this length into, and the length of one, a multiple of `step`.

    Each part takes `programs`, and about `target` of them keep the device busy. A sum shorter than `worth` stays whole,
    and no part is cut shorter than `least`.
    """
    steps = ceil_div(length, step)
    parts = 1 if length < worth else min(steps, target // max(1, programs), length // least)
    one = ceil_div(steps, max(1, parts)) * step
    return ceil_div(length, one), one
