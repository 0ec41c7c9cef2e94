"""A step of AdamW over many tensors at once. No autograd: it changes them in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import backends
from lora_kernels.types import AdamWGroup


def adamw_step(groups: Sequence[AdamWGroup], max_grad_norm: float | None, cache: dict[str, Any]) -> Tensor | None:
    """One step of `lora_kernels.reference.adamw_step` on all groups, in place, by one backend.

    The tensors are on one device. cache: a dictionary that the caller keeps from one step to the next, for what a
    backend knows of these tensors. Returns the norm of all gradients where max_grad_norm, which may be math.inf, is
    given; a step whose norm is not finite changes nothing. None where there are no tensors.
    """
    params = [parameter for group in groups for parameter in group.params]
    if not params:
        return None
    widest = next((parameter for parameter in params if parameter.dtype == torch.float64), params[0])
    norm = backends.resolve(widest).adamw_step(groups, max_grad_norm, cache)
    # The kernels write behind torch's back; what was computed from the old values must be known to be old.
    for parameter in params:
        torch.autograd.graph.increment_version(parameter)
    return norm
