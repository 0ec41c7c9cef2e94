"""NF4 weights (Dettmers et al. 2023, QLoRA, section 3): quantise, dequantise, and the object that a layer holds.

The layout of the tensors is `lora_kernels.reference.NF4`; the state dict is that of bitsandbytes' Linear4bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import backends, reference
from lora_kernels.backends.contract import Backend
from lora_kernels.backends.cpu import memory as recycling
from lora_kernels.reference import ABSMAX_BLOCK, dynamic_code, nf4_code
from lora_kernels.sharded import is_sharded
from lora_kernels.types import NF4

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANT_STATE = "quant_state.bitsandbytes__nf4"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backend(*tensors: Tensor) -> Backend:
    """That of the tensors, or the reference where a mode or a transform has to see what is done with them."""
    return backends.resolve(tensors[0]) if backends.unwatched(*tensors) else reference


_TENSORS = ("packed", "absmax", "absmax_scale", "absmax_offset")


def _check_parts(parts: NF4) -> None:
    tensors = {name: t for name, t in zip(_TENSORS, parts.tensors, strict=True) if t is not None}
    if spread := next((name for name, t in tensors.items() if is_sharded(t)), None):
        raise TypeError(f"{spread} is a DTensor; allowed: tensors that lie in one process, as what is quantised does")
    backends.check_dense(**tensors)
    (N, K), double = parts.shape, parts.absmax_scale is not None
    blocks = -(-N * K // parts.block_size)
    expected = {"packed": (torch.uint8, (N * K + 1) // 2), "absmax": (torch.uint8 if double else torch.float32, blocks)}
    if double:
        expected |= {"absmax_scale": (torch.float32, -(-blocks // ABSMAX_BLOCK)), "absmax_offset": (torch.float32, 1)}
    for name, t in tensors.items():
        if (t.dtype, t.numel()) != expected.get(name):
            raise ValueError(
                f"{name} is {t.numel()} of {t.dtype}; with shape {[N, K]} and block_size {parts.block_size} expected "
                f"{expected.get(name)}"
            )
        if t.device != parts.packed.device:
            raise ValueError(f"{name} is on {t.device}; expected the device of packed, {parts.packed.device}")


class NF4Weight(nn.Module):
    """A frozen [N, K] weight in 4 bits, to be the `weight` of a layer.

    Args:
        parts: its tensors, see `lora_kernels.reference.NF4`.
        dtype: float32, bfloat16 or float16, that of the weight it stands for; what `dequantize` returns by default.

    Raises ValueError for tensors whose dtype, size or device doesn't fit, TypeError for those without strides and
    DTensors.

    It is a module so that `.to(device)`, `state_dict` and `load_state_dict` of the layer reach its tensors. Casting a
    model changes `dtype` only: the 4-bit values and their scales stay as they are. Its state dict has the keys and
    the bits of bitsandbytes' Linear4bit: `weight`, `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`,
    `weight.nested_quant_map`, `weight.quant_state.bitsandbytes__nf4`.

    Attributes: shape, dtype, device, block_size, double_quant.
    """

    packed: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None

    def __init__(self, parts: NF4, dtype: torch.dtype) -> None:
        super().__init__()
        _check_parts(parts)
        self._adopt(parts, dtype)

    def _adopt(self, parts: NF4, dtype: torch.dtype) -> None:
        for name in _TENSORS:
            self.register_buffer(name, getattr(parts, name))
        self.block_size = parts.block_size
        self.shape = torch.Size(parts.shape)
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        buffers: dict[str, Any] = self._buffers
        return buffers["packed"].device

    @property
    def double_quant(self) -> bool:
        return self.absmax_scale is not None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """packed, absmax, absmax_scale and absmax_offset."""
        # torch finds a buffer by its attribute only after looking in three other places.
        buffers: dict[str, Any] = self._buffers
        return buffers["packed"], buffers["absmax"], buffers["absmax_scale"], buffers["absmax_offset"]

    def tensors(self) -> NF4:
        """The tensors as the backends take them."""
        return NF4(*self.parts, self.block_size, tuple(self.shape))

    def check(self) -> None:
        """Raises as the class does, should something have put other tensors in the place of its own."""
        _check_parts(self.tensors())

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The dense weight [N, K]: code · scale in float32, rounded once, bit for bit what bitsandbytes' format means.

        dtype: floating point, by default that of `out` or of the original weight. out: a contiguous
        [N, K] tensor to write to, which saves the allocation. Raises TypeError for another dtype, ValueError for
        another `out`, and as `check`.
        """
        dtype = dtype or (self.dtype if out is None else out.dtype)
        allowed = (*_DTYPES, torch.float64)
        if dtype not in allowed:
            raise TypeError(f"dtype is {dtype}; allowed: {', '.join(map(str, allowed))}")
        by_formula = backends.by_formula(*self.buffers())
        if by_formula:
            self.check()
        if out is None and by_formula:
            return reference.nf4_values(self.tensors()).to(dtype)
        if out is None:
            out = recycling.empty(*self.shape, dtype=dtype, device=self.device)
        found = (out.shape, out.dtype, out.device, out.is_contiguous())
        if found != (self.shape, dtype, self.device, True):
            raise ValueError(
                f"out is {list(out.shape)} of {out.dtype} on {out.device}, strides {list(out.stride())}; expected a "
                f"contiguous {list(self.shape)} of {dtype} on {self.device}"
            )
        _backend(out, *self.buffers()).dequantize_nf4(self.tensors(), out)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Weight:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        name = prefix.removesuffix(".") or "weight"
        for key, tensor in to_bitsandbytes(self).items():
            destination[name + key] = tensor

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if prefix + "packed" not in state_dict:
            missing_keys.append(prefix.removesuffix("."))
            return
        entries = {key[len(prefix) - 1 :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        entries[""] = entries.pop(".packed")
        try:
            parts, dtype = from_bitsandbytes(entries)
            if parts.shape != tuple(self.shape):
                raise ValueError(f"shape is {list(parts.shape)}, the layer needs {list(self.shape)}")
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        if not local_metadata.get("assign_to_params_buffers", False):
            device = self.device
            named = zip(_TENSORS, parts.tensors, strict=True)
            copies: dict[str, Any] = {name: t if t is None else t.to(device, copy=True) for name, t in named}
            parts = replace(parts, **copies)
        self._adopt(parts, dtype)

    def extra_repr(self) -> str:
        double = ", double_quant=True" if self.double_quant else ""
        return f"shape={list(self.shape)}, dtype={_dtype_name(self.dtype)}, block_size={self.block_size}{double}"


def load_packed(layer: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """To be called by the layer before it loads: torch shows a submodule only the keys that begin with its name and a
    dot, and the packed values are stored under the name alone."""
    if isinstance(layer.weight, NF4Weight) and prefix + "weight" in state_dict:
        state_dict[prefix + "weight.packed"] = state_dict.pop(prefix + "weight")


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = False) -> NF4Weight:
    """Quantises weight [N, K] to NF4: 4 bits an element and a scale for every `block_size` of them.

    Each block, counted through the flat row-major weight, is divided by its largest magnitude, and each element
    replaced by the nearest of the 16 NF4 values, the lower one of two equally near. The bits are those of
    bitsandbytes' quantize_4bit.

    Args:
        weight: float32, bfloat16 or float16; all elements finite.
        block_size: a power of two from 32 to 4096.
        double_quant: store the scales, less their mean, in 8 bits, in blocks of 256 (section 3, "Double
            Quantization"): 4.127 instead of 4.5 bits an element at block_size 64.

    Raises TypeError for another dtype, a layout without strides, a subclass such as DTensor, and in the transforms of
    torch.func; ValueError for another shape or block size, without memory (on meta), or for an element that is not
    finite.
    """
    backends.check_dense(weight=weight)
    weight = weight.resolve_neg()
    backends.check_memory(weight=weight)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected a non-empty [N, K]")
    if weight.dtype not in _DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}; allowed: {', '.join(map(str, _DTYPES))}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}; allowed: {', '.join(map(str, BLOCK_SIZES))}")
    with torch.no_grad():
        parts = _backend(weight).quantize_nf4(weight.contiguous(), block_size, bool(double_quant))
    # A block with an element that is not finite has such a scale, and the mean of the scales is then not finite either.
    if not torch.isfinite(parts.absmax if parts.absmax_offset is None else parts.absmax_offset).all():
        raise ValueError("weight has an element that is not finite; NF4 has no code for it")
    return NF4Weight(parts, weight.dtype)


