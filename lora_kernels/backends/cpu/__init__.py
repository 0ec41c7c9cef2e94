"""The CPU backend: C++ kernels for everything low-rank, for NF4, and for products where torch's are slower.

Per layer, forward and backward, the kernels read x twice and dy once. Dropout is drawn inside, in registers, from
(seed, offset).

y and dx must be rounded once, after the low-rank term is in: a bfloat16 sum loses a term that is smaller than half a
unit of its last place. So the product with the frozen weight runs

- by our own kernel, which converts or decodes the weight in cache, a piece at a time, and takes the low-rank term
  (without dropout that of dx too) as a continuation of the sum: in bfloat16 where x is and this processor has
  instructions for it that we use, else in float32;
- in bfloat16 by torch where this processor has other hardware for it, with the low-rank term inside the same product:
  y = [x, h] [W, scaling · lora_b]ᵀ, and dx likewise;
- in float32 by torch where its product may be faster than ours (`own_rows`), in place for float32; a kernel then adds
  the low-rank term while a block of rows is in cache.

The weight comes to torch in panels: W itself where it is dense and of the right dtype, else some rows of it (columns,
for dx) at a time, converted or decoded into a buffer that is kept. With up to 8 rows in x, as in generation, and no
dropout one call of C++ does the whole layer.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.cpu import memory as recycling
from lora_kernels.reference import (
    ABSMAX_BLOCK,
    adamw_columns,
    dropout_scale,
    dropout_threshold,
    dynamic_code,
    scale_gradient,
)
from lora_kernels.types import NF4, AdamWGroup, Projection

ISA_ENVIRONMENT_VARIABLE = "LORA_KERNELS_CPU_ISA"

unavailable: str | None = None
try:
    from lora_kernels import _C
except ImportError as error:
    unavailable = f"the C++ extension lora_kernels._C can't be imported ({error})"
else:
    _DTYPES = {torch.float32: _C.FLOAT32, torch.bfloat16: _C.BFLOAT16, torch.float16: _C.FLOAT16}
    if isa := os.environ.get(ISA_ENVIRONMENT_VARIABLE):
        try:
            _C.set_isa(isa)
        except ValueError as error:
            unavailable = f"environment variable {ISA_ENVIRONMENT_VARIABLE}: {error}"

# Elements of a panel of the weight: large enough for torch's products, small enough to stay in a cache.
_PANEL = 1 << 20
# Elements of the float32 rows of dx that wait for the low-rank term.
_BASE = 1 << 23

# Rows and layers up to which `few_rows_layers` goes.
LAYER_ROWS, MAX_LAYERS = (0, 0) if unavailable else (_C.LAYER_ROWS, _C.MAX_LAYERS)

_buffers = threading.local()


class OwnRows(NamedTuple):
    """Rows of x, or of dy, up to which our own product is taken instead of torch's."""

    converted: int  # an NF4 or 16-bit weight
    native: int  # the same, where x is bfloat16 and the processor could multiply that
    forward: int  # a dense float32 weight
    backward: int


# Where it was measured, and for the other instruction sets what can't be far off.
_OWN_ROWS = {"avx2": OwnRows(1 << 62, 16, 1 << 62, 1 << 62)}
_OWN_ROWS_ELSEWHERE = OwnRows(128, 16, 32, 0)


def own_rows() -> OwnRows:
    return _OWN_ROWS.get(_C.get_isa(), _OWN_ROWS_ELSEWHERE)


def own_bfloat16() -> bool:
    """Whether our own product of bfloat16 is taken: by AMX. With other hardware for it torch's is."""
    return _C.get_isa() == "avx512" and _C.amx_enabled()


@cache
def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu._is_avx512_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _launch(kernel: str, **arguments) -> None:
    """Call a kernel of _C, which reads tensors where they are; this frame keeps them alive until it has returned."""
    getattr(_C, kernel)(**arguments, num_threads=torch.get_num_threads())


