"""What the Triton kernels and their launches share."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:
        # The interpreter's tl.dot multiplies the bit patterns of bfloat16; float32 holds every product exactly.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# What @triton.jit made of the function above: a compiler's, or under TRITON_INTERPRET=1 an interpreter's.
INTERPRETED = not isinstance(dot, triton.runtime.JITFunction)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def cast(value, DTYPE: tl.constexpr):
    if _INTERPRETED and value.dtype == tl.float32 and tl.bfloat16 == DTYPE:
        # The interpreter truncates; GPUs round to nearest even. Finite values only, which is what tests hold.
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if _INTERPRETED and value.dtype == tl.bfloat16 and tl.float32 == DTYPE:
        # The interpreter loses denormals.
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


class Launcher:
    """What every launch of one call shares: the device and its family of configurations.

    `name` is the argument that `t` is, for the errors: TypeError for other dtypes than float32, float16, bfloat16 and
    RuntimeError for CPU tensors outside Triton's interpreter.
    """

    def __init__(self, name: str, t: Tensor) -> None:
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name}: the triton backend takes float32, float16 or bfloat16, not {t.dtype}")
        if not t.is_cuda and not INTERPRETED:
            raise RuntimeError(
                f"{name} is on {t.device}: the triton backend takes GPU tensors; for CPU tensors set "
                "TRITON_INTERPRET=1 before triton is imported (slow, for tests) or use the cpu backend"
            )
        self.device = torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
        self.family = configs.device_family(t.get_device()) if t.is_cuda else "interpreter"