def to_bitsandbytes(weight: NF4Weight) -> dict[str, Tensor]:
    """The state-dict entries of bitsandbytes' Linear4bit, by what follows the weight's name ("" is the weight)."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        # bitsandbytes knows no float64.
        "dtype": _dtype_name(torch.float32 if weight.dtype == torch.float64 else weight.dtype),
        "shape": list(weight.shape),
    }
    entries = {
        "": weight.packed.unsqueeze(1),
        ".absmax": weight.absmax,
        ".quant_map": nf4_code(weight.device),
    }
    if weight.absmax_scale is not None and weight.absmax_offset is not None:
        entries[".nested_absmax"] = weight.absmax_scale
        entries[".nested_quant_map"] = dynamic_code().to(weight.device, copy=True)
        state["nested_blocksize"] = ABSMAX_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = weight.absmax_offset.item()
    text = torch.frombuffer(bytearray(json.dumps(state), "utf-8"), dtype=torch.uint8)
    entries["." + QUANT_STATE] = text.to(weight.device)
    return entries


def from_bitsandbytes(entries: Mapping[str, Tensor]) -> tuple[NF4, torch.dtype]:
    """The inverse of `to_bitsandbytes`: the tensors, and the dtype of the weight that was quantised.

    A `weight` stored in another dtype (bitsandbytes' quant_storage) is read by its bytes. Raises ValueError for a
    missing entry, another code, or sizes that don't fit together.
    """

    def entry(key: str) -> Tensor:
        if key not in entries:
            raise ValueError(f"{key.lstrip('.')} is missing")
        return entries[key]

    def expect(name: str, found: object, expected: object) -> None:
        if found != expected:
            raise ValueError(f"{name} is {found}; expected {expected}")

    def flat(key: str, dtype: torch.dtype, size: int) -> Tensor:
        tensor = entry(key)
        expect(key.lstrip("."), (tensor.dtype, tensor.numel()), (dtype, size))
        return tensor.detach().reshape(-1)

    try:
        state = json.loads(bytes(entry("." + QUANT_STATE).tolist()))
        block_size, (N, K), dtype = state["blocksize"], state["shape"], getattr(torch, state["dtype"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{QUANT_STATE}: {error}") from None
    expect("quant_type", state.get("quant_type"), "nf4")
    if block_size not in BLOCK_SIZES or dtype not in _DTYPES:
        raise ValueError(f"blocksize is {block_size} and dtype {dtype}; allowed: {BLOCK_SIZES} and {_DTYPES}")
    if not torch.equal(flat(".quant_map", torch.float32, 16).cpu(), nf4_code()):
        raise ValueError("quant_map is not NF4's")
    packed = entry("").detach().contiguous().view(-1).view(torch.uint8)
    expect("bytes of weight", packed.numel(), (N * K + 1) // 2)
    blocks = -(-N * K // block_size)
    if ".nested_absmax" not in entries:
        return NF4(packed, flat(".absmax", torch.float32, blocks), None, None, block_size, (N, K)), dtype
    if not torch.equal(flat(".nested_quant_map", torch.float32, 256).cpu(), dynamic_code()):
        raise ValueError("nested_quant_map is not the dynamic 8-bit code")
    expect("nested_blocksize", state.get("nested_blocksize"), ABSMAX_BLOCK)
    absmax = flat(".absmax", torch.uint8, blocks)
    absmax_scale = flat(".nested_absmax", torch.float32, -(-blocks // ABSMAX_BLOCK))
    offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=packed.device)
    return NF4(packed, absmax, absmax_scale, offset, block_size, (N, K)), dtype
