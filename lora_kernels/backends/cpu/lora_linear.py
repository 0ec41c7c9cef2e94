"""lora_linear on the CPU: C++ for everything low-rank, and for products where torch's are slower.

Per layer, forward and backward, the kernels read x twice and dy once. Dropout is drawn inside, in registers, from
(seed, offset).

y and dx must be rounded once, after the low-rank term is in: a bfloat16 sum loses a term that is smaller than half a
unit of its last place. So the product with the frozen weight runs, see `_plan`,

- by our own kernels, and then the whole pass is one call of C++. They convert or decode the weight in cache, a piece at
  a time, and take the low-rank term (without dropout that of dx too) as a continuation of the sum: in bfloat16 where x
  is and this processor has instructions for it that we use, else in float32. With up to 8 rows in x, as in generation,
  and no dropout, they read each weight once, straight into registers.
- in bfloat16 by torch where this processor has other hardware for it, with the low-rank term inside the same product:
  y = [x, h] [W, scaling · lora_b]ᵀ, and dx likewise;
- in float32 by torch where its product may be faster than ours (`own_rows`), in place for float32; a kernel then adds
  the low-rank term while a block of rows is in cache.

The weight comes to torch in panels: W itself where it is dense and of the right dtype, else some rows of it (columns,
for dx) at a time, converted or decoded into a buffer that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.cpu import memory
from lora_kernels.backends.cpu.extension import (
    DTYPES,
    buffer,
    check,
    empty,
    isa,
    kernels,
    launch,
    native_bfloat16,
    unavailable,
    weight_view,
)
from lora_kernels.backends.cpu.nf4 import decode
from lora_kernels.reference import dropout_scale, dropout_threshold, scale_gradient
from lora_kernels.types import NF4, AdapterGradients, Dropout, Gradients, Layers, Needs, Outputs, Projection

# Elements of a panel of the weight: large enough for torch's products, small enough to stay in a cache.
_PANEL = 1 << 20
# Elements of the float32 rows of dx that wait for the low-rank term.
_BASE = 1 << 23

# Elements of a dense weight below which torch's product is taken where there is no adapter.
DENSE_SIZE = 1 << 19
# Rows that are few, and layers of one call.
FEW_ROWS, MAX_LAYERS = (0, 0) if unavailable else (kernels.FEW_ROWS, kernels.MAX_LAYERS)


class OwnRows(NamedTuple):
    """Rows of x, or of dy, up to which our own product is taken instead of torch's."""

    converted: int  # an NF4 or 16-bit weight
    native: int  # the same, where x is bfloat16 and the processor could multiply that
    forward: int  # a dense float32 weight
    backward: int


_ALL = 1 << 62
# Where it was measured, and for the other instruction sets what can't be far off.
_OWN_ROWS = dict.fromkeys(("avx2", "avx512", "avx512_bf16", "avx512_amx"), OwnRows(_ALL, 16, _ALL, _ALL))
_OWN_ROWS_ELSEWHERE = OwnRows(128, 16, 32, 0)
# Multiplications up to which calling torch costs more than its product gains.
SMALL = 1 << 20


def own_rows() -> OwnRows:
    return _OWN_ROWS.get(isa(), _OWN_ROWS_ELSEWHERE)


def own_bfloat16() -> bool:
    """Whether our own product of bfloat16 is taken. With other hardware for it torch's is."""
    return isa() in ("avx512_bf16", "avx512_amx")


class Plan(Enum):
    """How a pass multiplies by the frozen weights."""

    OWN_FLOAT32 = "our kernels, in float32"
    OWN_BFLOAT16 = "our kernels, in bfloat16"
    TORCH_FLOAT32 = "torch, in float32"
    TORCH_BFLOAT16 = "torch, in bfloat16"


@dataclass(slots=True)
class _Prepared:
    """Layers as C++ reads them, None where the rows of a weight are not contiguous; of each weight the number of
    elements, and whether it is dense and float32."""

    views: list[Any] | None
    weights: list[tuple[int, bool]]


if unavailable is None:
    kernels.take_large_results_from(memory.new, memory.LARGE)


def _prepared(x: Tensor, layers: Layers) -> _Prepared:
    """Made once for these tensors as they lie in memory."""
    kept = layers.prepared.get("cpu")
    if kept is None:
        kept = layers.prepared["cpu"] = _prepare(x, layers)
    return kept


