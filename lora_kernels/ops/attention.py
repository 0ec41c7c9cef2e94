"""Causal attention with autograd, on the CPU, without a [T, T] of scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels import backends, reference
from lora_kernels.backends.cpu import decoder as cpu_decoder
from lora_kernels.ops.cpu_only import check, with_rows

MAX_HEAD_DIM = 256


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        o, lse = cpu_decoder.attention_fwd(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        if not backends.direct(do=dout, q=q):
            return *reference.causal_attention_bwd(dout, q, k, v, ctx.scale), None
        grads = cpu_decoder.attention_bwd(with_rows(dout), q, k, v, o, lse, ctx.scale)
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:3], strict=True)), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """o = softmax(scale · q kᵀ + mask) v, where the mask hides the keys after a row's own (Vaswani et al. 2017), in
    blocks (Dao 2023, FlashAttention-2).

    q [B, H, T, D], k and v [B, KV, T, D], with H a multiple of KV: query head h reads key and value head h // (H / KV).
    T ≥ 1, D from 1 to 256. All on the CPU and of one dtype: float32, bfloat16 or float16; any strides, and those with a
    last stride of 1 are read in place. scale is 1 / √D where it is None. Computed in float32 and rounded once.

    Returns o [B, H, T, D], a transposed view of a contiguous [B, T, H, D]. Kept for backward: q, k, v, o and the
    logarithm of each row's Σ exp. No second derivatives. The results are the same bits for any number of threads.

    In a transform of torch.func, under a compiler and of a DTensor, torch's own operations compute it,
    with the [T, T] of scores.

    Raises ValueError for tensors that don't fit, TypeError for those without strides, RuntimeError where the CPU
    backend can't run.
    """
    direct = backends.direct(q=q, k=k, v=v)
    _check_shapes(q, k, v)
    check(q=q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not direct:
        return reference.causal_attention(q, k, v, scale)
    q, k, v = with_rows(q), with_rows(k), with_rows(v)
    if not torch.is_grad_enabled():
        return cpu_decoder.attention_fwd(q, k, v, scale)[0]
    return _CausalAttention.apply(q, k, v, scale)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or min(q.shape) < 1 or q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"q has shape {list(q.shape)}; allowed: [B, H, T, D], none of them 0, with D up to {MAX_HEAD_DIM}"
        )
    B, H, T, D = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (B, T, D) or k.shape[1] < 1 or H % k.shape[1]:
        raise ValueError(
            f"k has shape {list(k.shape)}; allowed: [{B}, KV, {T}, {D}] with q's {H} heads a multiple of KV"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {list(v.shape)}; expected that of k, {list(k.shape)}")
