"""Row norms of W + scaling · lora_b · lora_a (DoRA, Liu et al. 2024), without making that matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends import check_dense
from lora_kernels.ops.frozen_linear import frozen_linear
from lora_kernels.ops.nf4 import NF4Weight

# Elements of a 16-bit weight that are converted at once.
_PART = 1 << 22


def norm_dtype(weight: Tensor | NF4Weight) -> torch.dtype:
    """float32, or float64 for a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def row_squares(weight: Tensor | NF4Weight) -> Tensor:
    """‖W‖² of each row of weight [N, K], dense or NF4, in `norm_dtype`: what `row_norms` needs and never changes."""
    dtype = norm_dtype(weight)
    dense = weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight
    return torch.linalg.vector_norm(dense, dim=1, dtype=dtype).square()


@torch.no_grad()
def row_norms(weight: Tensor | NF4Weight, squares: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row, s = scaling, by ‖W‖² + 2s · rowsum((W Aᵀ) ∘ B) + s² · rowsum((B (A Aᵀ)) ∘ B).

    weight [N, K] dense or NF4, squares as of `row_squares`, lora_a [R, K], lora_b [N, R]; [N] in `norm_dtype`.

    Where the update all but cancels a row, what the terms' rounding leaves of the sum means nothing: a norm is at
    least √(eps · (‖W‖² + ‖s B A‖²)), and never 0.
    """
    dtype = norm_dtype(weight)
    check_dense(weight=None if isinstance(weight, NF4Weight) else weight, lora_a=lora_a, lora_b=lora_b)
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        if t.device != weight.device:
            raise ValueError(f"{name} is on {t.device}, weight on {weight.device}; both must be on the same device")
    with torch.autocast(weight.device.type, enabled=False):
        lora_a, lora_b = lora_a.to(dtype), scaling * lora_b.to(dtype)
        cross = (_product(weight, lora_a) * lora_b).sum(1)
        update = ((lora_b @ (lora_a @ lora_a.t())) * lora_b).sum(1).clamp(min=0)
    total = squares + update
    info = torch.finfo(dtype)
    return torch.maximum(total + 2 * cross, info.eps * total + info.tiny).sqrt()


def _product(weight: Tensor | NF4Weight, lora_a: Tensor) -> Tensor:
    """W Aᵀ [N, R] in the dtype of lora_a."""
    if isinstance(weight, NF4Weight):
        return frozen_linear(lora_a, weight).t()
    if weight.dtype == lora_a.dtype:
        return weight @ lora_a.t()
    parts = weight.split(max(1, _PART // weight.shape[1]))
    return torch.cat([part.to(lora_a.dtype) @ lora_a.t() for part in parts])
