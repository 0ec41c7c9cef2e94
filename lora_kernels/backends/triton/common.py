"""What the Triton kernels and their launches share."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs

if TYPE_CHECKING:
    from lora_kernels._C import TritonLaunches


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


class Tile(NamedTuple):
    """A matrix that a kernel fetches in tiles of rows x columns by the copy engine; becomes a tensor descriptor."""

    tensor: Tensor
    rows: int
    columns: int

    def descriptor(self) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(self.tensor, [self.rows, self.columns])


def _for_triton(args: Sequence[Any]) -> list[Any]:
    return [arg.descriptor() if type(arg) is Tile else arg for arg in args]


# AMD's kernels are chosen by more than what `launch` looks at.
_KEEPS_COMPILED = not INTERPRETED and torch.version.hip is None
# (kernel, device, constants and kinds of arguments) -> what Triton compiled for it, and its constants in their order
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


@functools.cache
def _driver() -> TritonLaunches | None:
    """What launches past Triton (csrc/triton), or None where the extension, or NVIDIA's driver, is missing."""
    try:
        from lora_kernels._C import TritonLaunches

        return TritonLaunches("libcuda.so.1")
    except (ImportError, RuntimeError):
        return None


def _watched() -> bool:
    """Whether a profiler wants to hear from Triton of every launch."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Triton 3.4 has one hook or None, later ones a chain of them.
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


# What `_driver` can launch: these of the metadata, as they are in all kernels that need nothing else.
_PLAIN = {"num_ctas": 1, "launch_cooperative_grid": False, "global_scratch_size": 0, "profile_scratch_size": 0}
# Of what Triton says of a descriptor: what `_driver` is told, and what must be false.
_TOLD, _FALSE = {"swizzle", "elem_size", "elem_type", "block_size"}, {"fp4_padded", "is_im2col"}
# CUtensorMapDataType
_ELEMENT_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.\w(\d+) [^,]*?_param_\d+(?:\[(\d+)\])?")


def _described(kernel: Any, compiled: Any, args: Sequence[Any]) -> dict[str, Any] | None:
    """What `_driver` must know to launch what Triton compiled for these arguments; None where that is not all of it.

    The sizes of all parameters are compared with those in the kernel's assembly, where Triton's own come last: the
    addresses of scratch memory, which is empty.
    """
    metadata, signature = compiled.metadata._asdict(), compiled.src.signature
    if any(metadata.get(name) != value for name, value in _PLAIN.items()):
        return None
    if metadata["shared"] > 228 << 10 or "ptx" not in compiled.asm:
        return None
    maps = iter(metadata.get("tensordesc_meta") or ())
    arguments: list[Any] = []
    sizes: list[int] = []
    for name, arg in zip(kernel.arg_names, args, strict=False):
        kind = signature[name]
        if kind == "constexpr":
            arguments.append(None)
        elif isinstance(arg, Tile):
            told = next(maps, None)
            if told is None or told.keys() - _FALSE != _TOLD or any(told.get(name) for name in _FALSE):
                return None
            element = _ELEMENT_TYPES[arg.tensor.dtype]
            arguments.append((element, told["elem_size"], told["swizzle"], *told["block_size"]))
            # The map, then the tensor's shape and strides.
            sizes += [128, 4, 4, 8, 8]
        elif kind in ("i32", "i64", "fp32") or kind.startswith("*"):
            arguments.append("value")
            sizes.append(4 if kind.endswith("32") and not kind.startswith("*") else 8)
        else:
            return None
    entry = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
    found = [int(count or int(bits) // 8) for bits, count in _PARAMETER.findall(entry)]
    nulls = len(found) - len(sizes)
    if found != sizes + [8] * nulls or nulls > 2:
        return None
    return {"compiled": compiled, "function": compiled.function, "num_warps": metadata["num_warps"],
            "shared_bytes": metadata["shared"], "overlaps": metadata["launch_pdl"], "nulls": nulls,
            "arguments": arguments}  # fmt: skip


_HERE = contextlib.nullcontext()


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
        self.stream = torch._C._cuda_getCurrentRawStream(self.index) if t.is_cuda else 0
        self.device: contextlib.AbstractContextManager[object] = _HERE
        if t.is_cuda and self.index != torch.cuda.current_device():
            self.device = torch.cuda.device(self.index)
        self.family = configs.device_family(self.index) if t.is_cuda else "interpreter"
        self.driver = _driver() if _KEEPS_COMPILED and not _watched() else None

    def launch(self, kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """kernel[grid](*args, **constants), the arguments of run time before the constants.

        Triton examines each argument and every option in each launch, which takes longer than most of these kernels.
        What it compiled is kept here by what can change it: of a number its type, whether it is 1 and whether 16
        divides it; of a tensor its dtype; of a tile the dtype and the size. A tensor that doesn't start at a multiple
        of 16 bytes goes Triton's way. The extension finds what is kept and launches it; where it can't, Triton's
        launcher does, which is given tensors as addresses: those of objects are asked for again, and looked up by the
        driver.
        """
        if self.driver is not None and self.driver.launch(kernel, self.index, self.stream, grid, args, constants):
            return
        if not _KEEPS_COMPILED:
            kernel[grid](*_for_triton(args), **constants)
            return
        kinds: list[Any] = [id(kernel), self.index, *constants.values()]
        addresses, values = 0, []
        for arg in args:
            kind = type(arg)
            if kind is int:
                width = 0 if -(1 << 31) <= arg < 1 << 31 else 4 if arg < 1 << 63 else 8
                kinds.append((arg == 1) + 2 * (arg % 16 == 0) + width)
            elif arg is None or kind is float:
                kinds.append(kind)
            elif kind is Tile:
                addresses |= arg.tensor.data_ptr()
                kinds += (arg.tensor.dtype, arg.rows, arg.columns)
                arg = arg.descriptor()
            else:
                kinds.append(arg.dtype)
                arg = arg.data_ptr()
                addresses |= arg
            values.append(arg)
        key = tuple(kinds)
        found = None if addresses % 16 else _compiled.get(key)
        if found is not None:
            compiled, rest = found
            compiled[grid](*values, *rest, stream=self.stream)
            return
        compiled = kernel[grid](*_for_triton(args), **constants)
        if addresses % 16:
            return
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        if (driver := _driver()) is not None and (described := _described(kernel, compiled, args)):
            driver.keep(kernel, self.index, args, constants, **described)
