"""lora_linear on the CPU: a pass, forward or backward, is one call of C++.

Per layer, forward and backward, the kernels read x twice and dy once. Dropout is drawn from (seed, offset).

y and dx must be rounded once, after the low-rank term is in: a bfloat16 sum loses a term that is smaller than half a
unit of its last place. So our own kernels multiply by the frozen weight, too. They convert or decode it in cache, a
piece at a time, and take the low-rank term as a continuation of the sum, dropped where x was: in bfloat16 where x is
and this processor has instructions for it, else in float32. With up to 8 rows in x, as in generation, and no dropout,
they read each weight once, straight into registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.backends.cpu import memory
from lora_kernels.backends.cpu.extension import (
    DTYPES,
    check,
    isa,
    kernels,
    native_bfloat16,
    threads,
    unavailable,
    weight_view,
)
from lora_kernels.reference import dropout_threshold, scale_gradient
from lora_kernels.types import NF4, AdapterGradients, Dropout, Gradients, Layers, Needs, Outputs

# Elements of a dense weight below which torch's product is taken where there is no adapter.
DENSE_SIZE = 1 << 19
# Rows that are few, and layers of one call.
FEW_ROWS, MAX_LAYERS = (0, 0) if unavailable else (kernels.FEW_ROWS, kernels.MAX_LAYERS)


def own_bfloat16() -> bool:
    """Whether our product multiplies bfloat16, by instructions for it; else it takes bfloat16 as float32."""
    return isa() in ("avx512_bf16", "avx512_amx")


@dataclass(slots=True)
class _Prepared:
    """Layers as C++ reads them, and the weights, which must outlive them."""

    views: list[kernels.Layer]
    weights: list[Tensor | NF4]


if unavailable is None:
    kernels.take_large_results_from(memory.new, memory.LARGE)


def _prepared(x: Tensor, layers: Layers) -> _Prepared:
    """Made once for these tensors as they lie in memory."""
    kept = layers.prepared.get("cpu")
    if kept is None:
        kept = _prepare(x, layers)
        # A copy would not change with the weight.
        if all(own is layer.weight for own, layer in zip(kept.weights, layers, strict=True)):
            layers.prepared["cpu"] = kept
    return kept


def _prepare(x: Tensor, layers: Layers) -> _Prepared:
    check(x)
    for layer in layers:
        for adapter in (layer.lora_a, layer.lora_b, layer.lora_e):
            if adapter is not None and adapter.dtype not in (torch.float32, x.dtype):
                raise ValueError(f"adapter weights are {adapter.dtype}; allowed: torch.float32 and x's {x.dtype}")
    weights = [_with_contiguous_lines(layer.weight) for layer in layers]
    views = [
        kernels.Layer(
            weight_view(weight), layer.lora_a, layer.lora_b, layer.scaling, layer.bias, layer.lora_e, layer.column_scale
        )
        for weight, layer in zip(weights, layers, strict=True)
    ]  # fmt: skip
    return _Prepared(views, weights)


def _with_contiguous_lines(weight: Tensor | NF4) -> Tensor | NF4:
    """weight, if the elements of its rows or of its columns lie side by side, else a copy of which they do."""
    return weight if isinstance(weight, NF4) or 1 in weight.stride() else weight.contiguous()


def takes(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in DTYPES


def beats_torch(x: Tensor, weight: Tensor) -> bool:
    """For the few rows of generation by 1.2 to 5 times; for more where our product was measured to be no slower. From a
    size on where calling torch isn't what counts."""
    if weight.numel() < DENSE_SIZE or not takes(x) or weight.dtype != x.dtype or weight.stride(1) != 1:
        return False
    by_instructions = x.dtype == torch.bfloat16 and native_bfloat16()
    return x.shape[0] <= FEW_ROWS or (own_bfloat16() if by_instructions else isa() != "generic")


def lora_linear_fwd(x: Tensor, layers: Layers, dropout: Dropout | None) -> Outputs:
    """See reference.lora_linear_fwd. x is float32, bfloat16 or float16, adapters float32 or the dtype of x.

    y is rounded once. Raises ValueError for other dtypes and for tensors that are not on the CPU.
    """
    prepared = _prepared(x, layers)
    made = kernels.layers_forward(prepared.views, x, _in_bfloat16(x), *_drawn(dropout), threads())
    return Outputs(*made)


def lora_linear_bwd(
    dys: Sequence[Tensor], x: Tensor, hs: Sequence[Tensor], layers: Layers, dropout: Dropout | None, needs: Needs
) -> Gradients:
    """See reference.lora_linear_bwd for the formulas, lora_linear_fwd for dtypes and errors.

    dx is the sum over the layers, rounded once. Adapter gradients are accumulated in float32 and rounded to their
    adapter's dtype. The result depends on torch.get_num_threads() but not on timing.
    """
    prepared, hs = _prepared(x, layers), [h if h.is_contiguous() else h.contiguous() for h in hs]
    dx, adapters = kernels.layers_backward(
        prepared.views, dys, hs, x, needs.x, needs.layers, _in_bfloat16(x), *_drawn(dropout), threads()
    )
    return Gradients(dx, [AdapterGradients(*own) for own in adapters])


def _in_bfloat16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and own_bfloat16()


def column_scale_bwd(
    dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dz = dy ∘ c and dc = Σ_m dy ∘ (y - bias) / c in one pass; see reference.column_scale_bwd. dc is float32."""
    check(dy)
    M, N = dy.shape
    dz = memory.new(dy, M, N)
    total = None if y is None else column_scale.new_empty(N)
    bias32 = None if bias is None else bias.float()
    kernels.column_scale_bwd(
        dy=dy, y=y, bias=bias32, column_scale=column_scale, dz=dz, total=total, num_threads=threads()
    )
    return dz, None if total is None else scale_gradient(total, column_scale)


def _drawn(dropout: Dropout | None) -> tuple[Tensor | None, int]:
    """How C++ takes dropout."""
    return (None, 0) if dropout is None else (dropout.rng, dropout_threshold(dropout.p))
