"""What the ops that only the CPU backend has, those of a decoder around its linear layers, ask of their tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import backends
from lora_kernels.backends import cpu
from lora_kernels.backends.cpu.extension import DTYPES


def is_fused(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether the kernels take these: CPU tensors of one dtype, `unwatched`, no autocast, backend auto or cpu."""
    return (
        x.is_cpu
        and backends.unwatched(x, weight)
        and not torch.is_autocast_enabled("cpu")
        and (weight is None or (weight.dtype == x.dtype and weight.is_contiguous()))
        and backends.resolve(x) is cpu
        and x.dtype in DTYPES
        and x.numel() > 0
    )


def check(**tensors: Tensor) -> None:
    """RuntimeError where the CPU backend can't run; ValueError naming the tensor that it doesn't take, or that is of
    another dtype or device than the first."""
    if cpu.unavailable is not None:
        raise RuntimeError(f"the cpu backend, which this op needs, can't run here: {cpu.unavailable}")
    (first, x), *others = tensors.items()
    if not x.is_cpu or x.dtype not in DTYPES:
        raise ValueError(f"{first} is {x.dtype} on {x.device}; allowed: float32, bfloat16 and float16, on the CPU")
    for name, t in others:
        if (t.device, t.dtype) != (x.device, x.dtype):
            raise ValueError(f"{name} is {t.dtype} on {t.device}; expected {first}'s {x.dtype} on {x.device}")


def needs_no_graph(*tensors: Tensor) -> bool:
    """Whether neither a gradient nor, for what comes after, a recipe is made of these."""
    if not torch.is_grad_enabled():
        return True
    return any(t.is_inference() for t in tensors) and not any(t.requires_grad for t in tensors)


def with_rows(t: Tensor) -> Tensor:
    """The same values, elements of a row side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()