def _check(x: Tensor, *adapters: Tensor | None) -> None:
    if not x.is_cpu:
        raise ValueError(f"the cpu backend got x on {x.device}; it takes CPU tensors only")
    if x.dtype not in _DTYPES:
        raise ValueError(f"the cpu backend got x of {x.dtype}; it takes float32, bfloat16 and float16")
    for adapter in adapters:
        if adapter is not None and adapter.dtype not in (torch.float32, x.dtype):
            raise ValueError(f"adapter weights are {adapter.dtype}; allowed: torch.float32 and x's {x.dtype}")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty, whatever the default dtype and device are: kernels write to its address."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _buffer(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory that this thread keeps: freshly allocated, its pages would cost more than what is written to them."""
    size, key = math.prod(shape), (name, dtype)
    kept = getattr(_buffers, "kept", None)
    if kept is None:
        kept = _buffers.kept = {}
    if key not in kept or kept[key].numel() < size:
        kept[key] = _empty(size, dtype=dtype)
    return kept[key][:size].view(shape)


def _weight(weight: Tensor | NF4) -> _C.Weight:
    """The C++ view of weight, which must outlive it."""
    if isinstance(weight, NF4):
        return _C.Weight.nf4(*weight, dynamic_code())
    return _C.Weight.dense(weight)


def _copy_weight(weight: Tensor | NF4, rows: slice, cols: slice, out: Tensor) -> None:
    """out = weight[rows, cols] in the dtype of out, whose rows are contiguous."""
    if not isinstance(weight, NF4):
        out.copy_(weight[rows, cols])
        return
    _launch(
        "nf4_dequantize",
        weight=_weight(weight),
        row_first=rows.start,
        row_last=rows.stop,
        col_first=cols.start,
        col_last=cols.stop,
        out=out,
    )


