"""Tensors as kernels read them that take lists of addresses."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lora_kernels.types import AdamWGroup


def addresses(what: str, tensors: Sequence[Tensor | None]) -> list[int]:
    """Where the tensors lie, 0 for None. ValueError naming the first that has elements, but no memory."""
    found = [0 if t is None else t.data_ptr() for t in tensors]
    if 0 in found:
        for index, (address, t) in enumerate(zip(found, tensors, strict=True)):
            if not address and t is not None and t.numel():
                raise ValueError(f"{what} {index}, a {type(t).__name__} {list(t.shape)} on {t.device}, has no memory")
    return found


def adamw_columns(groups: Sequence[AdamWGroup], cache: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], bool]:
    """Parameters and gradients of all groups, for a backend that reads memory by address; and if tensors changed.

    They changed if a tensor but a gradient has moved or is another one than in the last call with this ``cache``. Then
    everything is checked: ValueError names what is not a contiguous float32, bfloat16 or float16 parameter, or a state
    that doesn't fit it. Gradients, new in each step, are the caller's to check.
    """
    params = [t for group in groups for t in group.params]
    grads = [t for group in groups for t in group.grads]
    names = AdamWGroup._fields[2:6]
    states = [[t for group in groups for t in getattr(group, name)] for name in names]
    # Reading an attribute of a tensor takes 0.1 us or more, and there are hundreds of them.
    now = {
        "pointers": addresses("parameter", params),
        "contiguous": [param.is_contiguous() for param in params],
        "states": [addresses(f"{name} of parameter", t) for name, t in zip(names, states, strict=True)],
        "sizes": [len(group.params) for group in groups],
    }
    tensors = [t for column in (params, *states) for t in column]
    same = all(cache.get(name) == value for name, value in now.items())
    if same and all(map(is_, cache["tensors"], tensors)):
        return params, grads, False
    cache.clear()
    device = params[0].device
    for index, (param, *state) in enumerate(zip(params, *states, strict=True)):
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not param.is_contiguous():
            raise ValueError(
                f"parameter {index} is {param.dtype} with strides {param.stride()}; allowed: contiguous float32, "
                "bfloat16 and float16"
            )
        if param.device != device:
            raise ValueError(f"parameter {index} is on {param.device}, the first one on {device}; allowed: one device")
        if (state[3] is None) != (param.dtype == torch.float32):
            raise ValueError(
                f"master of parameter {index}: exactly bfloat16 and float16 ones have one, not {param.dtype}"
            )
        for name, t, shape in zip(names, state, (param.shape,) * 2 + ((), param.shape), strict=True):
            fits = t is None or (t.dtype == torch.float32 and t.device == device and t.is_contiguous())
            if not fits or (t is not None and t.shape != shape):
                raise ValueError(
                    f"{name} of parameter {index} is {t.dtype} {list(t.shape)} on {t.device}; allowed: contiguous "
                    f"float32 {list(shape)} on {device}"
                )
    cache.update(now, tensors=tensors)
    return params, grads, True
