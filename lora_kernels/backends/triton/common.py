"""What the Triton kernels and their launches share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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


# Programmatic dependent launch, for what `configs.overlaps` says can do it. Not by triton.language.extra.cuda, whose
# functions fail in Triton 3.4.
@triton.jit
def let_next_kernel_start():
    """The kernel that is queued next may start, if it was launched so, once all programs came here or ended."""
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, False, 1)


@triton.jit
def wait_for_kernel_before():
    """What the kernel before this one has written is there afterwards, all of it."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, False, 1)


# AMD's kernels are chosen by more than what `launch` looks at.
_KEEPS_COMPILED = not INTERPRETED and torch.version.hip is None
# (kernel, device, constants and kinds of arguments) -> what Triton compiled for it, and its constants in their order
_compiled: dict[tuple, tuple[Any, tuple]] = {}


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
        self.index = t.get_device()
        self.stream = torch._C._cuda_getCurrentRawStream(self.index) if t.is_cuda else None
        self.device = contextlib.nullcontext()
        if t.is_cuda and self.index != torch.cuda.current_device():
            self.device = torch.cuda.device(self.index)
        self.family = configs.device_family(self.index) if t.is_cuda else "interpreter"

    def launch(self, kernel, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
        """kernel[grid](*args, **constants), the arguments of run time before the constants.

        Triton examines each argument and every option in each launch, which takes longer than most of these kernels.
        What it compiled is kept here by what can change it: of a number its type, whether it is 1 and whether 16
        divides it; of a tensor its dtype; of a descriptor the dtype and the blocks. A tensor that doesn't start at a
        multiple of 16 bytes goes Triton's way. Tensors are handed over as addresses: those of objects are asked for
        again, and looked up by the driver.
        """
        if not _KEEPS_COMPILED:
            kernel[grid](*args, **constants)
            return
        key, addresses, values = [id(kernel), self.index, *constants.values()], 0, []
        for arg in args:
            kind = type(arg)
            if kind is int:
                key.append((arg == 1) + 2 * (arg % 16 == 0) + 4 * (not -(1 << 31) <= arg < 1 << 31))
            elif arg is None or kind is float:
                key.append(kind)
            elif kind is TensorDescriptor:
                addresses |= arg.base.data_ptr()
                key += (arg.base.dtype, *arg.block_shape)
            else:
                key.append(arg.dtype)
                arg = arg.data_ptr()
                addresses |= arg
            values.append(arg)
        key = tuple(key)
        found = None if addresses % 16 else _compiled.get(key)
        if found is not None:
            compiled, rest = found
            compiled[grid](*values, *rest, stream=self.stream)
            return
        compiled = kernel[grid](*args, **constants)
        if not addresses % 16:
            _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