def _prepare(x: Tensor, layers: Layers) -> _Prepared:
    check(x)
    for layer in layers:
        for adapter in (layer.lora_a, layer.lora_b, layer.lora_e):
            if adapter is not None and adapter.dtype not in (torch.float32, x.dtype):
                raise ValueError(f"adapter weights are {adapter.dtype}; allowed: torch.float32 and x's {x.dtype}")
    dense = [layer.weight for layer in layers if not isinstance(layer.weight, NF4)]
    views = None
    if all(weight.stride(1) == 1 for weight in dense):
        views = [
            kernels.Layer(
                weight_view(layer.weight), layer.lora_a, layer.lora_b, layer.scaling, layer.bias, layer.lora_e,
                layer.column_scale,
            )
            for layer in layers
        ]  # fmt: skip
    return _Prepared(views, [_weight_kind(layer.weight) for layer in layers])


def _weight_kind(weight: Tensor | NF4) -> tuple[int, bool]:
    N, K = weight.shape
    return N * K, not isinstance(weight, NF4) and weight.dtype == torch.float32


def _plan(dtype: torch.dtype, M: int, prepared: _Prepared, forward: bool) -> Plan:
    """For M rows of x, or of dy, in this dtype. One weight that torch must multiply takes its group along."""
    native = dtype == torch.bfloat16 and native_bfloat16()
    by_torch = Plan.TORCH_BFLOAT16 if native else Plan.TORCH_FLOAT32
    if prepared.views is None:
        return by_torch
    if native and own_bfloat16():
        return Plan.OWN_BFLOAT16
    limits = own_rows()
    for size, is_float32 in prepared.weights:
        if is_float32:
            limit = limits.forward if forward else limits.backward
        else:
            limit = limits.native if native else limits.converted
        if limit < M and M * size > SMALL:
            return by_torch
    return Plan.OWN_FLOAT32


