"""bitsandbytes' 4-bit layers, whose packed weights our kernels read where they are.

bitsandbytes itself is not imported: where there is one of its layers, somebody has.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.ops.nf4 import BLOCK_SIZES, NF4Weight
from lora_kernels.reference import ABSMAX_BLOCK, dynamic_code, nf4_code
from lora_kernels.types import NF4

# Rows that bitsandbytes interleaves where it packs a weight for a CPU with AVX512-BF16.
_ROWS = 32


def is_linear4bit(module: nn.Module) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def not_nf4(linear: Any) -> str | None:
    """Why our kernels can't read the weight of this Linear4bit; None where they can."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return "its weight isn't quantised yet; move the layer to its device first"
    if state.quant_type != "nf4":
        return f"its weight is in {state.quant_type.upper()}"
    if tuple(state.shape) != (linear.out_features, linear.in_features):
        return f"its weight was quantised as {list(state.shape)}"
    if linear.weight.is_meta:
        return "its weight is offloaded"
    if state.blocksize not in BLOCK_SIZES or not torch.equal(state.code.float().cpu(), nf4_code()):
        return f"its weight has another code than NF4's, or blocks of {state.blocksize}"
    nested = state.state2 if state.nested else None
    if nested is None:
        return None
    if nested.blocksize != ABSMAX_BLOCK or not torch.equal(nested.code.float().cpu(), dynamic_code()):
        return f"its scales have another code than the dynamic one, or blocks of {nested.blocksize}"
    return None


def in_place(linear: Any, kept: NF4Weight | None) -> NF4Weight:
    """The weight of a Linear4bit, which is NF4, over the memory in which bitsandbytes keeps it: `kept`, if that is it.

    What bitsandbytes has packed for its CPU kernel, which it does in evaluation, is laid out as before: the same codes,
    and the scales as that packing has rounded them, to bfloat16.
    """
    weight = linear._parameters["weight"]
    # Its class takes every use of the tensor through Python.
    with torch._C.DisableTorchFunctionSubclass():
        if kept is not None:
            packed, absmax, _, _ = kept.parts
            if absmax is weight.quant_state.absmax and packed.data_ptr() == weight.data_ptr():
                return kept
        # Of inference mode nothing could be kept for backward.
        with torch.no_grad(), torch.inference_mode(False):
            return _in_place(linear, weight)


def _in_place(linear: Any, weight: Any) -> NF4Weight:
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        _unpack(weight)
    scale, offset = (state.state2.absmax, state.offset) if state.nested else (None, None)
    packed = weight.detach().as_subclass(Tensor).view(-1).view(torch.uint8)
    parts = NF4(packed, state.absmax, scale, offset, state.blocksize, (linear.out_features, linear.in_features))
    return NF4Weight(parts, state.dtype)


def _unpack(weight: Any) -> None:
    """Undoes bitsandbytes' _convert_weight_packed_for_cpu.

    Its own inverse quantises double-quantised scales again, and leaves the others as they are.
    """
    state = weight.quant_state
    N, K = state.shape
    # A byte holds the codes of one element in the first half of the rows, and in the second half.
    packed = weight.detach().as_subclass(Tensor).view(N // _ROWS, K // 2, _ROWS)
    codes = torch.stack([packed & 15, packed >> 4], 2).view(N // _ROWS, K // 2, _ROWS, 2).transpose(1, 2)
    plain = (codes[..., 0] << 4 | codes[..., 1]).reshape(state.original_qshape)
    weight.data = plain.view(getattr(state, "original_storage_type", None) or torch.uint8)
    state.absmax = state.absmax.t().reshape(-1).float()
    state.dtype = state.original_dtype
    state.packing_format_for_cpu = False
