"""NF4 weights in Triton: the codec, and the decoding of one tile that the GEMMs of `lora_linear` do in their K loop.

The layout, the arithmetic and its roundings are those of `lora_kernels.reference`, bit for bit in the codec.
An element is looked up by tl.gather in a table of 16: one conflict-free read of shared memory and two integer
operations, where a tree of selects takes twenty operations and outweighs the matrix product.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.parts import ceil_div
from lora_kernels.reference import (
    ABSMAX_BLOCK,
    NF4_SMALLEST_ABSMAX,
    dynamic_code,
    nf4_code,
)
from lora_kernels.types import NF4

from . import configs
from .common import Launcher, cast

_ABSMAX_BLOCK = tl.constexpr(ABSMAX_BLOCK)
_SMALLEST_ABSMAX = tl.constexpr(NF4_SMALLEST_ABSMAX)


@functools.lru_cache
def tables(device: torch.device) -> Tensor:
    """float32 [272] on the device: NF4_CODE, then dynamic_code()."""
    return torch.cat([nf4_code(), dynamic_code()]).to(device)


@functools.lru_cache
def _midpoints(device: torch.device) -> Tensor:
    """float32 [272] on the device: the midpoints of NF4_CODE, then of dynamic_code(), each with +inf at its end."""
    ends = [torch.cat([(code[:-1] + code[1:]) / 2, code.new_tensor([torch.inf])])
            for code in (nf4_code(), dynamic_code())]  # fmt: skip
    return torch.cat(ends).to(device)


@triton.jit
def load_tables(tables_ptr, DOUBLE_QUANT: tl.constexpr):
    """NF4_CODE [16], and dynamic_code() [256] where the scales are in it."""
    code = tl.load(tables_ptr + tl.arange(0, 16))
    return code, tl.load(tables_ptr + 16 + tl.arange(0, 256)) if DOUBLE_QUANT else code


@triton.jit
def _load_scales(absmax_ptr, absmax_scale_ptr, offset, dynamic, first, i, mask, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The scales [ROWS, COLS] of the blocks first + i; `first` int64, `i` int32."""
    absmax = tl.load(absmax_ptr + first + i, mask=mask, other=0)
    if absmax_scale_ptr is not None:
        code = tl.gather(dynamic, absmax.to(tl.int32).reshape(ROWS * COLS), 0).reshape(ROWS, COLS)
        inner = (first % _ABSMAX_BLOCK).to(tl.int32) + i
        scale = tl.load(absmax_scale_ptr + first // _ABSMAX_BLOCK + inner // _ABSMAX_BLOCK, mask=mask, other=0)
        absmax = code * scale + offset
    return absmax


@triton.jit
def _decode_blocks(packed, scales, code, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """float32 [BLOCKS, SIZE] from bytes [BLOCKS, SIZE // 2] and scales [BLOCKS, 1]."""
    index = tl.join(packed >> 4, packed & 15).reshape(BLOCKS * SIZE)
    return tl.gather(code, index.to(tl.int32), 0).reshape(BLOCKS, SIZE) * scales


@triton.jit
def _inside(rows, row_limit, cols, col_limit, EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr):
    if EVEN_ROWS:
        return cols < col_limit
    elif EVEN_COLS:
        return rows < row_limit
    else:
        return (rows < row_limit) & (cols < col_limit)


@triton.jit
def load_tile(
    packed_ptr, absmax_ptr, absmax_scale_ptr, offset, code, dynamic, row0, col0, N, K,
    BLOCK_SIZE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr,
):  # fmt: skip
    """Elements [row0, row0 + ROWS) x [col0, col0 + COLS) of the weight [N, K], finite float32; beyond it anything.

    ALIGNED: K is a multiple of BLOCK_SIZE, so that rows start at a byte and a block, and col0 one of COLS. EVEN_ROWS or
    EVEN_COLS: no element of the tile lies beyond the weight in that direction; at most one of the two.
    """
    start = (tl.full([], 0, tl.int64) + row0) * K + col0
    first = start // BLOCK_SIZE
    if ALIGNED:
        # One line for each part of a row that lies in one block.
        # Not min(), which makes no constant before Triton 3.6.
        SIZE: tl.constexpr = COLS if COLS < BLOCK_SIZE else BLOCK_SIZE
        PARTS: tl.constexpr = COLS // SIZE
        line = tl.arange(0, ROWS * PARTS)[:, None]
        row = line // PARTS
        col = line % PARTS * SIZE
        pairs = tl.arange(0, SIZE // 2)[None, :]
        mask = _inside(row, N - row0, col, K - col0, EVEN_ROWS, EVEN_COLS)
        packed = tl.load(packed_ptr + start // 2 + (row * (K // 2) + col // 2 + pairs), mask=mask, other=0)
        scales = _load_scales(absmax_ptr, absmax_scale_ptr, offset, dynamic, first,
                              row * (K // BLOCK_SIZE) + col // BLOCK_SIZE, mask, ROWS * PARTS, 1)  # fmt: skip
        return _decode_blocks(packed, scales, code, ROWS * PARTS, SIZE).reshape(ROWS, COLS)
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = _inside(rows, N - row0, cols, K - col0, EVEN_ROWS, EVEN_COLS)
    i = (start % BLOCK_SIZE).to(tl.int32) + (rows * K + cols)
    packed = tl.load(packed_ptr + first * (BLOCK_SIZE // 2) + i // 2, mask=mask, other=0)
    index = (packed >> ((1 - i % 2) * 4).to(tl.uint8)) & 15
    values = tl.gather(code, index.to(tl.int32).reshape(ROWS * COLS), 0).reshape(ROWS, COLS)
    return values * _load_scales(absmax_ptr, absmax_scale_ptr, offset, dynamic, first, i // BLOCK_SIZE, mask,
                                 ROWS, COLS)  # fmt: skip


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, absmax_scale_ptr, absmax_offset_ptr, tables_ptr, out_ptr, size,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Blocks [pid BLOCKS, (pid + 1) BLOCKS) of the flat weight. Launched without contraction to fma."""
    DOUBLE_QUANT: tl.constexpr = absmax_scale_ptr is not None
    code, dynamic = load_tables(tables_ptr, DOUBLE_QUANT)
    offset = tl.load(absmax_offset_ptr) if DOUBLE_QUANT else 0.0
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = size - first * BLOCK_SIZE
    blocks = tl.arange(0, BLOCKS)[:, None]
    pairs = blocks * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    packed = tl.load(packed_ptr + first * (BLOCK_SIZE // 2) + pairs, mask=2 * pairs < left, other=0)
    scales = _load_scales(absmax_ptr, absmax_scale_ptr, offset, dynamic, first, blocks, blocks * BLOCK_SIZE < left,
                          BLOCKS, 1)  # fmt: skip
    values = _decode_blocks(packed, scales, code, BLOCKS, BLOCK_SIZE)
    i = blocks * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out_ptr + first * BLOCK_SIZE + i, cast(values, out_ptr.dtype.element_ty), mask=i < left)


@triton.jit
def _reciprocal(absmax):
    # The smallest is denormal; as a bare constant Triton would widen it, and the result, to float64.
    smallest = tl.full(absmax.shape, _SMALLEST_ABSMAX, tl.float32)
    return tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.maximum(absmax, smallest))


@triton.jit
def _quantize_kernel(
    weight_ptr, packed_ptr, absmax_ptr, midpoints_ptr, size, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Codes and scales of blocks [pid BLOCKS, (pid + 1) BLOCKS) of the flat weight."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = size - first * BLOCK_SIZE
    blocks = tl.arange(0, BLOCKS)
    i = blocks[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    weight = cast(tl.load(weight_ptr + first * BLOCK_SIZE + i, mask=i < left, other=0.0), tl.float32)
    # tl.max ignores a nan, which must show in the scale.
    absmax = tl.max(tl.where(weight == weight, tl.abs(weight), float("inf")), 1)
    scaled = weight * _reciprocal(absmax)[:, None]
    codes = tl.zeros([BLOCKS, BLOCK_SIZE], tl.int32)
    for j in tl.static_range(15):
        codes += (scaled > tl.load(midpoints_ptr + j)).to(tl.int32)
    high, low = codes.reshape(BLOCKS, BLOCK_SIZE // 2, 2).split()
    pairs = blocks[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(packed_ptr + first * (BLOCK_SIZE // 2) + pairs, ((high << 4) | low).to(tl.uint8), mask=2 * pairs < left)
    tl.store(absmax_ptr + first + blocks, absmax, mask=blocks * BLOCK_SIZE < left)


@triton.jit
def _quantize_absmax_kernel(
    absmax_ptr, offset_ptr, codes_ptr, absmax_scale_ptr, midpoints_ptr, blocks, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """8-bit codes and the scale of the 256 block scales of one program, less their mean over the whole weight."""
    pid = tl.program_id(0)
    i = pid.to(tl.int64) * _ABSMAX_BLOCK + tl.arange(0, _ABSMAX_BLOCK)
    centred = tl.load(absmax_ptr + i, mask=i < blocks, other=0.0) - tl.load(offset_ptr)
    centred = tl.where(i < blocks, centred, 0.0)
    absmax_scale = tl.max(tl.abs(centred), 0)
    scaled = centred * _reciprocal(absmax_scale)
    codes = tl.zeros([_ABSMAX_BLOCK], tl.int32)
    for j in range(0, 256, BLOCK_L):
        midpoints = tl.load(midpoints_ptr + j + tl.arange(0, BLOCK_L))
        codes += tl.sum((scaled[:, None] > midpoints[None, :]).to(tl.int32), 1)
    tl.store(codes_ptr + i, codes.to(tl.uint8), mask=i < blocks)
    tl.store(absmax_scale_ptr + pid, absmax_scale)


def quantize_nf4(weight: Tensor, block_size: int, double_quant: bool) -> NF4:
    """NF4 of a contiguous weight [N, K] of float32, bfloat16 or float16, in one launch.

    Double quantisation takes another, after torch's mean of the scales. The bits are those of
    `lora_kernels.reference.quantize_nf4`; an element that is not finite makes the scale of its block infinite.
    Raises as `Launcher`.
    """
    run = Launcher("weight", weight)
    size = weight.numel()
    blocks = ceil_div(size, block_size)
    packed = torch.empty((size + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    midpoints = _midpoints(weight.device)
    with run.device:
        config = configs.codec(run.family, "quantize", block_size)
        _quantize_kernel[(ceil_div(blocks, config["BLOCKS"]),)](
            weight, packed, absmax, midpoints, size, BLOCK_SIZE=block_size, **config
        )
        if not double_quant:
            return NF4(packed, absmax, None, None, block_size, tuple(weight.shape))
        offset = absmax.mean()
        codes = torch.empty(blocks, dtype=torch.uint8, device=weight.device)
        absmax_scale = torch.empty(ceil_div(blocks, ABSMAX_BLOCK), dtype=torch.float32, device=weight.device)
        _quantize_absmax_kernel[(absmax_scale.numel(),)](
            absmax, offset, codes, absmax_scale, midpoints[16:], blocks,
            **configs.codec(run.family, "quantize_absmax", block_size),
        )  # fmt: skip
    return NF4(packed, codes, absmax_scale, offset, block_size, tuple(weight.shape))


def dequantize_nf4(weight: NF4, out: Tensor) -> None:
    """Writes the dense weight to the contiguous `out` [N, K], in one launch, also under double quantisation.

    The bits are those of `lora_kernels.reference.dequantize_nf4`. Raises as `Launcher`.
    """
    run = Launcher("out", out)
    config = configs.codec(run.family, "dequantize", weight.block_size)
    blocks = weight.absmax.numel()
    with run.device:
        run.launch(
            _dequantize_kernel, (ceil_div(blocks, config["BLOCKS"]), 1, 1),
            (weight.packed, weight.absmax, weight.absmax_scale, weight.absmax_offset, tables(out.device), out,
             out.numel()),
            {"BLOCK_SIZE": weight.block_size, **config},
        )  # fmt: skip
