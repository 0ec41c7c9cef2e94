"""Fused LoRA linear in Triton: two launches forward, at most four backward, no atomics, no saved dropout mask.

There is one more for a sum that is cut into parts (`configs.PARTS`; those of h are added up in the product), and for
an NF4 weight that is dequantised first. A group of layers has one h, one dlora_a and one dx.

Forward:   h = dropout(x) lora_aᵀ;  y = c ∘ (x Wᵀ + scaling (h ∘ lora_e) lora_bᵀ) + bias in one accumulator.
Backward:  dh and dlora_b in one pass over dy, an ordered sum of their partials, dlora_a, then
           dx = dy W + dropout'(dh lora_a). The mask is drawn again from (seed, offset) wherever it is needed.
           With a column scale c, a pass before it makes dc, and dz = c ∘ dy, which takes the place of dy.
Shapes and dtypes are those of `lora_kernels.reference`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.parts import ceil_div, in_parts
from lora_kernels.backends.triton import vendor
from lora_kernels.reference import dropout_scale, dropout_threshold
from lora_kernels.types import NF4, AdapterGradients, Dropout, Gradients, Layers, Needs, Outputs, Projection

from . import configs
from .common import INTERPRETED, Launcher, Tile, cast, dot, let_next_kernel_start, wait_for_kernel_before
from .nf4 import dequantize_nf4, load_tables, load_tile, tables

__all__ = [
    "INTERPRETED",
    "MAX_LAYERS",
    "beats_torch",
    "column_scale_bwd",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "takes",
]


@triton.jit
def _keep_mask(rng_ptr, m0, k0, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The [ROWS, COLS] tile of `reference.keep_mask` whose corner is (m0, k0); k0 is a multiple of 8."""
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    c0 = (k0 // 8 + tl.arange(0, COLS // 8)).to(tl.uint32)[None, :]
    c1 = (m0 + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    c2 = offset.to(tl.uint32)
    c3 = (offset >> 32).to(tl.uint32)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    zero = tl.zeros([ROWS, COLS // 8], tl.uint32)
    r0, r1, r2, r3 = tl.philox_impl(c0 + zero, c1 + zero, c2 + zero, c3 + zero, key0, key1, 7)
    # Lane j of a group of 8 is r[j % 4], low half for j < 4 and high half after.
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(ROWS, COLS // 8, 1, 4)
    shift = (tl.arange(0, 2) * 16).to(tl.uint32)[None, None, :, None]
    lanes = ((words >> shift) & 0xFFFF).to(tl.int32)
    return lanes.reshape(ROWS, COLS) >= threshold


@triton.jit(do_not_specialize=["threshold"])
def _h_kernel(
    x_ptr, lora_a_ptr, h_parts_ptr, rng_ptr, M, K, R, columns_per_split, threshold, inv_keep, stride_xm,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums [splits, M, R] of h = dropout(x) lora_aᵀ, each over columns_per_split columns of x."""
    if OVERLAPS:
        let_next_kernel_start()
    m0 = tl.program_id(0) * BLOCK_M
    pid_s = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_mask = (m0 + rows < M)[:, None]
    r_mask = (r < R)[None, :]
    first_column = pid_s * columns_per_split
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m0.to(tl.int64) * stride_xm + rows[:, None] * stride_xm + (first_column + k)[None, :]
    a_ptrs = lora_a_ptr + r.to(tl.int64)[None, :] * K + (first_column + k)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k0 in range(first_column, min(first_column + columns_per_split, K), BLOCK_K):
        k_left = K - k0
        x = tl.load(x_ptrs, mask=m_mask & (k[None, :] < k_left), other=0.0)
        a = cast(tl.load(a_ptrs, mask=r_mask & (k[:, None] < k_left), other=0.0), x.dtype)
        if HAS_DROPOUT:
            keep = _keep_mask(rng_ptr, m0, k0, threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, tl.zeros_like(x))
        acc = dot(x, a, acc, PRECISION)
        x_ptrs += BLOCK_K
        a_ptrs += BLOCK_K
    h_ptrs = h_parts_ptr + (pid_s.to(tl.int64) * M + m0 + rows)[:, None] * R + r[None, :]
    tl.store(h_ptrs, acc * inv_keep, mask=m_mask & r_mask)


@triton.jit
def _low_rank(
    acc, u_ptr, u_sum_ptr, lora_e_ptr, v_ptr, scale, m0, n0, M, N, R, parts, stride_up, stride_um, stride_vr, stride_vn,
    HAS_E: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + (scale u ∘ lora_e) v for the tile at (m0, n0); u [M, R] float32, v [R, N].

    With PARTS > 1, u is the sum of `parts` matrices, which the programs of the first columns store at u_sum.
    """
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        at = m.to(tl.int64)[:, None] * stride_um + r[None, :]
        mask = (m < M)[:, None] & (r < R)[None, :]
        if PARTS == 1:
            u = tl.load(u_ptr + at, mask=mask, other=0)
        else:
            p = tl.arange(0, PARTS)[:, None, None]
            u = tl.sum(tl.load(u_ptr + p * stride_up + at[None], mask=(p < parts) & mask[None], other=0), 0)
            if n0 == 0:
                tl.store(u_sum_ptr + at, u, mask=mask)
        u *= scale
        if HAS_E:
            u *= tl.load(lora_e_ptr + r, mask=r < R, other=0).to(tl.float32)[None, :]
        v_ptrs = v_ptr + r.to(tl.int64)[:, None] * stride_vr + n.to(tl.int64)[None, :] * stride_vn
        v = tl.load(v_ptrs, mask=(r < R)[:, None] & (n < N)[None, :], other=0)
        acc = dot(cast(u, DTYPE), cast(v, DTYPE), acc, PRECISION)
    return acc


@triton.jit
def _dropped_low_rank(
    u_ptr, v_ptr, rng_ptr, scale, threshold, m0, n0, M, N, R, stride_um, stride_vr, stride_vn,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """mask ∘ (scale u v) for the tile at (m0, n0).

    What a product starts from and not what it ends with: the masked term beside the product would take twice the
    registers.
    """
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    term = _low_rank(zero, u_ptr, None, None, v_ptr, scale, m0, n0, M, N, R, 1, 0, stride_um, stride_vr, stride_vn,
                     False, PRECISION, DTYPE, 1, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
    return tl.where(_keep_mask(rng_ptr, m0, n0, threshold, BLOCK_M, BLOCK_N), term, 0.0)


@triton.jit
def _split_columns(acc, ROWS: tl.constexpr, COLS: tl.constexpr):
    return acc.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()


@triton.jit
def _finish_scaled(
    acc, out_ptr, stride_om, column_scale_ptr, bias_ptr, m0, n0, M, N,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store column_scale ∘ acc + bias for a slice of columns."""
    n = n0 + tl.arange(0, BLOCK_N)
    acc *= tl.load(column_scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    _store_tile(out_ptr, stride_om, acc, m0, n0, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _load_tile(ptr, m0, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    return tl.load(ptr + m.to(tl.int64)[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def _store_tile(out_ptr, stride_om, value, m0, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + m0.to(tl.int64) * stride_om + rows[:, None] * stride_om + n[None, :]
    tl.store(out_ptrs, cast(value, out_ptr.dtype.element_ty), mask=(m0 + rows < M)[:, None] & (n < N)[None, :])


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of this program's tile, by groups of GROUP_M rows of tiles, so that neighbours in time share
    tiles of w in L2."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // per_group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    return (first_m + pid % per_group % group_m) * BLOCK_M, pid % per_group // group_m * BLOCK_N


@triton.jit
def _finish(
    acc, column_scale_ptr, bias_ptr, u_ptr, u_sum_ptr, lora_e_ptr, v_ptr, out_ptr, m0, n0, M, N, R, parts,
    scale, stride_up, stride_um, stride_vr, stride_vn, stride_om,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_E: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Store column_scale ∘ (acc + (scale u ∘ lora_e) v) + bias for the tile at (m0, n0); with dropout, acc alone."""
    if HAS_DROPOUT:
        tl.static_assert(not HAS_E and not HAS_BIAS and not HAS_SCALE and PARTS == 1)
    else:
        acc = _low_rank(acc, u_ptr, u_sum_ptr, lora_e_ptr, v_ptr, scale, m0, n0, M, N, R, parts, stride_up, stride_um,
                        stride_vr, stride_vn, HAS_E, PRECISION, DTYPE, PARTS, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
    if HAS_SCALE:
        # Scale and bias cost many registers beside the accumulator, so the columns are finished slice by slice.
        SLICE: tl.constexpr = BLOCK_N // SLICES
        if SLICES == 1:
            slices = (acc,)
        elif SLICES == 2:
            slices = _split_columns(acc, BLOCK_M, BLOCK_N)
        else:
            left, right = _split_columns(acc, BLOCK_M, BLOCK_N)
            slices = _split_columns(left, BLOCK_M, BLOCK_N // 2) + _split_columns(right, BLOCK_M, BLOCK_N // 2)
        for i in tl.static_range(SLICES):
            _finish_scaled(slices[i], out_ptr, stride_om, column_scale_ptr, bias_ptr, m0, n0 + i * SLICE, M, N,
                           HAS_BIAS, BLOCK_M, SLICE)  # fmt: skip
    else:
        if HAS_BIAS:
            n = n0 + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        _store_tile(out_ptr, stride_om, acc, m0, n0, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def _add_product(
    acc, x_ptr, w_ptr, m0, n0, M, N, K, stride_xm, stride_wn, stride_wk,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x w for the tile at (m0, n0); x [M, K], w [K, N] with strides (wk, wn)."""
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m0.to(tl.int64) * stride_xm + rows[:, None] * stride_xm + k[None, :]
    w_ptrs = w_ptr + n0.to(tl.int64) * stride_wn + k[:, None] * stride_wk + cols[None, :] * stride_wn
    m_mask = (m0 + rows < M)[:, None]
    n_mask = (n0 + cols < N)[None, :]
    for k0 in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=m_mask if EVEN_K else m_mask & (k[None, :] < K - k0), other=0.0)
        w = tl.load(w_ptrs, mask=n_mask if EVEN_K else n_mask & (k[:, None] < K - k0), other=0.0)
        acc = dot(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    return acc


@triton.jit
def _add_nf4_product(
    acc, x_ptr, w_ptr, absmax_ptr, absmax_scale_ptr, absmax_offset_ptr, tables_ptr, m0, n0, M, N, K, stride_xm,
    COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_add_product` of an NF4 weight, whose rows are the columns of w, or with COLUMNS its rows."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    DOUBLE_QUANT: tl.constexpr = absmax_scale_ptr is not None
    code, dynamic = load_tables(tables_ptr, DOUBLE_QUANT)
    absmax_offset = tl.load(absmax_offset_ptr) if DOUBLE_QUANT else 0.0
    rows = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m0.to(tl.int64) * stride_xm + rows[:, None] * stride_xm + k[None, :]
    m_mask = (m0 + rows < M)[:, None]
    for k0 in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=m_mask if EVEN_K else m_mask & (k[None, :] < K - k0), other=0.0)
        x_ptrs += BLOCK_K
        if COLUMNS:
            w = load_tile(w_ptr, absmax_ptr, absmax_scale_ptr, absmax_offset, code, dynamic, k0, n0, K, N,
                          BLOCK_SIZE, ALIGNED, BLOCK_K, BLOCK_N, EVEN_K, False)  # fmt: skip
            w = cast(w, DTYPE)
        else:
            w = load_tile(w_ptr, absmax_ptr, absmax_scale_ptr, absmax_offset, code, dynamic, n0, k0, N, K,
                          BLOCK_SIZE, ALIGNED, BLOCK_N, BLOCK_K, False, EVEN_K)  # fmt: skip
            w = cast(w, DTYPE).T
        acc = dot(x, w, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["threshold", "parts"])
def _gemm_kernel(
    x_ptr, w_ptr, x1_ptr, w1_ptr, x2_ptr, w2_ptr, absmax_ptr, absmax_scale_ptr, absmax_offset_ptr, tables_ptr,
    column_scale_ptr, bias_ptr, u_ptr, u_sum_ptr, lora_e_ptr, v_ptr, rng_ptr, product_ptr, out_ptr,
    M, N, K, K1, K2, R, parts, scale, threshold, stride_xm, stride_wn, stride_wk, stride_x1m, stride_w1n, stride_w1k,
    stride_x2m, stride_w2n, stride_w2k, stride_up, stride_um, stride_vr, stride_vn, stride_om,
    WEIGHT: tl.constexpr, BLOCK_SIZE: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_E: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, OVERLAPS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """out [M, N] = column_scale ∘ (x [M, K] w + dropout((scale u ∘ lora_e) v)) + bias, the rank term after the K loop,
    with dropout before it.

    Forward: x, Wᵀ, h, lora_bᵀ, without dropout. Backward: dy, W, dh, lora_a (and N, K change places); of a group also
    x1 w1 and x2 w2, the dy and W of its other layers.
    WEIGHT says what w is: "dense"; "nf4_rows", NF4 whose rows are the columns of out (forward); "nf4_cols", NF4 whose
    columns are (backward). BLOCK_SIZE and ALIGNED are those of `nf4.load_tile`. With product [M, N] in float32, that is
    the large product already, and K is zero.
    With OVERLAPS, the kernel before may still run until the K loop is done: it must write nothing that this one reads
    before, with dropout not even u.
    """
    if OVERLAPS:
        let_next_kernel_start()
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    m0, n0 = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if HAS_DROPOUT:
        acc = _dropped_low_rank(u_ptr, v_ptr, rng_ptr, scale, threshold, m0, n0, M, N, R, stride_um, stride_vr,
                                stride_vn, PRECISION, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
        if product_ptr is not None:
            acc += _load_tile(product_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N)
    elif product_ptr is not None:
        acc = _load_tile(product_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if WEIGHT == "dense":
        acc = _add_product(acc, x_ptr, w_ptr, m0, n0, M, N, K, stride_xm, stride_wn, stride_wk,
                           EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        if x1_ptr is not None:
            acc = _add_product(acc, x1_ptr, w1_ptr, m0, n0, M, N, K1, stride_x1m, stride_w1n, stride_w1k,
                               EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        if x2_ptr is not None:
            acc = _add_product(acc, x2_ptr, w2_ptr, m0, n0, M, N, K2, stride_x2m, stride_w2n, stride_w2k,
                               EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        acc = _add_nf4_product(acc, x_ptr, w_ptr, absmax_ptr, absmax_scale_ptr, absmax_offset_ptr, tables_ptr,
                               m0, n0, M, N, K, stride_xm, WEIGHT == "nf4_cols", BLOCK_SIZE, ALIGNED,
                               EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    if OVERLAPS:
        wait_for_kernel_before()
    _finish(acc, column_scale_ptr, bias_ptr, u_ptr, u_sum_ptr, lora_e_ptr, v_ptr, out_ptr, m0, n0, M, N, R,
            parts, scale, stride_up, stride_um, stride_vr, stride_vn, stride_om,
            HAS_SCALE, HAS_BIAS, HAS_E, HAS_DROPOUT, PRECISION, DTYPE, PARTS,
            BLOCK_M, BLOCK_N, BLOCK_R, SLICES)  # fmt: skip


@triton.jit
def _add_fetched_product(
    acc, x_desc, w_desc, m0, n0, K, W_ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """`_add_product` of tiles that the copy engine (TMA) fetches; it fills with zeros what is outside."""
    for k0 in range(0, K, BLOCK_K):
        x = x_desc.load([m0, k0])
        if W_ROWS:  # noqa: SIM108
            w = w_desc.load([n0, k0]).T
        else:
            w = w_desc.load([k0, n0])
        acc = dot(x, w, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["threshold", "parts"])
def _tma_gemm_kernel(
    x_desc, w_desc, x1_desc, w1_desc, x2_desc, w2_desc, column_scale_ptr, bias_ptr, u_ptr, u_sum_ptr, lora_e_ptr, v_ptr,
    rng_ptr, out_ptr, M, N, K, K1, K2, R, parts, scale, threshold, stride_up, stride_um, stride_vr, stride_vn,
    stride_om, W_ROWS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_E: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, OVERLAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """_gemm_kernel of dense weights, tiles fetched by the copy engine.

    W_ROWS says that the rows of w_desc are the columns of out.
    """
    if OVERLAPS:
        let_next_kernel_start()
    DTYPE: tl.constexpr = x_desc.dtype
    m0, n0 = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if HAS_DROPOUT:
        acc = _dropped_low_rank(u_ptr, v_ptr, rng_ptr, scale, threshold, m0, n0, M, N, R, stride_um, stride_vr,
                                stride_vn, PRECISION, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R)  # fmt: skip
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _add_fetched_product(acc, x_desc, w_desc, m0, n0, K, W_ROWS, PRECISION, BLOCK_K)
    if x1_desc is not None:
        acc = _add_fetched_product(acc, x1_desc, w1_desc, m0, n0, K1, W_ROWS, PRECISION, BLOCK_K)
    if x2_desc is not None:
        acc = _add_fetched_product(acc, x2_desc, w2_desc, m0, n0, K2, W_ROWS, PRECISION, BLOCK_K)
    if OVERLAPS:
        wait_for_kernel_before()
    _finish(acc, column_scale_ptr, bias_ptr, u_ptr, u_sum_ptr, lora_e_ptr, v_ptr, out_ptr, m0, n0, M, N, R,
            parts, scale, stride_up, stride_um, stride_vr, stride_vn, stride_om,
            HAS_SCALE, HAS_BIAS, HAS_E, HAS_DROPOUT, PRECISION, DTYPE, PARTS,
            BLOCK_M, BLOCK_N, BLOCK_R, SLICES)  # fmt: skip


@triton.jit
def _dh_dlora_b_kernel(
    dy_ptr, h_ptr, lora_b_ptr, dh_parts_ptr, db_parts_ptr, de_parts_ptr, M, N, R, rows_per_split, stride_dym, stride_hm,
    NEED_DH: tl.constexpr, NEED_DB: tl.constexpr, NEED_DE: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums of dy lora_b (over BLOCK_N columns) and dyᵀ h (over rows_per_split rows) from one read of dy.

    Parts carry neither scaling nor lora_e: dh_parts [column blocks, M, R], db_parts [splits, N, R] and, since
    dlora_e = Σ_n lora_b ∘ (dyᵀ h), de_parts [splits * column blocks, R].
    """
    if OVERLAPS:
        let_next_kernel_start()
    pid_n = tl.program_id(0)
    pid_s = tl.program_id(1)
    n0 = pid_n * BLOCK_N
    cols = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = (r < R)[None, :]
    n_mask = n0 + cols < N
    nr_mask = n_mask[:, None] & r_mask
    b_ptrs = lora_b_ptr + (n0 + cols).to(tl.int64)[:, None] * R + r[None, :]
    b = cast(tl.load(b_ptrs, mask=nr_mask, other=0.0), dy_ptr.dtype.element_ty)
    g = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    first_row = pid_s * rows_per_split
    dy_ptrs = dy_ptr + first_row.to(tl.int64) * stride_dym + rows[:, None] * stride_dym + (n0 + cols)[None, :]
    for m0 in range(first_row, min(first_row + rows_per_split, M), BLOCK_M):
        m_mask = (m0 + rows < M)[:, None]
        m = (m0 + rows).to(tl.int64)
        dy = tl.load(dy_ptrs, mask=m_mask & n_mask[None, :], other=0.0)
        if NEED_DH:
            dh = dot(dy, b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PRECISION)
            dh_ptrs = dh_parts_ptr + (pid_n.to(tl.int64) * M + m)[:, None] * R + r[None, :]
            tl.store(dh_ptrs, dh, mask=m_mask & r_mask)
        if NEED_DB or NEED_DE:
            h = tl.load(h_ptr + m[:, None] * stride_hm + r[None, :], mask=m_mask & r_mask, other=0.0)
            g = dot(tl.trans(dy), cast(h, dy.dtype), g, PRECISION)
        dy_ptrs += BLOCK_M * stride_dym
    if NEED_DB:
        db_ptrs = db_parts_ptr + (pid_s.to(tl.int64) * N + n0 + cols)[:, None] * R + r[None, :]
        tl.store(db_ptrs, g, mask=nr_mask)
    if NEED_DE:
        b = tl.load(b_ptrs, mask=nr_mask, other=0.0).to(tl.float32)
        de_ptrs = de_parts_ptr + (pid_s * tl.num_programs(0) + pid_n).to(tl.int64) * R + r
        tl.store(de_ptrs, tl.sum(g * b, 0), mask=r < R)


@triton.jit
def _sum_parts(
    parts_ptr, out_ptr, lora_e_ptr, block, parts, length, R, stride_out, scaling,
    HAS_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """out = scaling lora_e[i % R] Σ_p parts[p, i] for one block of i, always in the same order; out has rows of R."""
    i = block.to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    acc = tl.zeros([BLOCK_P, BLOCK_L], tl.float32)
    for p0 in range(0, parts, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        ptrs = parts_ptr + p.to(tl.int64)[:, None] * length + i[None, :]
        acc += tl.load(ptrs, mask=(p < parts)[:, None] & (i < length)[None, :], other=0.0)
    total = tl.sum(acc, 0) * scaling
    if HAS_E:
        total *= tl.load(lora_e_ptr + i % R, mask=i < length, other=0.0).to(tl.float32)
    tl.store(out_ptr + i // R * stride_out + i % R, cast(total, out_ptr.dtype.element_ty), mask=i < length)


@triton.jit(do_not_specialize=["dh_blocks", "db_blocks", "column_blocks", "splits"])
def _reduce_kernel(
    dh_parts_ptr, db_parts_ptr, de_parts_ptr, dh_ptr, dlora_b_ptr, dlora_e_ptr, lora_e_ptr,
    dh_blocks, db_blocks, column_blocks, splits, M, N, R, stride_dhm, scaling,
    NEED_DH: tl.constexpr, NEED_DB: tl.constexpr, NEED_DE: tl.constexpr, HAS_E: tl.constexpr, OVERLAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dh, dlora_b and dlora_e from the partial sums of _dh_dlora_b_kernel; each program finishes one block of one."""
    if OVERLAPS:
        wait_for_kernel_before()
    pid = tl.program_id(0)
    if NEED_DH:  # noqa: SIM102
        if pid < dh_blocks:
            _sum_parts(dh_parts_ptr, dh_ptr, lora_e_ptr, pid, column_blocks, M * R, R, stride_dhm, scaling,
                       HAS_E, BLOCK_P, BLOCK_L)  # fmt: skip
    if NEED_DB:  # noqa: SIM102
        if (pid >= dh_blocks) & (pid < dh_blocks + db_blocks):
            _sum_parts(db_parts_ptr, dlora_b_ptr, lora_e_ptr, pid - dh_blocks, splits, N * R, R, R, scaling,
                       HAS_E, BLOCK_P, BLOCK_L)  # fmt: skip
    if NEED_DE:  # noqa: SIM102
        if pid >= dh_blocks + db_blocks:
            _sum_parts(de_parts_ptr, dlora_e_ptr, lora_e_ptr, pid - dh_blocks - db_blocks, splits * column_blocks, R,
                       R, R, scaling, False, BLOCK_P, BLOCK_L)  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def _dlora_a_kernel(
    x_ptr, dh_ptr, da_parts_ptr, rng_ptr, M, K, R, rows_per_split, threshold, inv_keep, stride_xm,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums [splits, R, K] of dlora_a = dhᵀ dropout(x), each over rows_per_split rows."""
    if OVERLAPS:
        let_next_kernel_start()
    k0 = tl.program_id(0) * BLOCK_K
    pid_s = tl.program_id(1)
    k = k0 + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_row = pid_s * rows_per_split
    rows = tl.arange(0, BLOCK_M)
    r_mask = (r < R)[:, None]
    k_mask = (k < K)[None, :]
    x_ptrs = x_ptr + first_row.to(tl.int64) * stride_xm + rows[:, None] * stride_xm + k[None, :]
    dh_ptrs = dh_ptr + first_row.to(tl.int64) * R + rows[None, :] * R + r[:, None]
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for m0 in range(first_row, min(first_row + rows_per_split, M), BLOCK_M):
        m_left = M - m0
        x = tl.load(x_ptrs, mask=(rows < m_left)[:, None] & k_mask, other=0.0)
        dh = cast(tl.load(dh_ptrs, mask=(rows < m_left)[None, :] & r_mask, other=0.0), x.dtype)
        if HAS_DROPOUT:
            keep = _keep_mask(rng_ptr, m0, k0, threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, tl.zeros_like(x))
        acc = dot(dh, x, acc, PRECISION)
        x_ptrs += BLOCK_M * stride_xm
        dh_ptrs += BLOCK_M * R
    acc *= inv_keep
    out_ptrs = da_parts_ptr + (pid_s.to(tl.int64) * R + r)[:, None] * K + k[None, :]
    tl.store(out_ptrs, cast(acc, da_parts_ptr.dtype.element_ty), mask=r_mask & k_mask)


@triton.jit
def _column_scale_bwd_kernel(
    dy_ptr, y_ptr, bias_ptr, column_scale_ptr, dz_ptr, dscale_parts_ptr, M, N, rows_per_split, stride_dym,
    HAS_BIAS: tl.constexpr, NEED_DSCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz = dy ∘ c and dscale_parts [splits, N] of Σ_m dy ∘ (y - bias) / c, one program for rows_per_split rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    n_mask = n < N
    scale = tl.load(column_scale_ptr + n, mask=n_mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = cast(tl.load(bias_ptr + n, mask=n_mask, other=0.0), tl.float32)
    first_row = tl.program_id(1) * rows_per_split
    for m0 in range(first_row, min(first_row + rows_per_split, M), BLOCK_M):
        m = (m0 + rows).to(tl.int64)
        mask = (m < M)[:, None] & n_mask[None, :]
        dy = cast(tl.load(dy_ptr + m[:, None] * stride_dym + n[None, :], mask=mask, other=0.0), tl.float32)
        at = m[:, None] * N + n[None, :]
        tl.store(dz_ptr + at, cast(dy * scale[None, :], dz_ptr.dtype.element_ty), mask=mask)
        if NEED_DSCALE:
            y = cast(tl.load(y_ptr + at, mask=mask, other=0.0), tl.float32)
            if HAS_BIAS:
                y -= bias[None, :]
            acc += dy * y
    if NEED_DSCALE:
        total = tl.where(scale == 0.0, 0.0, tl.sum(acc, 0) / tl.where(scale == 0.0, 1.0, scale))
        tl.store(dscale_parts_ptr + tl.program_id(1).to(tl.int64) * N + n, total, mask=n_mask)


@functools.lru_cache
def _multiprocessors(index: int) -> int:
    """Of the device of this index; 2 for the interpreter, whose index is -1."""
    return torch.cuda.get_device_properties(index).multi_processor_count if index >= 0 else 2


def _dequantized(weight: NF4, x: Tensor) -> Tensor:
    dense = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    dequantize_nf4(weight, dense)
    return dense


class _Kind(NamedTuple):
    """What the launches of a call have in common, besides their sizes."""

    family: str
    multiprocessors: int
    is_float32: bool
    precision: str
    has_dropout: bool
    # Whether a product starts while the kernel before it still runs.
    overlaps: bool

    def constants(
        self, kernel: str, rank: int, depth: int = 0, rows: int = 0, columns: int = 0, **flags: int | str
    ) -> dict[str, Any]:
        """`flags`, and what `configs.lookup` says."""
        return flags | configs.lookup(self.family, kernel, rank, self.is_float32, depth, rows, columns)

    def split(self, kernel: str, programs: int, length: int, step: int, most: int = 1 << 31) -> tuple[int, int]:
        """`in_parts` for the sum of `kernel`, into `most` parts at most."""
        parts = configs.PARTS[kernel]
        target, least = parts.programs * self.multiprocessors, max(parts.least, ceil_div(length, most))
        return in_parts(length, step, programs, target, parts.worth, least)


class _Plan(NamedTuple):
    """What the sizes decide of a launch; a sum is cut into `parts` of this `length`."""

    grid: tuple[int, int, int]
    constants: dict[str, Any]
    parts: int = 1
    length: int = 0


# Asked before every launch, by sizes that come back.
@functools.lru_cache(maxsize=4096)
def planned(plan: Callable[..., Any], *sizes: Any) -> Any:
    """plan(*sizes)"""
    return plan(*sizes)


def _plan_h(kind: _Kind, m: int, k: int, rank: int) -> _Plan:
    constants = kind.constants(
        "h", rank, k, m, HAS_DROPOUT=kind.has_dropout, PRECISION=kind.precision, OVERLAPS=kind.overlaps
    )
    row_blocks, rank_blocks = ceil_div(m, constants["BLOCK_M"]), ceil_div(rank, constants["BLOCK_R"])
    most = configs.most_parts_of_h(m)
    parts, length = kind.split("h", row_blocks * rank_blocks, k, constants["BLOCK_K"], most)
    return _Plan((row_blocks, parts, rank_blocks), constants, parts, length)


def _plan_product(
    kind: _Kind, kernel: str, rank: int, depth: int, m: int, n: int, has_scale: bool, has_bias: bool, has_e: bool,
    has_dropout: bool, overlaps: bool, parts: int, weight: tuple[str, int, bool] | bool,
) -> _Plan:  # fmt: skip
    """`weight`: WEIGHT, BLOCK_SIZE and ALIGNED, or of tiles that the copy engine fetches W_ROWS."""
    constants = kind.constants(
        kernel, rank, depth, m, n, HAS_SCALE=has_scale, HAS_BIAS=has_bias, HAS_E=has_e, HAS_DROPOUT=has_dropout,
        PRECISION=kind.precision, OVERLAPS=overlaps, PARTS=1 << (parts - 1).bit_length(),
    )  # fmt: skip
    if isinstance(weight, bool):
        constants["W_ROWS"] = weight
        # The copy engine fills up what the last block lacks.
        del constants["EVEN_K"]
    else:
        constants |= zip(("WEIGHT", "BLOCK_SIZE", "ALIGNED"), weight, strict=True)
    if overlaps:
        constants["launch_pdl"] = True
    return _Plan((configs.tiles(constants, m, n), 1, 1), constants)


def _plan_dh_dlora_b(
    kind: _Kind, m: int, n: int, rank: int, need_dh: bool, need_db: bool, need_de: bool, has_e: bool
) -> tuple[_Plan, _Plan, int, int]:
    """Of the parts and of their sum; then how many blocks of the sum make dh, and how many dlora_b."""
    flags = {"NEED_DH": need_dh, "NEED_DB": need_db, "NEED_DE": need_de, "OVERLAPS": kind.overlaps}
    constants = kind.constants("dh_dlora_b", rank, PRECISION=kind.precision, **flags)
    column_blocks = ceil_div(n, constants["BLOCK_N"])
    parts, length = kind.split("dh_dlora_b", column_blocks, m, constants["BLOCK_M"])
    first = _Plan((column_blocks, parts, ceil_div(rank, constants["BLOCK_R"])), constants, parts, length)
    constants = kind.constants("reduce", rank, HAS_E=has_e, **flags)
    if kind.overlaps:
        constants["launch_pdl"] = True
    dh_blocks = ceil_div(m * rank, constants["BLOCK_L"]) if need_dh else 0
    db_blocks = ceil_div(n * rank, constants["BLOCK_L"]) if need_db else 0
    de_blocks = ceil_div(rank, constants["BLOCK_L"]) if need_de else 0
    return first, _Plan((dh_blocks + db_blocks + de_blocks, 1, 1), constants), dh_blocks, db_blocks


def _plan_dlora_a(kind: _Kind, m: int, k: int, rank: int) -> _Plan:
    constants = kind.constants(
        "dlora_a", rank, rows=m, HAS_DROPOUT=kind.has_dropout, PRECISION=kind.precision, OVERLAPS=kind.overlaps
    )
    column_blocks, rank_blocks = ceil_div(k, constants["BLOCK_K"]), ceil_div(rank, constants["BLOCK_R"])
    parts, length = kind.split("dlora_a", column_blocks * rank_blocks, m, constants["BLOCK_M"])
    return _Plan((column_blocks, parts, rank_blocks), constants, parts, length)


class _LoraLauncher(Launcher):
    """Adds what launches of `lora_linear` share: their kind and dropout arguments."""

    def __init__(self, x: Tensor, dropout: Dropout | None, by_vendor: bool) -> None:
        super().__init__("x", x)
        self.by_vendor = by_vendor
        self.threshold, self.inv_keep, self.rng = 0, 1.0, None
        if dropout is not None:
            self.threshold, self.inv_keep = dropout_threshold(dropout.p), dropout_scale(dropout.p)
            self.rng = dropout.rng
        is_float32, precision = x.dtype == torch.float32, "ieee"
        if is_float32 and not torch.version.hip:
            precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        overlaps = configs.overlaps(self.family)
        self.kind = _Kind(
            self.family, _multiprocessors(self.index), is_float32, precision, self.threshold > 0, overlaps
        )

    def h(self, x: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor | None]:
        """(h [M, R] = dropout(x) lora_aᵀ, None), or with many columns (h, which `product` is to make, the matrices
        [parts, M, R] whose sum it is)."""
        (m, k), rank = x.shape, lora_a.shape[0]
        plan = planned(_plan_h, self.kind, m, k, rank)
        h = torch.empty((m, rank), dtype=torch.float32, device=x.device)
        parts = None
        if plan.parts > 1:
            parts = torch.empty((plan.parts, m, rank), dtype=torch.float32, device=x.device)
        if rank:
            made = h if parts is None else parts
            args = (x, lora_a, made, self.rng, m, k, rank, plan.length, self.threshold, self.inv_keep, x.stride(0))
            self.launch(_h_kernel, plan.grid, args, plan.constants)
        return h, parts

    def product(
        self, terms: list[_Term], column_scale: Tensor | None, bias: Tensor | None, u: Tensor, u_parts: Tensor | None,
        lora_e: Tensor | None, v: Tensor, out: Tensor, scale: float, backward: bool = False, may_overlap: bool = True,
    ) -> None:  # fmt: skip
        """out = column_scale ∘ (Σ x Wᵀ + (scale u ∘ lora_e) v) + bias, or backward Σ x W + dropout(scale u v), over the
        terms (x, W).

        v [R, N] has any strides. W [N, K] is dense with any strides, or NF4. With u_parts [parts, M, R], u [M, R] is
        made: their sum. With `by_vendor` the large product is the vendor's, and finished by our kernel.
        may_overlap: whether the kernel before makes nothing that this one reads, but for u when forward.
        """
        (x, first), n = terms[0], out.shape[1]
        m = x.shape[0]
        dropout = backward and self.threshold > 0
        overlaps = self.kind.overlaps and may_overlap and v.shape[0] > 0 and not self.by_vendor
        is_whole = self.by_vendor or len(terms) > 1 or not configs.decodes_inside(self.family, m, backward)
        nf4 = first if isinstance(first, NF4) and not is_whole else None
        if nf4 is None and any(isinstance(weight, NF4) for _, weight in terms):
            overlaps = False
        # Of an NF4 weight that the kernel decodes, its bytes.
        matrices = [
            (x, weight if isinstance(weight, Tensor) else _dequantized(weight, x) if nf4 is None else weight.packed)
            for x, weight in terms
        ]
        product = None
        if self.by_vendor:
            products = (vendor.product(x, weight if backward else weight.T) for x, weight in matrices)
            product = functools.reduce(Tensor.add_, products)
            x, weight = matrices[0]
            matrices = [(x[:, :0], weight[:0] if backward else weight[:, :0])]
        depths = [x.shape[1] for x, _ in matrices]
        kernel, stored = "gemm", ("dense", 1, True)
        nf4_parts: tuple[Tensor | None, ...] = (None, None, None, None)
        rows = None
        if nf4 is not None:
            aligned = nf4.shape[1] % nf4.block_size == 0
            kernel = "nf4_cols" if backward else "nf4_rows"
            stored = (kernel, nf4.block_size, aligned)
            kernel = kernel if aligned else "nf4_ragged"
            nf4_parts = (*nf4.tensors[1:], tables(x.device))
        else:
            rows = self.by_tma(matrices, m, n, backward)
        if product is not None:
            kernel = "finish"
        elif rows is not None:
            kernel = "tma_gemm"
        none = _TERMS - len(matrices)
        rng = self.rng if dropout else None
        parts, made, stride_up = 1, None, 0
        if u_parts is not None:
            parts, made, stride_up = len(u_parts), u, u_parts.stride(0)
        plan = planned(
            _plan_product, self.kind, kernel, v.shape[0], math.gcd(*depths), m, n, column_scale is not None,
            bias is not None, lora_e is not None, dropout, overlaps, parts, stored if rows is None else rows,
        )  # fmt: skip
        depths += [0] * none
        low_rank = (u if u_parts is None else u_parts, made, lora_e, v)
        if rows is not None:
            config = plan.constants
            w_block = config["BLOCK_N" if rows else "BLOCK_K"], config["BLOCK_K" if rows else "BLOCK_N"]
            tiled: list[Tile] = []
            for x, weight in matrices:
                weight = weight if weight.stride(1) == 1 else weight.T
                tiled += (Tile(x, config["BLOCK_M"], config["BLOCK_K"]), Tile(weight, *w_block))
            args = (
                *tiled, *[None] * (2 * none), column_scale, bias, *low_rank, rng, out, m, n, *depths, v.shape[0], parts,
                scale, self.threshold, stride_up, u.stride(0), *v.stride(), out.stride(0),
            )  # fmt: skip
            self.launch(_tma_gemm_kernel, plan.grid, args, config)
            return
        strides: list[int] = []
        for x, weight in matrices:
            wn, wk = (0, 0) if nf4 is not None else weight.stride()
            strides += (x.stride(0), wk, wn) if backward else (x.stride(0), wn, wk)
        args = (
            *itertools.chain(*matrices), *[None] * (2 * none), *nf4_parts, column_scale, bias, *low_rank, rng, product,
            out, m, n, *depths, v.shape[0], parts, scale, self.threshold, *strides, *[0] * (3 * none), stride_up,
            u.stride(0), *v.stride(), out.stride(0),
        )  # fmt: skip
        self.launch(_gemm_kernel, plan.grid, args, plan.constants)

    def by_tma(self, terms: list[tuple[Tensor, Tensor]], m: int, n: int, backward: bool) -> bool | None:
        """None where the copy engine can't fetch the tiles or gains nothing; else whether the columns of the result are
        the rows of the weights as they lie in memory."""
        if self.kind.is_float32 or not configs.by_tma(self.family, m, n) or not terms[0][0].shape[1]:
            return None
        ways = set()
        for x, weight in terms:
            stored = weight if weight.stride(1) == 1 else weight.T
            if any(t.stride(1) != 1 or t.stride(0) % 8 or t.data_ptr() % 16 for t in (x, stored)):
                return None
            ways.add((stored is weight) != backward)
        return ways.pop() if len(ways) == 1 else None

    def dh_dlora_b(
        self, dy: Tensor, h: Tensor, layer: Projection, dh: Tensor | None, need_db: bool, need_de: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dlora_b, dlora_e) of one layer, and dh [M, R] where it is not None."""
        (m, n), rank = dy.shape, layer.lora_b.shape[1]

        device = dy.device

        def empty(shape: tuple[int, ...], when: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=device) if when else None

        need_dh = dh is not None
        plan, of_sum, dh_blocks, db_blocks = planned(
            _plan_dh_dlora_b, self.kind, m, n, rank, need_dh, need_db, need_de, layer.lora_e is not None
        )
        column_blocks, splits = plan.grid[0], plan.parts
        dh_parts = empty((column_blocks, m, rank), need_dh)
        db_parts = empty((splits, n, rank), need_db)
        de_parts = empty((splits * column_blocks, rank), need_de)
        dlora_b = empty((n, rank), need_db, layer.lora_b.dtype)
        dlora_e = None if layer.lora_e is None else empty((rank,), need_de, layer.lora_e.dtype)
        if not rank or not (need_dh or need_db or need_de):
            return dlora_b, dlora_e
        parts = (dh_parts, db_parts, de_parts)
        args = (dy, h, layer.lora_b, *parts, m, n, rank, plan.length, dy.stride(0), h.stride(0))
        self.launch(_dh_dlora_b_kernel, plan.grid, args, plan.constants)
        of_reduce = (
            *parts, dh, dlora_b, dlora_e, layer.lora_e, dh_blocks, db_blocks, column_blocks, splits, m, n, rank,
            0 if dh is None else dh.stride(0), layer.scaling,
        )  # fmt: skip
        self.launch(_reduce_kernel, of_sum.grid, of_reduce, of_sum.constants)
        return dlora_b, dlora_e

    def dlora_a(self, x: Tensor, dh: Tensor, dtype: torch.dtype) -> Tensor:
        """Matrices [parts, R, K] whose sum is dhᵀ dropout(x); in float32, or a single one in `dtype`."""
        (m, k), rank = x.shape, dh.shape[1]
        plan = planned(_plan_dlora_a, self.kind, m, k, rank)
        made = dtype if plan.parts == 1 else torch.float32
        parts = torch.empty((plan.parts, rank, k), dtype=made, device=x.device)
        if rank:
            args = (x, dh, parts, self.rng, m, k, rank, plan.length, self.threshold, self.inv_keep, x.stride(0))
            self.launch(_dlora_a_kernel, plan.grid, args, plan.constants)
        return parts


# x and the weight that multiplies it
_Term = tuple[Tensor, Tensor | NF4]
# So many products the kernels add up: the layers of a group.
_TERMS = 3
MAX_LAYERS = _TERMS


def takes(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16) and (INTERPRETED or x.device.type != "cpu")


def beats_torch(x: Tensor, weight: Tensor) -> bool:
    """The vendor's product, which torch takes, is never slower."""
    return False


def _columns(layers: Layers) -> list[slice]:
    """The columns of each layer's h in that of all."""
    ends = list(itertools.accumulate((layer.lora_a.shape[0] for layer in layers), initial=0))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _one_below_the_other(layers: Layers) -> Tensor:
    each = [layer.lora_a for layer in layers]
    return each[0] if len(each) == 1 else torch.cat(each)


def lora_linear_fwd(x: Tensor, layers: Layers, dropout: Dropout | None, by_vendor: bool = False) -> Outputs:
    """y [M, N] in the dtype of x and h = dropout(x) lora_aᵀ [M, R] in float32 of each of at most MAX_LAYERS layers, in
    one launch for all h, which are columns of one matrix, and one for each y.

    A sum over many columns of x is cut into parts, which the second launch adds up. With `by_vendor` the large product
    is the vendor's (`lora_kernels.backends.triton.vendor`); else see `lora_kernels.reference.lora_linear_fwd`. Raises
    TypeError for other dtypes than float32, float16, bfloat16 and RuntimeError for CPU tensors outside Triton's
    interpreter.
    """
    run = _LoraLauncher(x, dropout, by_vendor)
    ys = [torch.empty((x.shape[0], layer.weight.shape[0]), dtype=x.dtype, device=x.device) for layer in layers]
    with run.device:
        h, parts = run.h(x, _one_below_the_other(layers))
        hs, all_parts = [h], [parts]
        if len(layers) > 1:
            hs = [h[:, columns] for columns in _columns(layers)]
            all_parts = [None if parts is None else parts[:, :, columns] for columns in _columns(layers)]
        for layer, y, h, parts in zip(layers, ys, hs, all_parts, strict=True):
            run.product(
                [(x, layer.weight)], layer.column_scale, layer.bias, h, parts, layer.lora_e, layer.lora_b.T, y,
                layer.scaling,
            )  # fmt: skip
    return Outputs(ys, hs)


def column_scale_bwd(
    dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dz = dy ∘ c and, with y, dc in float32: one pass, and an ordered sum of its [splits, N] parts.

    Arguments are those of `lora_kernels.reference.column_scale_bwd`; errors as in `lora_linear_fwd`.
    """
    run = Launcher("dy", dy)
    m, n = dy.shape
    config = configs.lookup(run.family, "column_scale_bwd", 0, False)
    column_blocks = ceil_div(n, config["BLOCK_N"])
    # As many programs as for the kernel that reads dy next; each of its rows costs little, so more would be no gain.
    splits, rows_per_split = in_parts(m, config["BLOCK_M"], column_blocks, 2 * _multiprocessors(run.index))
    dz = torch.empty((m, n), dtype=dy.dtype, device=dy.device)
    parts = None if y is None else torch.empty((splits, n), dtype=torch.float32, device=dy.device)
    with run.device:
        run.launch(
            _column_scale_bwd_kernel, (column_blocks, splits, 1),
            (dy, y, bias, column_scale, dz, parts, m, n, rows_per_split, dy.stride(0)),
            {"HAS_BIAS": bias is not None, "NEED_DSCALE": y is not None, **config},
        )  # fmt: skip
    return dz, None if parts is None else parts.sum(0)


def lora_linear_bwd(
    dys: Sequence[Tensor], x: Tensor, hs: Sequence[Tensor], layers: Layers, dropout: Dropout | None, needs: Needs,
    by_vendor: bool = False,
) -> Gradients:  # fmt: skip
    """See `lora_kernels.reference.lora_linear_bwd`, and `lora_linear_fwd` for the errors.

    dx is the sum over the layers, rounded once as one layer's is, and x is read once for all dlora_a.
    """
    run = _LoraLauncher(x, dropout, by_vendor)
    (m, k), columns = x.shape, _columns(layers)
    need_a = any(need.lora_a for need in needs.layers)
    dh = dx = None
    if needs.x or need_a:
        dh = torch.empty((m, columns[-1].stop), dtype=torch.float32, device=x.device)
    gradients = []
    with run.device:
        for dy, h, layer, ranks, need in zip(dys, hs, layers, columns, needs.layers, strict=True):
            part = dh if dh is None or len(layers) == 1 else dh[:, ranks]
            gradients.append(AdapterGradients(None, *run.dh_dlora_b(dy, h, layer, part, need.lora_b, need.lora_e)))
        if dh is None:
            return Gradients(None, gradients)
        lora_a = _one_below_the_other(layers)
        if need_a:
            parts = run.dlora_a(x, dh, lora_a.dtype)
        if needs.x:
            dx = torch.empty((m, k), dtype=x.dtype, device=x.device)
            terms = [(dy, layer.weight) for dy, layer in zip(dys, layers, strict=True)]
            # Where dlora_a comes between, dh is there before this starts.
            run.product(terms, None, None, dh, None, None, lora_a, dx, run.inv_keep, backward=True, may_overlap=need_a)
        if need_a:
            # After dx, whose kernel may overlap with the one that made the parts.
            dlora_a = parts.view(lora_a.shape) if len(parts) == 1 else parts.sum(0).to(lora_a.dtype)
            for own, layer, ranks, need in zip(gradients, layers, columns, needs.layers, strict=True):
                part = dlora_a if len(layers) == 1 else dlora_a[ranks].to(layer.lora_a.dtype)
                own.lora_a = part if need.lora_a else None
    return Gradients(dx, gradients)
