"""RMSNorm with autograd, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels import backends, reference
from lora_kernels.backends.cpu import decoder as cpu_decoder
from lora_kernels.ops.cpu_only import check, needs_no_graph
from lora_kernels.ops.recompute import remember


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x = x.contiguous()
        y, rstd = cpu_decoder.rms_norm_fwd(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.settings = eps, offset
        # Also where y has no gradient: an adapter after it keeps y for its own.
        ctx.forget = remember(y, lambda x, weight: cpu_decoder.rms_norm_fwd(x, weight, eps, offset)[0], x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        ctx.forget()
        eps, offset = ctx.settings
        if not backends.direct(dy=dy, x=x):
            return *reference.rms_norm_bwd(dy, x, weight, eps, offset), None, None
        dx = cpu_decoder.rms_norm_bwd(dy.contiguous(), x, rstd, weight, offset) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            terms = dy.float() * x.float() * rstd.unsqueeze(-1)
            dweight = terms.reshape(-1, terms.shape[-1]).sum(0).to(weight.dtype)
        return dx, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) ∘ (offset + weight) over the last dimension (Zhang & Sennrich 2019, equation 4).

    x [..., K] and weight [K], on the CPU, of one dtype: float32, bfloat16 or float16. Gemma's offset is 1. Computed in
    float32 and rounded once. Kept for backward: x and 1 / sqrt(...) of each row. No second derivatives.

    In a transform of torch.func, under a compiler and of a DTensor, torch's own operations compute it.

    Raises ValueError for tensors that don't fit, TypeError for those without strides, RuntimeError where the CPU
    backend can't run.
    """
    direct = backends.direct(x=x, weight=weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected {list(x.shape[-1:])}, the last dim of x")
    check(x=x, weight=weight)
    if not direct:
        return reference.rms_norm(x, weight, eps, offset)
    if needs_no_graph(x, weight):
        return cpu_decoder.rms_norm_fwd(x.contiguous(), weight.contiguous(), eps, offset)[0]
    return _RMSNorm.apply(x, weight.contiguous(), float(eps), float(offset))
