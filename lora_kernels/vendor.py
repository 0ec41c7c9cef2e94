"""The base product by the vendor's library (cuBLAS, rocBLAS), with the low-rank term in before the sum is rounded.

The low-rank term alone is a product of depth R, which the fused kernel computes, mask included, when its K is zero. The
vendor's product is then added to it. Adding the two the other way round, the term to a bfloat16 y that is rounded
already, would lose about half of a small update (docs/performance.md); here the sum is rounded once, whichever way:

- `out.addmm_(x, w)`: the library scales `out` by beta = 1 and adds it to its float32 accumulator.
- Where the library may split the sum over K between blocks and keep the parts in 16 bits, which torch allows it by
  default, the term would be rounded away among them. There the product comes in float32 and is added in float32. So it
  is with a bias or a column scale, which `addmm_` has no room for.
"""

from __future__ import annotations

import torch
from torch import Tensor

# With 256 tiles of 128 x 128 and more, the GPU is full and there is nothing to gain from splitting the sum.
UNSPLIT = 1 << 22


def unsupported(dtype: torch.dtype) -> str | None:
    """Why the vendor's product of two `dtype` matrices can't be used here, or None."""
    if dtype == torch.float32:
        return None
    if torch.version.hip:
        return "on ROCm torch has no 16-bit product with a float32 result"
    if "dtype" not in torch.ops.aten.mm.overloads():
        return f"torch {torch.__version__} has no 16-bit product with a float32 result; torch 2.8 has"
    return None


def _product_in_float32(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w, out_dtype=torch.float32) if x.is_cuda else x.float() @ w.float()


def add_product(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, column_scale: Tensor | None = None) -> None:
    """out = column_scale ∘ (out + x w) + bias, summed in float32 and rounded once.

    out [M, N], x [M, K], w [K, N] and bias [N] are of one dtype, column_scale [N] is float32.
    """
    if out.dtype == torch.float32 or (bias is None and column_scale is None and out.numel() >= UNSPLIT):
        out.addmm_(x, w)
        if column_scale is not None:
            out *= column_scale
        if bias is not None:
            out += bias
        return
    total = _product_in_float32(x, w).add_(out)
    if column_scale is not None:
        total *= column_scale
    if bias is not None:
        total += bias
    out.copy_(total)
