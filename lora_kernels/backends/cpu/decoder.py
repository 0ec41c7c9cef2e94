"""RMSNorm, SwiGLU, rotary position embedding and causal attention on the CPU, by C++ kernels.

`lora_kernels.reference` has their formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends.cpu import memory as recycling
from lora_kernels.backends.cpu.extension import kernels, threads


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """y [..., K] and rstd [...] of contiguous x [..., K] and weight [K] of one dtype; rstd is float32."""
    y, rstd = recycling.empty(*x.shape, dtype=x.dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    kernels.rms_norm_fwd(x=x, weight=weight, eps=eps, offset=offset, y=y, rstd=rstd, num_threads=threads())
    return y, rstd


def rms_norm_bwd(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    """dx [..., K]; dy and x are contiguous."""
    dx = recycling.empty(*x.shape, dtype=x.dtype)
    kernels.rms_norm_bwd(dy=dy, x=x, rstd=rstd, weight=weight, offset=offset, dx=dx, num_threads=threads())
    return dx


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """gate ∘ sigmoid(gate) ∘ up of contiguous tensors of one shape and dtype."""
    y = recycling.empty(*gate.shape, dtype=gate.dtype)
    kernels.swiglu_fwd(gate=gate, up=up, y=y, num_threads=threads())
    return y


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate and dup; all contiguous."""
    dgate, dup = (recycling.empty(*gate.shape, dtype=gate.dtype) for _ in range(2))
    kernels.swiglu_bwd(dy=dy, gate=gate, up=up, dgate=dgate, dup=dup, num_threads=threads())
    return dgate, dup


def _empty_heads(like: Tensor) -> Tensor:
    """[B, heads, T, D] of which all heads of a row lie side by side, as linear layers make and take them."""
    B, heads, T, D = like.shape
    # Not a view: one that comes out of an autograd Function can't be changed in place.
    return recycling.empty(B, T, heads, D, dtype=like.dtype).transpose_(1, 2)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """y [B, H, T, D] of x [B, H, T, D], whose last stride is 1, and contiguous cos and sin [B or 1, T, D], all of one
    dtype; or, transposed, dx of dy."""
    y = _empty_heads(x)
    kernels.rotary(x=x, cos=cos, sin=sin, transposed=transposed, y=y, num_threads=threads())
    return y


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o [B, H, T, D], whose memory is that of a contiguous [B, T, H, D], and lse [B, H, T], float32.

    q is [B, H, T, D], k and v are [B, KV, T, D], of one dtype and with the last stride 1.
    """
    o, lse = _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    kernels.attention_fwd(q=q, k=k, v=v, o=o, lse=lse, scale=scale, num_threads=threads())
    return o, lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, laid out as o is; the last stride of dout is 1."""
    dq, dk, dv = (_empty_heads(t) for t in (q, k, v))
    kernels.attention_bwd(
        q=q, k=k, v=v, o=o, dout=dout, dq=dq, dk=dk, dv=dv, lse=lse, scale=scale, num_threads=threads()
    )
    return dq, dk, dv
