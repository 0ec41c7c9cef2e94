"""The C++ extension `lora_kernels._C` and what every op of this backend needs of it."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels.reference import dynamic_code
from lora_kernels.types import NF4

__all__ = ["DTYPES", "ISA_ENVIRONMENT_VARIABLE", "check", "empty", "isa", "kernels", "native_bfloat16", "threads",
           "unavailable", "weight_view"]  # fmt: skip

ISA_ENVIRONMENT_VARIABLE = "LORA_KERNELS_CPU_ISA"
# By the numbers that the kernels know them by.
_NAMES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}

unavailable: str | None = None
DTYPES: dict[torch.dtype, int] = {}
try:
    from lora_kernels import _C as kernels
except ImportError as error:
    kernels = None  # type: ignore[assignment]  # read where `unavailable` is None
    unavailable = f"the C++ extension lora_kernels._C can't be imported ({error})"
else:
    DTYPES = {dtype: getattr(kernels, name) for dtype, name in _NAMES.items()}
    if asked := os.environ.get(ISA_ENVIRONMENT_VARIABLE):
        try:
            kernels.set_isa(asked)
        except ValueError as error:
            unavailable = f"environment variable {ISA_ENVIRONMENT_VARIABLE}: {error}"

threads = torch.get_num_threads
_CPU = torch.device("cpu")


def isa() -> str:
    """The instruction set in use."""
    return kernels.get_isa()


@cache
def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu._is_avx512_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def check(x: Tensor) -> None:
    if not x.is_cpu:
        raise ValueError(f"the cpu backend got x on {x.device}; it takes CPU tensors only")
    if x.dtype not in DTYPES:
        raise ValueError(f"the cpu backend got x of {x.dtype}; it takes float32, bfloat16 and float16")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty, whatever the default dtype and device are: kernels write to its address."""
    return torch.empty(shape, dtype=dtype, device=_CPU)


def weight_view(weight: Tensor | NF4) -> Any:
    """The C++ view of weight, which must outlive it."""
    if isinstance(weight, NF4):
        return kernels.Weight.nf4(*weight.tensors, weight.block_size, weight.shape, dynamic_code())
    return kernels.Weight.dense(weight)
