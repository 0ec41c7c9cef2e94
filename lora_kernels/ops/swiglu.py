"""SwiGLU with autograd, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels import backends, reference
from lora_kernels.backends.cpu import decoder as cpu_decoder
from lora_kernels.ops.cpu_only import check, needs_no_graph
from lora_kernels.ops.recompute import remember


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = cpu_decoder.swiglu_fwd(gate, up)
        ctx.save_for_backward(gate, up)
        ctx.forget = remember(y, cpu_decoder.swiglu_fwd, gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        ctx.forget()
        if not backends.direct(dy=dy, gate=gate):
            return reference.swiglu_bwd(dy, gate, up)
        dgate, dup = cpu_decoder.swiglu_bwd(dy.contiguous(), gate, up)
        return tuple(grad if need else None for grad, need in zip((dgate, dup), ctx.needs_input_grad, strict=True))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = gate ∘ sigmoid(gate) ∘ up (Shazeer 2020, equation 6, without its products).

    Both on the CPU and of one shape and dtype: float32, bfloat16 or float16. Computed in float32 and rounded once. Kept
    for backward: gate and up. No second derivatives.

    In a transform of torch.func, under a compiler and of a DTensor, torch's own operations compute it.

    Raises ValueError for tensors that don't fit, TypeError for those without strides, RuntimeError where the CPU
    backend can't run.
    """
    direct = backends.direct(gate=gate, up=up)
    if up.shape != gate.shape:
        raise ValueError(f"up has shape {list(up.shape)}; expected that of gate, {list(gate.shape)}")
    check(gate=gate, up=up)
    if not direct:
        return reference.swiglu(gate, up)
    if needs_no_graph(gate, up):
        return cpu_decoder.swiglu_fwd(gate.contiguous(), up.contiguous())
    return _SwiGLU.apply(gate, up)