def _steps(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _part(t: Tensor, rows: slice) -> Tensor:
    return t if rows == slice(0, t.shape[0]) else t[rows]


def _panels(
    weights: Sequence[Tensor | NF4], dtype: torch.dtype, by_columns: bool, extra: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(range, W[range]) in `dtype` over the rows of W [N, K], or (range, W[:, range]) over its columns.

    By columns, W may be several weights below each other. `extra` [N, R], or [R, K] by columns, is put beside (below)
    W. A panel holds until the next one is asked for.
    """
    first = weights[0]
    if extra is None and not isinstance(first, NF4) and first.dtype == dtype:
        yield slice(0, first.shape[by_columns]), first
        return
    N, K = sum(weight.shape[0] for weight in weights), first.shape[1]
    size, depth = (K, N) if by_columns else (N, K)
    R = 0 if extra is None else extra.shape[not by_columns]
    step = max(32, _PANEL // depth // 32 * 32)
    for part in _steps(size, step):
        width = part.stop - part.start
        if by_columns:
            panel = _buffer("panel", dtype, N + R, width)
            row = 0
            for weight in weights:
                rows = weight.shape[0]
                _copy_weight(weight, slice(0, rows), part, panel[row : row + rows])
                row += rows
            if extra is not None:
                panel[N:] = extra[:, part]
        else:
            panel = _buffer("panel", dtype, width, K + R)
            _copy_weight(first, part, slice(0, K), panel[:, :K])
            if extra is not None:
                panel[:, K:] = extra[part]
        yield part, panel


def own_dtype(weight: Tensor | NF4, M: int, native: bool, forward: bool = True) -> torch.dtype | None:
    """In which dtype our own product reads M rows of x, or of dy, by this weight; None where torch's is taken."""
    dense = not isinstance(weight, NF4)
    if dense and weight.stride(1) != 1:
        return None
    if native and own_bfloat16():
        return torch.bfloat16
    limits = own_rows()
    if dense and weight.dtype == torch.float32:
        limit = limits.forward if forward else limits.backward
    else:
        limit = limits.native if native else limits.converted
    return torch.float32 if limit >= M else None


def _product(
    terms: Sequence[tuple[Tensor | NF4, Tensor, float]],
    out: Tensor,
    transposed: bool = False,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """out = column_scale ∘ Σ factor · x Wᵀ + bias over the terms (W, x, factor), rounded once; `transposed` x W.

    All x are float32, or all bfloat16, to which factor · W is then rounded; column_scale and bias are float32; the rows
    of W, x and out are contiguous. NF4 takes a factor of 1. No size may be 0.
    """
    terms = [(_weight(weight), x, factor) for weight, x, factor in terms]
    _launch("product", terms=terms, transposed=transposed, column_scale=column_scale, bias=bias, out=out)


def _low_rank_fwd(
    base: Tensor,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    y: Tensor,
    column_scale: Tensor | None = None,
) -> None:
    """y = column_scale ∘ (base + scaling · h lora_bᵀ) + bias, rounded once; base may be y."""
    if h.shape[1] == 0 and bias is None and column_scale is None and base.data_ptr() == y.data_ptr():
        return
    tensors = {"base": base, "column_scale": column_scale, "bias": bias, "h": h, "lora_b": lora_b, "y": y}
    _launch("lora_b_fwd", **tensors, scaling=scaling)


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor | NF4,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
    lora_e: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    column_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = c ∘ (x Wᵀ + scaling · ((dropout(x) Aᵀ) ∘ e) Bᵀ) + bias and h = dropout(x) Aᵀ; see reference.lora_linear_fwd.

    x [M, K] and y [M, N] are float32, bfloat16 or float16; adapters float32 or the dtype of x; h [M, R] and c =
    column_scale [N] are float32. y is rounded once (before c too, where there is one and torch multiplies bfloat16).
    Raises ValueError for other dtypes and for tensors that are not on the CPU.
    """
    layer = Projection(weight, lora_a, lora_b, scaling, bias, lora_e, column_scale)
    return lora_linear_group_fwd(x, [layer], dropout_p, rng)[0]


def lora_linear_group_fwd(
    x: Tensor, layers: Sequence[Projection], dropout_p: float, rng: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """(y, h) of `lora_linear_fwd` for each layer. dropout(x) is one for all of them, and x is read once for all h."""
    for layer in layers:
        _check(x, layer.lora_a, layer.lora_b, layer.lora_e)
    M = x.shape[0]
    if M <= LAYER_ROWS and not dropout_p and len(layers) <= MAX_LAYERS and all(map(in_one_pass, layers)):
        hs = [_empty(M, layer.lora_a.shape[0]) for layer in layers]
        return list(zip(few_rows_layers(x, [few_rows_layer(layer) for layer in layers], hs), hs, strict=True))
    native = x.dtype == torch.bfloat16 and native_bfloat16()
    x32 = None
    results = []
    for layer, h in zip(layers, _lora_a_fwd(x, layers, dropout_p, rng), strict=True):
        weight, _, lora_b, scaling, bias, lora_e, column_scale = layer
        he = h if lora_e is None else h * lora_e.float()
        bias32 = None if bias is None else bias.float()
        y = recycling.empty(M, weight.shape[0], dtype=x.dtype)
        results.append((y, h))
        own = own_dtype(weight, M, native)
        if native and own is None:
            wide_x = torch.cat([x, he.to(x.dtype)], dim=1)
            for cols, panel in _panels([weight], x.dtype, by_columns=False, extra=scaling * lora_b.float()):
                if bias is None or column_scale is not None:
                    torch.mm(wide_x, panel.T, out=y[:, cols])
                else:
                    torch.addmm(bias[cols], wide_x, panel.T, out=y[:, cols])
            if column_scale is not None:
                _low_rank_fwd(y, bias32, h[:, :0], lora_b[:, :0], scaling, y, column_scale)
            continue

        if own != torch.bfloat16 and x32 is None:
            x32 = x.float()
        if own is not None:
            terms = [(weight, x if own == torch.bfloat16 else x32, 1.0)]
            if lora_b.shape[1]:
                terms.append((lora_b, he.to(own), scaling))
            _product(terms, y, False, column_scale, bias32)
            continue
        for cols, panel in _panels([weight], torch.float32, by_columns=False):
            base = y[:, cols] if y.dtype == torch.float32 else _buffer("base", torch.float32, M, panel.shape[0])
            torch.mm(x32, panel.T, out=base)
            bias_part, scale_part = (None if t is None else t[cols] for t in (bias32, column_scale))
            _low_rank_fwd(base, bias_part, he, lora_b[cols], scaling, y[:, cols], scale_part)
    return results


def in_one_pass(layer: Projection) -> bool:
    """Whether `few_rows_layer` takes the layer: its weight must have contiguous rows."""
    return isinstance(layer.weight, NF4) or layer.weight.stride(1) == 1


def few_rows_layer(layer: Projection) -> _C.FewRowsLayer:
    """The C++ view of a layer, whose contiguous tensors must outlive it and stay where they are."""
    return _C.FewRowsLayer(_weight(layer.weight), *layer[1:])


def few_rows_layers(x: Tensor, layers: Sequence[_C.FewRowsLayer], hs: Sequence[Tensor] = ()) -> list[Tensor]:
    """y [..., N] of each layer for x [..., K] of up to LAYER_ROWS rows; writes h [M, R] to `hs` where given."""
    *shape, K = x.shape
    ys = [_empty(*shape, layer.N, dtype=x.dtype) for layer in layers]
    # Not by _launch, whose names would take as long as the kernel for a small layer.
    ld_x = x.stride(0) if len(shape) == 1 else K
    _C.layers_forward(layers, ys, hs, x, math.prod(shape), ld_x, torch.get_num_threads())
    return ys


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _lora_a_fwd(x: Tensor, layers: Sequence[Projection], dropout_p: float, rng: Tensor | None) -> list[Tensor]:
    """h = dropout(x) Aᵀ [M, R] of each layer."""
    lora_a = _side_by_side([layer.lora_a for layer in layers], 0)
    h = _empty(x.shape[0], lora_a.shape[0])
    if h.shape[1]:
        _launch("lora_a_fwd", x=x, lora_a=lora_a, h=h, threshold=dropout_threshold(dropout_p), rng=rng)
    if len(layers) == 1:
        return [h]
    return [part.contiguous() for part in h.split([layer.lora_a.shape[0] for layer in layers], dim=1)]


def column_scale_bwd(
    dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dz = dy ∘ c and dc = Σ_m dy ∘ (y - bias) / c in one pass; see reference.column_scale_bwd. dc is float32."""
    _check(dy)
    M, N = dy.shape
    dz = recycling.empty(M, N, dtype=dy.dtype)
    total = None if y is None else column_scale.new_empty(N)
    bias32 = None if bias is None else bias.float()
    _launch("column_scale_bwd", dy=dy, y=y, bias=bias32, column_scale=column_scale, dz=dz, total=total)
    return dz, None if total is None else scale_gradient(total, column_scale)


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor | NF4,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    lora_e: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx, dlora_a, dlora_b, dlora_e) of lora_linear_fwd, None where ``needs`` says False.

    See reference.lora_linear_bwd for the formulas. dx is rounded once (twice where dropout hit it and bfloat16 is
    native), adapter gradients are accumulated in float32 and rounded to their adapter's dtype. The result depends on
    torch.get_num_threads() but not on timing.
    """
    layer = Projection(weight, lora_a, lora_b, scaling, None, lora_e)
    dx, (adapter,) = lora_linear_group_bwd([dy], x, [h], [layer], dropout_p, rng, needs[0], [needs[1:]])
    return dx, *adapter


def lora_linear_group_bwd(
    dys: Sequence[Tensor],
    x: Tensor,
    hs: Sequence[Tensor],
    layers: Sequence[Projection],
    dropout_p: float,
    rng: Tensor | None,
    need_x: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None, Tensor | None]]]:
    """dx, and (dlora_a, dlora_b, dlora_e) of each layer, of lora_linear_group_fwd; a layer's needs are in that order.

    dx is the sum over the layers, rounded once as one layer's is, and x is read once for all dlora_a.
    """
    ranks = [layer.lora_a.shape[0] for layer in layers]
    need_a = sum(ranks) > 0 and any(need for need, *_ in needs)
    dhs, grads = [], []
    for dy, h, layer, layer_needs in zip(dys, hs, layers, needs, strict=True):
        dh, dlora_b, dlora_e = _lora_b_bwd(dy, x, h, layer, need_x or need_a, *layer_needs[1:])
        dhs.append(dh)
        grads.append([None, dlora_b, dlora_e])
    if not (need_x or need_a):
        return None, [tuple(grad) for grad in grads]
    dx, dlora_a = _lora_a_bwd(dys, x, _side_by_side(dhs, 1), layers, dropout_p, rng, need_x, need_a)
    if need_a:
        parts = [dlora_a] if len(layers) == 1 else dlora_a.split(ranks)
        for grad, part, layer, (need, *_) in zip(grads, parts, layers, needs, strict=True):
            grad[0] = part.to(layer.lora_a.dtype) if need else None
    return dx, [tuple(grad) for grad in grads]


def _lora_b_bwd(
    dy: Tensor, x: Tensor, h: Tensor, layer: Projection, need_h: bool, need_b: bool, need_e: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh [M, R], dlora_b and dlora_e of one layer."""
    _check(x, layer.lora_a, layer.lora_b, layer.lora_e)
    lora_b, lora_e = layer.lora_b, layer.lora_e
    need_e = need_e and lora_e is not None
    (M, N), R = dy.shape, lora_b.shape[1]
    dhe = _empty(M, R) if need_h or need_e else None
    dlora_b = _empty(N, R) if need_b else None
    if R and (dhe is not None or dlora_b is not None):
        he = h if lora_e is None else h * lora_e.float()
        _launch("lora_b_bwd", dy=dy, h=he, lora_b=lora_b, scaling=layer.scaling, dh=dhe, dlora_b=dlora_b)
    dlora_e = (h * dhe).sum(0).to(lora_e.dtype) if need_e else None
    dh = dhe if lora_e is None or dhe is None else dhe * lora_e.float()
    return dh, None if dlora_b is None else dlora_b.to(lora_b.dtype), dlora_e


def _lora_a_bwd(
    dys: Sequence[Tensor],
    x: Tensor,
    dh: Tensor,
    layers: Sequence[Projection],
    dropout_p: float,
    rng: Tensor | None,
    need_x: bool,
    need_a: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx, and dlora_a [R, K] in float32, the layers' ranks below each other as they are beside each other in dh."""
    lora_a = _side_by_side([layer.lora_a for layer in layers], 0)
    weights = [layer.weight for layer in layers]
    (M, K), R = x.shape, lora_a.shape[0]
    threshold = dropout_threshold(dropout_p)
    native = x.dtype == torch.bfloat16 and native_bfloat16()
    kinds = {own_dtype(weight, M, native, forward=False) for weight in weights}
    # One weight that torch must multiply takes the others of its group along.
    own = next(iter(kinds)) if len(kinds) == 1 else None
    native_dx = need_x and (own == torch.bfloat16 or (native and kinds == {None}))
    dx = recycling.empty(M, K, dtype=x.dtype) if need_x else None
    finish_dx = need_x
    # Of 16 bits, so many that their copies in float32 stay small.
    rows_at_once = M if x.dtype == torch.float32 else max(512, _BASE // K)
    if native_dx and own is not None:
        terms = [(weight, dy, 1.0) for weight, dy in zip(weights, dys, strict=True)]
        if R:
            terms.append((lora_a, dh.to(own), dropout_scale(dropout_p)))
        _product(terms, dx, transposed=True)
        finish_dx = threshold > 0
    elif native_dx:
        wide_dy = torch.cat([*dys, dh.to(x.dtype)], dim=1)
        for cols, panel in _panels(weights, x.dtype, True, extra=dropout_scale(dropout_p) * lora_a.float()):
            torch.mm(wide_dy, panel, out=dx[:, cols])
        finish_dx = threshold > 0
    elif need_x and own is not None and not threshold:
        for rows in _steps(M, rows_at_once):
            terms = _terms_of_dx([_part(dy, rows) for dy in dys], weights)
            if R:
                terms.append((lora_a, _part(dh, rows), 1.0))
            _product(terms, _part(dx, rows), transposed=True)
        finish_dx = False
    if not (finish_dx or need_a):
        return dx, None

    dlora_a = None
    for rows in _steps(M, rows_at_once if finish_dx else M):
        base = own_dx = None
        if finish_dx:
            own_dx = _part(dx, rows)
            base = (
                own_dx if native_dx else _base_of_dx([_part(dy, rows) for dy in dys], weights, own_dx, own is not None)
            )
        if R == 0 and base is not None and base.dtype == dx.dtype:
            continue
        block = _empty(R, K) if need_a else None
        _launch(
            "lora_a_bwd",
            x=_part(x, rows),
            dh=_part(dh, rows),
            lora_a=lora_a,
            dlora_a=block,
            base=base,
            dx=own_dx if finish_dx else None,
            undo_dropped=native_dx,
            first_row=rows.start,
            threshold=threshold,
            rng=rng,
        )
        dlora_a = block if dlora_a is None else dlora_a.add_(block)
    return dx, dlora_a


def _terms_of_dx(dys: Sequence[Tensor], weights: Sequence[Tensor | NF4]) -> list[tuple[Tensor | NF4, Tensor, float]]:
    return [(weight, _float32(dy), 1.0) for weight, dy in zip(weights, dys, strict=True)]


def _float32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float32 else recycling.empty(*t.shape, dtype=torch.float32).copy_(t)


def _base_of_dx(dys: Sequence[Tensor], weights: Sequence[Tensor | NF4], dx: Tensor, own: bool) -> Tensor:
    """Σ dy W in float32: in dx itself if that is float32, else in a buffer."""
    base = dx if dx.dtype == torch.float32 else _buffer("base", torch.float32, *dx.shape)
    if own:
        _product(_terms_of_dx(dys, weights), base, transposed=True)
        return base
    for index, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        dy32 = dy.float()
        for cols, panel in _panels([weight], torch.float32, by_columns=True):
            out = base[:, cols]
            if index:
                out.addmm_(dy32, panel)
            else:
                torch.mm(dy32, panel, out=out)
    return base


def quantize_nf4(weight: Tensor, block_size: int, double_quant: bool) -> NF4:
    """NF4 of a contiguous weight [N, K] of float32, bfloat16 or float16; see reference.quantize_nf4.

    A block with an element that is not finite gets an absmax that is not finite.
    """
    size = weight.numel()
    blocks = -(-size // block_size)
    packed = _empty((size + 1) // 2, dtype=torch.uint8)
    absmax = _empty(blocks)
    _launch("nf4_quantize", weight=weight, block_size=block_size, packed=packed, absmax=absmax)
    if not double_quant:
        return NF4(packed, absmax, None, None, block_size, tuple(weight.shape))
    offset = absmax.mean()
    codes = _empty(blocks, dtype=torch.uint8)
    absmax_scale = _empty(-(-blocks // ABSMAX_BLOCK))
    _launch(
        "nf4_quantize_absmax",
        absmax=absmax,
        absmax_offset=offset.item(),
        absmax_code=dynamic_code(),
        codes=codes,
        absmax_scale=absmax_scale,
    )
    return NF4(packed, codes, absmax_scale, offset, block_size, tuple(weight.shape))


def dequantize_nf4(weight: NF4, out: Tensor) -> None:
    """Writes the dense weight to out, [N, K] with contiguous rows; see reference.dequantize_nf4."""
    N, K = weight.shape
    _copy_weight(weight, slice(0, N), slice(0, K), out)


def adamw_step(groups: Sequence[AdamWGroup], max_grad_norm: float | None, cache: dict[str, Any]) -> Tensor | None:
    """One AdamW step over all tensors in one call, in place, gradients clipped; see reference.adamw_step.

    Parameters and gradients are float32, bfloat16 or float16. Arithmetic is float32. The result does not depend on
    the number of threads. Raises ValueError for another dtype or device.
    """
    (params, grads, *_), changed = adamw_columns(groups, cache)
    if others := {grad.dtype for grad in grads} - _DTYPES.keys():
        raise ValueError(f"the cpu backend got a gradient of {others.pop()}; it takes float32, bfloat16 and float16")
    if not params[0].is_cpu:
        raise ValueError(f"the cpu backend got parameters on {params[0].device}; it takes CPU tensors only")
    if changed:
        cache["fixed"] = dict(zip(("exp_avg", "exp_avg_sq", "step", "master"), cache["states"], strict=True))
        cache["fixed"]["numel"] = [param.numel() for param in params]
        cache["fixed"]["param_dtype"] = [_DTYPES[param.dtype] for param in params]
        cache["fixed"]["group"] = [index for index, group in enumerate(groups) for _ in group.params]
    grad_norm = None if max_grad_norm is None else _empty()
    _C.adamw_step(
        param=cache["pointers"],
        grad=grads,
        **cache["fixed"],
        settings=[group[6:] for group in groups],
        max_grad_norm=max_grad_norm or 0.0,
        grad_norm=grad_norm,
        num_threads=torch.get_num_threads(),
    )
    return grad_norm
