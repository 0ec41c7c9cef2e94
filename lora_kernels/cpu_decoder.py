"""RMSNorm, SwiGLU and rotary position embedding on the CPU: C++ kernels, each one pass over what it reads.

`lora_kernels.reference` has their formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import cpu, recycling


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """y [..., K] and rstd [...] of contiguous x [..., K] and weight [K] of one dtype; rstd is float32."""
    K = x.shape[-1]
    y, rstd = recycling.empty(*x.shape, dtype=x.dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    cpu._launch(
        "rms_norm_fwd",
        x=x,
        weight=weight,
        eps=eps,
        offset=offset,
        y=y,
        rstd=rstd,
        M=rstd.numel(),
        K=K,
        dtype=cpu._DTYPES[x.dtype],
    )
    return y, rstd


def rms_norm_bwd(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    """dx [..., K]; dy and x are contiguous."""
    dx = recycling.empty(*x.shape, dtype=x.dtype)
    cpu._launch(
        "rms_norm_bwd",
        dy=dy,
        x=x,
        rstd=rstd,
        weight=weight,
        offset=offset,
        dx=dx,
        M=rstd.numel(),
        K=x.shape[-1],
        dtype=cpu._DTYPES[x.dtype],
    )
    return dx


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """gate ∘ sigmoid(gate) ∘ up of contiguous tensors of one shape and dtype."""
    y = recycling.empty(*gate.shape, dtype=gate.dtype)
    cpu._launch("swiglu_fwd", gate=gate, up=up, y=y, size=gate.numel(), dtype=cpu._DTYPES[gate.dtype])
    return y


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup; all contiguous."""
    dgate, dup = (recycling.empty(*gate.shape, dtype=gate.dtype) for _ in range(2))
    cpu._launch(
        "swiglu_bwd", dy=dy, gate=gate, up=up, dgate=dgate, dup=dup, size=gate.numel(), dtype=cpu._DTYPES[gate.dtype]
    )
    return dgate, dup


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """y [B, H, T, D], a transposed view of a contiguous [B, T, H, D], of x [B, H, T, D] with contiguous rows and
    contiguous cos and sin [B or 1, T, D], all of one dtype; or, transposed, dx of dy."""
    B, H, T, D = x.shape
    y = recycling.empty(B, T, H, D, dtype=x.dtype)
    x_batch, x_head, x_row, _ = x.stride()
    cpu._launch(
        "rotary",
        x=x,
        x_batch=x_batch,
        x_head=x_head,
        x_row=x_row,
        cos=cos,
        sin=sin,
        angle_batch=0 if cos.shape[0] == 1 else T * D,
        transposed=transposed,
        y=y,
        B=B,
        H=H,
        T=T,
        D=D,
        dtype=cpu._DTYPES[x.dtype],
    )
    return y.transpose(1, 2)
