"""The NF4 codec on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends.cpu.extension import empty, kernels, threads, weight_view
from lora_kernels.reference import ABSMAX_BLOCK, dynamic_code
from lora_kernels.types import NF4


def quantize_nf4(weight: Tensor, block_size: int, double_quant: bool) -> NF4:
    """NF4 of a contiguous weight [N, K] of float32, bfloat16 or float16; see reference.quantize_nf4.

    A block with an element that is not finite gets an absmax that is not finite.
    """
    size = weight.numel()
    blocks = -(-size // block_size)
    packed = empty((size + 1) // 2, dtype=torch.uint8)
    absmax = empty(blocks)
    kernels.nf4_quantize(weight=weight, block_size=block_size, packed=packed, absmax=absmax, num_threads=threads())
    if not double_quant:
        return NF4(packed, absmax, None, None, block_size, tuple(weight.shape))
    offset = absmax.mean()
    codes = empty(blocks, dtype=torch.uint8)
    absmax_scale = empty(-(-blocks // ABSMAX_BLOCK))
    kernels.nf4_quantize_absmax(
        absmax=absmax,
        absmax_offset=offset.item(),
        absmax_code=dynamic_code(),
        codes=codes,
        absmax_scale=absmax_scale,
        num_threads=threads(),
    )
    return NF4(packed, codes, absmax_scale, offset, block_size, tuple(weight.shape))


def dequantize_nf4(weight: NF4, out: Tensor) -> None:
    """Writes the dense weight to out, [N, K] with contiguous rows; see reference.dequantize_nf4."""
    N, K = weight.shape
    decode(weight, slice(0, N), slice(0, K), out)


def decode(weight: NF4, rows: slice, cols: slice, out: Tensor) -> None:
    """Writes weight[rows, cols] to out, whose rows are contiguous."""
    kernels.nf4_dequantize(
        weight=weight_view(weight),
        row_first=rows.start,
        row_last=rows.stop,
        col_first=cols.start,
        col_last=cols.stop,
        out=out,
        num_threads=threads(),
    )
