"""Rotary position embedding with autograd, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels import backends, reference
from lora_kernels.backends.cpu import decoder as cpu_decoder
from lora_kernels.ops.cpu_only import check, is_fused, with_rows


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return cpu_decoder.rotary(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if not backends.direct(dy=dy, cos=cos):
            return reference.rotary_bwd(dy, cos, sin), None, None
        return cpu_decoder.rotary(with_rows(dy), cos, sin, transposed=True), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y = x ∘ cos + [-x₂, x₁] ∘ sin with the halves x₁ and x₂ of D: rotary position embedding (Su et al. 2021, section
    3.4.2) of pairs that are D / 2 apart.

    x [B, H, T, D], for any strides; cos and sin [B or 1, T, D], which get no gradient. All on the CPU and of one dtype:
    float32, bfloat16 or float16. Computed in float32 and rounded once. Returns y [B, H, T, D], a transposed view of a
    contiguous [B, T, H, D], as the projection that x comes from has it. No second derivatives.

    In a transform of torch.func, under a compiler and of a DTensor, torch's own operations compute it.

    Raises ValueError for tensors that don't fit, TypeError for those without strides, RuntimeError where the CPU
    backend can't run.
    """
    direct = backends.direct(x=x, cos=cos, sin=sin)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}; allowed: [B, H, T, D] with an even D")
    for name, angle in (("cos", cos), ("sin", sin)):
        if not _has_angles_of(angle, x):
            B, _, T, D = x.shape
            raise ValueError(f"{name} has shape {list(angle.shape)}; expected [{B} or 1, {T}, {D}] for this x")
    check(x=x, cos=cos, sin=sin)
    if not direct:
        return reference.rotary(x, cos, sin)
    if cos.shape != sin.shape:
        # The kernel finds a row of both at one place.
        cos, sin = torch.broadcast_tensors(cos, sin)
    x, cos, sin = with_rows(x), cos.contiguous(), sin.contiguous()
    return _Rotary.apply(x, cos, sin) if torch.is_grad_enabled() else cpu_decoder.rotary(x, cos, sin)


def _has_angles_of(angle: Tensor, x: Tensor) -> bool:
    B, _, T, D = x.shape
    return angle.shape in ((B, T, D), (1, T, D))


def takes_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotary` takes these, and `is_fused`, and no gradient of cos and sin is asked for."""
    return (
        x.dim() == 4
        and x.shape[-1] % 2 == 0
        and is_fused(x)
        and all(
            _has_angles_of(angle, x) and (angle.device, angle.dtype) == (x.device, x.dtype) and not angle.requires_grad
            for angle in (cos, sin)
        )
    )