def takes(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in DTYPES


def beats_torch(x: Tensor, weight: Tensor) -> bool:
    """For the few rows of generation by 1.2 to 5 times, from a size on where calling torch isn't what counts."""
    if weight.numel() < DENSE_SIZE or not takes(x) or weight.dtype != x.dtype or weight.stride(1) != 1:
        return False
    M = x.shape[0]
    how = _plan(x.dtype, M, _Prepared([], [_weight_kind(weight)]), forward=True)
    return M <= FEW_ROWS or how in (Plan.OWN_FLOAT32, Plan.OWN_BFLOAT16)


def lora_linear_fwd(x: Tensor, layers: Layers, dropout: Dropout | None) -> Outputs:
    """See reference.lora_linear_fwd. x is float32, bfloat16 or float16, adapters float32 or the dtype of x.

    y is rounded once (before column_scale too, where there is one and torch multiplies bfloat16). Raises ValueError for
    other dtypes and for tensors that are not on the CPU.
    """
    prepared, M = _prepared(x, layers), x.shape[0]
    few = M <= FEW_ROWS and dropout is None and prepared.views is not None
    how = Plan.OWN_FLOAT32 if few else _plan(x.dtype, M, prepared, forward=True)
    if how in (Plan.TORCH_FLOAT32, Plan.TORCH_BFLOAT16):
        return _fwd_by_torch(x, layers, dropout, how is Plan.TORCH_BFLOAT16)
    in_bfloat16 = how is Plan.OWN_BFLOAT16
    made = kernels.layers_forward(prepared.views, x, in_bfloat16, *_drawn(dropout), torch.get_num_threads())
    return Outputs(*made)


def lora_linear_bwd(
    dys: Sequence[Tensor], x: Tensor, hs: Sequence[Tensor], layers: Layers, dropout: Dropout | None, needs: Needs
) -> Gradients:
    """See reference.lora_linear_bwd for the formulas, lora_linear_fwd for dtypes and errors.

    dx is the sum over the layers, rounded once (twice where dropout hit it and bfloat16 is native). Adapter gradients
    are accumulated in float32 and rounded to their adapter's dtype. The result depends on torch.get_num_threads() but
    not on timing.
    """
    prepared, hs = _prepared(x, layers), [h if h.is_contiguous() else h.contiguous() for h in hs]
    how = _plan(x.dtype, x.shape[0], prepared, forward=False)
    if how in (Plan.TORCH_FLOAT32, Plan.TORCH_BFLOAT16):
        return _bwd_by_torch(dys, x, hs, layers, dropout, needs, how is Plan.TORCH_BFLOAT16)
    dx, adapters = kernels.layers_backward(
        prepared.views, dys, hs, x, needs.x, needs.layers, how is Plan.OWN_BFLOAT16, *_drawn(dropout),
        torch.get_num_threads(),
    )  # fmt: skip
    return Gradients(dx, [AdapterGradients(*own) for own in adapters])


def column_scale_bwd(
    dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dz = dy ∘ c and dc = Σ_m dy ∘ (y - bias) / c in one pass; see reference.column_scale_bwd. dc is float32."""
    check(dy)
    M, N = dy.shape
    dz = memory.new(dy, M, N)
    total = None if y is None else column_scale.new_empty(N)
    bias32 = None if bias is None else bias.float()
    launch("column_scale_bwd", dy=dy, y=y, bias=bias32, column_scale=column_scale, dz=dz, total=total)
    return dz, None if total is None else scale_gradient(total, column_scale)


def _weights(layers: Layers) -> list[Tensor | NF4]:
    return [layer.weight for layer in layers]


def _drawn(dropout: Dropout | None) -> tuple[Tensor | None, int]:
    """How C++ takes dropout."""
    return (None, 0) if dropout is None else (dropout.rng, dropout_threshold(dropout.p))


def _steps(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _part(t: Tensor, rows: slice) -> Tensor:
    return t if rows == slice(0, t.shape[0]) else t[rows]


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _copy_weight(weight: Tensor | NF4, rows: slice, cols: slice, out: Tensor) -> None:
    """out = weight[rows, cols] in the dtype of out, whose rows are contiguous."""
    if isinstance(weight, NF4):
        decode(weight, rows, cols, out)
    else:
        out.copy_(weight[rows, cols])


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
            panel = buffer("panel", dtype, N + R, width)
            row = 0
            for weight in weights:
                rows = weight.shape[0]
                _copy_weight(weight, slice(0, rows), part, panel[row : row + rows])
                row += rows
            if extra is not None:
                panel[N:] = extra[:, part]
        else:
            panel = buffer("panel", dtype, width, K + R)
            _copy_weight(first, part, slice(0, K), panel[:, :K])
            if extra is not None:
                panel[:, K:] = extra[part]
        yield part, panel


def _fwd_by_torch(x: Tensor, layers: Layers, dropout: Dropout | None, in_bfloat16: bool) -> Outputs:
    outputs, x32 = Outputs([], []), None if in_bfloat16 else x.float()
    for layer, h in zip(layers, _lora_a_fwd(x, layers, dropout), strict=True):
        he = h if layer.lora_e is None else h * layer.lora_e.float()
        y = memory.new(x, x.shape[0], layer.weight.shape[0])
        if in_bfloat16:
            _y_in_bfloat16(torch.cat([x, he.to(x.dtype)], dim=1), layer, y)
        else:
            _y_in_float32(x32, he, layer, y)
        outputs.ys.append(y)
        outputs.hs.append(h)
    return outputs


def _lora_a_fwd(x: Tensor, layers: Layers, dropout: Dropout | None) -> Sequence[Tensor]:
    """h = dropout(x) Aᵀ [M, R] of each layer."""
    lora_a = _side_by_side([layer.lora_a for layer in layers], 0)
    h = empty(x.shape[0], lora_a.shape[0])
    if h.shape[1]:
        rng, threshold = _drawn(dropout)
        launch("lora_a_fwd", x=x, lora_a=lora_a, h=h, threshold=threshold, rng=rng)
    if len(layers) == 1:
        return [h]
    return [part.contiguous() for part in h.split([layer.lora_a.shape[0] for layer in layers], dim=1)]


def _y_in_bfloat16(wide_x: Tensor, layer: Projection, y: Tensor) -> None:
    """y of [x, h ∘ e]."""
    for cols, panel in _panels([layer.weight], y.dtype, by_columns=False, extra=layer.scaling * layer.lora_b.float()):
        if layer.bias is None or layer.column_scale is not None:
            torch.mm(wide_x, panel.T, out=y[:, cols])
        else:
            torch.addmm(layer.bias[cols], wide_x, panel.T, out=y[:, cols])
    if layer.column_scale is not None:
        _finish(y, layer, empty(len(y), 0), y, slice(0, y.shape[1]))


def _y_in_float32(x: Tensor, he: Tensor, layer: Projection, y: Tensor) -> None:
    for cols, panel in _panels([layer.weight], torch.float32, by_columns=False):
        base = y[:, cols] if y.dtype == torch.float32 else buffer("base", torch.float32, len(x), panel.shape[0])
        torch.mm(x, panel.T, out=base)
        _finish(base, layer, he, y, cols)


def _finish(base: Tensor, layer: Projection, he: Tensor, y: Tensor, cols: slice) -> None:
    """y[:, cols] = column_scale ∘ (base + scaling · he lora_bᵀ) + bias, rounded once; he may be of rank 0."""
    R, own = he.shape[1], y[:, cols]
    bias = None if layer.bias is None else layer.bias.float()[cols]
    scale = None if layer.column_scale is None else layer.column_scale[cols]
    if R or bias is not None or scale is not None or base.data_ptr() != own.data_ptr():
        tensors = {"base": base, "column_scale": scale, "bias": bias, "h": he, "lora_b": layer.lora_b[cols, :R]}
        launch("lora_b_fwd", **tensors, y=own, scaling=layer.scaling)


def _bwd_by_torch(
    dys: Sequence[Tensor],
    x: Tensor,
    hs: Sequence[Tensor],
    layers: Layers,
    dropout: Dropout | None,
    needs: Needs,
    in_bfloat16: bool,
) -> Gradients:
    ranks = [layer.lora_a.shape[0] for layer in layers]
    need_a = sum(ranks) > 0 and any(need.lora_a for need in needs.layers)
    dhs, gradients = [], []
    for dy, h, layer, need in zip(dys, hs, layers, needs.layers, strict=True):
        own, need_h = AdapterGradients(), needs.x or need_a
        dhe = empty(*h.shape) if need_h or need.lora_e else None
        dlora_b = empty(*layer.lora_b.shape) if need.lora_b else None
        if h.shape[1] and (dhe is not None or dlora_b is not None):
            he = h if layer.lora_e is None else h * layer.lora_e.float()
            launch("lora_b_bwd", dy=dy, h=he, lora_b=layer.lora_b, scaling=layer.scaling, dh=dhe, dlora_b=dlora_b)
        if need.lora_b:
            own.lora_b = dlora_b.to(layer.lora_b.dtype)
        if need.lora_e:
            own.lora_e = (h * dhe).sum(0).to(layer.lora_e.dtype)
        if need_h:
            dhs.append(dhe if layer.lora_e is None else dhe * layer.lora_e.float())
        gradients.append(own)
    if not needs.x and not need_a:
        return Gradients(None, gradients)

    lora_a, dh = _side_by_side([layer.lora_a for layer in layers], 0), _side_by_side(dhs, 1)
    dx = memory.new(x, *x.shape) if needs.x else None
    finish_dx = needs.x
    if needs.x and in_bfloat16:
        wide_dy = torch.cat([*dys, dh.to(x.dtype)], dim=1)
        scale = 1.0 if dropout is None else dropout_scale(dropout.p)
        for cols, panel in _panels(_weights(layers), x.dtype, True, extra=scale * lora_a.float()):
            torch.mm(wide_dy, panel, out=dx[:, cols])
        # Only where x was dropped the low-rank term must be taken out again.
        finish_dx = dropout is not None
    dlora_a = None
    if finish_dx or need_a:
        dlora_a = _lora_a_bwd(dys, x, dh, lora_a, layers, dropout, dx if finish_dx else None, need_a, in_bfloat16)
    if need_a:
        for own, part, layer, need in zip(gradients, dlora_a.split(ranks), layers, needs.layers, strict=True):
            own.lora_a = part.to(layer.lora_a.dtype) if need.lora_a else None
    return Gradients(dx, gradients)


def _lora_a_bwd(
    dys: Sequence[Tensor],
    x: Tensor,
    dh: Tensor,
    lora_a: Tensor,
    layers: Layers,
    dropout: Dropout | None,
    dx: Tensor | None,
    need_a: bool,
    in_bfloat16: bool,
) -> Tensor | None:
    """dlora_a [R, K] in float32, the layers' ranks below each other as they are beside each other in dh; dx, where
    given, is finished, or in float32 made."""
    (M, K), R = x.shape, lora_a.shape[0]
    rng, threshold = _drawn(dropout)
    # Of 16 bits, so many that their copies in float32 stay small.
    rows_at_once = M if x.dtype == torch.float32 or dx is None else max(512, _BASE // K)
    dlora_a = None
    for rows in _steps(M, rows_at_once):
        base = own_dx = None
        if dx is not None:
            own_dx = _part(dx, rows)
            base = own_dx if in_bfloat16 else _base_of_dx([_part(dy, rows) for dy in dys], _weights(layers), own_dx)
            if R == 0 and base.dtype == dx.dtype:
                continue
        block = empty(R, K) if need_a else None
        launch(
            "lora_a_bwd", x=_part(x, rows), dh=_part(dh, rows), lora_a=lora_a, dlora_a=block, base=base, dx=own_dx,
            undo_dropped=in_bfloat16, first_row=rows.start, threshold=threshold, rng=rng,
        )  # fmt: skip
        dlora_a = block if dlora_a is None else dlora_a.add_(block)
    return dlora_a


def _base_of_dx(dys: Sequence[Tensor], weights: Sequence[Tensor | NF4], dx: Tensor) -> Tensor:
    """Σ dy W in float32: in dx itself if that is float32, else in a buffer."""
    base = dx if dx.dtype == torch.float32 else buffer("base", torch.float32, *dx.shape)
    for index, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        dy32 = dy.float()
        for cols, panel in _panels([weight], torch.float32, by_columns=True):
            out = base[:, cols]
            if index:
                out.addmm_(dy32, panel)
            else:
                torch.mm(dy32, panel, out=out)
    return base
