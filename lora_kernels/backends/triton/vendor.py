"""The base product by the vendor's library (cuBLAS, rocBLAS), in float32, for a kernel of ours to finish.

That adds the low-rank term (and bias, mask and column scale) before anything is rounded. `out.addmm_(x, w)`, which
would spare the float32 product, is no way to do so: on an H200 cuBLAS rounds the product to bfloat16 before it adds
`out`, so that half of a small update is lost (docs/performance.md).
"""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(dtype: torch.dtype) -> str | None:
    """Why the vendor's product of two `dtype` matrices can't be used here, or None."""
    if dtype == torch.float32:
        return None
    if torch.version.hip:
        return "on ROCm torch has no 16-bit product with a float32 result"
    if "dtype" not in torch.ops.aten.mm.overloads():
        return f"torch {torch.__version__} has no 16-bit product with a float32 result; torch 2.8 has"
    return None


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] w [K, N] in float32, for x and w of one dtype."""
    if x.dtype == torch.float32:
        return x @ w
    return torch.mm(x, w, out_dtype=torch.float32) if x.is_cuda else x.float() @ w.float()
