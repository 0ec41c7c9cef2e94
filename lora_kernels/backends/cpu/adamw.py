"""The AdamW step on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lora_kernels.backends.addresses import adamw_columns
from lora_kernels.backends.cpu.extension import DTYPES, empty, kernels, threads
from lora_kernels.types import AdamWGroup


def adamw_step(groups: Sequence[AdamWGroup], max_grad_norm: float | None, cache: dict[str, Any]) -> Tensor | None:
    """One AdamW step over all tensors in one call, in place, gradients clipped; see reference.adamw_step.

    Parameters and gradients are float32, bfloat16 or float16. Arithmetic is float32. The result does not depend on
    the number of threads. Raises ValueError for another dtype or device.
    """
    params, grads, changed = adamw_columns(groups, cache)
    if others := {grad.dtype for grad in grads} - DTYPES.keys():
        raise ValueError(f"the cpu backend got a gradient of {others.pop()}; it takes float32, bfloat16 and float16")
    if not params[0].is_cpu:
        raise ValueError(f"the cpu backend got parameters on {params[0].device}; it takes CPU tensors only")
    if changed:
        cache["fixed"] = dict(zip(("exp_avg", "exp_avg_sq", "step", "master"), cache["states"], strict=True))
        cache["fixed"]["numel"] = [param.numel() for param in params]
        cache["fixed"]["param_dtype"] = [DTYPES[param.dtype] for param in params]
        cache["fixed"]["group"] = [index for index, group in enumerate(groups) for _ in group.params]
    grad_norm = None if max_grad_norm is None else empty()
    kernels.adamw_step(
        param=cache["pointers"],
        grad=grads,
        **cache["fixed"],
        settings=[group[6:] for group in groups],
        max_grad_norm=max_grad_norm or 0.0,
        grad_norm=grad_norm,
        num_threads=threads(),
    )
    return grad_norm
