"""RMSNorm, SwiGLU and rotary position embedding with autograd, on the CPU, and the means to keep less for backward.

A linear layer that trains an adapter keeps its input, which is what the first two return. Where `recomputing` is in
force they aren't kept: backward makes them again, in one pass, from what the ops keep in any case.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels import backends, reference
from lora_kernels.backends import cpu
from lora_kernels.backends.cpu import decoder as cpu_decoder

_RECIPE = "lora_kernels_recipe"


def is_fused(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether the kernels take these: CPU tensors of one dtype, `unwatched`, no autocast, backend auto or cpu."""
    return (
        x.is_cpu
        and backends.unwatched(x, weight)
        and not torch.is_autocast_enabled("cpu")
        and (weight is None or (weight.dtype == x.dtype and weight.is_contiguous()))
        and backends.resolve(x) is cpu
        and x.dtype in cpu._DTYPES
        and x.numel() > 0
    )


class _Recipe:
    """How the contents of a storage are made from other tensors. The storage carries it as an attribute."""

    def __init__(self, result: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.make = make
        # Detached tensors share their version with the original.
        self.inputs = [t.detach() for t in inputs]
        self.versions = [t._version for t in inputs]
        self.version = result._version
        self.made: Tensor | None = None
        setattr(result.untyped_storage(), _RECIPE, self)

    def __call__(self) -> Tensor:
        if self.made is None:
            if [t._version for t in self.inputs] != self.versions:
                raise RuntimeError(
                    "a tensor that RMSNorm or SwiGLU was computed from has been modified by an inplace operation, so "
                    "that backward can't compute it again"
                )
            with torch.no_grad():
                self.made = self.make(*self.inputs)
        return self.made


class _Kept(NamedTuple):
    """A saved tensor and its version, which torch doesn't look at where there are hooks."""

    tensor: Tensor
    version: int | None


def version_of(t: Tensor) -> int | None:
    """How often the contents have changed; None for an inference tensor, of which torch doesn't know."""
    return None if t.is_inference() else t._version


def _pack(t: Tensor) -> Any:
    recipe = getattr(t.untyped_storage(), _RECIPE, None) if backends.is_memory(t) else None
    if recipe is None or recipe.version != t._version:
        # Not t itself, which keeps the node alive whose result it is, and that keeps what this returns.
        return _Kept(t.detach(), version_of(t))
    return recipe, t.shape, t.stride(), t.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Kept):
        t, version = packed
        if version_of(t) != version:
            raise RuntimeError(
                f"a tensor {list(t.shape)} that is needed for gradient computation has been modified by an inplace "
                f"operation: it is at version {version_of(t)}; expected version {version}"
            )
        return t
    recipe, *view = packed
    return recipe().as_strided(*view)


def _forget(recipe: weakref.ref[_Recipe]) -> None:
    """Free what the recipe made, since whoever reads it in backward has done so. (A graph outlives its backward, and
    would keep the recipe's inputs with it; hence the weak reference.)"""
    if (alive := recipe()) is not None:
        alive.made = None


def recomputing() -> AbstractContextManager[None]:
    """In the `with` block, autograd keeps no result of `rms_norm` and `swiglu`, but makes it again in backward.

    Results are bit for bit the same. Inside activation checkpointing, which has hooks of its own, it has no effect.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        x = x.contiguous()
        y, rstd = cpu_decoder.rms_norm_fwd(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.settings = eps, offset
        # Also where y has no gradient: an adapter after it keeps y for its own.
        recipe = _Recipe(y, lambda x, weight: cpu_decoder.rms_norm_fwd(x, weight, eps, offset)[0], x, weight)
        ctx.recipe = weakref.ref(recipe)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        _forget(ctx.recipe)
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
    _check(x, weight)
    if not direct:
        return reference.rms_norm(x, weight, eps, offset)
    if _needs_no_graph(x, weight):
        return cpu_decoder.rms_norm_fwd(x.contiguous(), weight.contiguous(), eps, offset)[0]
    return _RMSNorm.apply(x, weight.contiguous(), float(eps), float(offset))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        y = cpu_decoder.swiglu_fwd(gate, up)
        ctx.save_for_backward(gate, up)
        ctx.recipe = weakref.ref(_Recipe(y, cpu_decoder.swiglu_fwd, gate, up))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        _forget(ctx.recipe)
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
    _check(gate, up)
    if not direct:
        return reference.swiglu(gate, up)
    if _needs_no_graph(gate, up):
        return cpu_decoder.swiglu_fwd(gate.contiguous(), up.contiguous())
    return _SwiGLU.apply(gate, up)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return cpu_decoder.rotary(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
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
        _check(x, angle)
    if not direct:
        return reference.rotary(x, cos, sin)
    if cos.shape != sin.shape:
        # The kernel finds a row of both at one place.
        cos, sin = torch.broadcast_tensors(cos, sin)
    x, cos, sin = with_rows(x), cos.contiguous(), sin.contiguous()
    return _Rotary.apply(x, cos, sin) if torch.is_grad_enabled() else cpu_decoder.rotary(x, cos, sin)


def _needs_no_graph(*tensors: Tensor) -> bool:
    """Whether neither a gradient nor, for what comes after, a recipe is made of these."""
    if not torch.is_grad_enabled():
        return True
    return any(t.is_inference() for t in tensors) and not any(t.requires_grad for t in tensors)


def with_rows(t: Tensor) -> Tensor:
    """The same values, elements of a row side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


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


def _check(x: Tensor, other: Tensor) -> None:
    if cpu.unavailable is not None:
        raise RuntimeError(f"the cpu backend, which this op needs, can't run here: {cpu.unavailable}")
    if not x.is_cpu or x.dtype not in cpu._DTYPES or (other.device, other.dtype) != (x.device, x.dtype):
        raise ValueError(
            f"the tensors are {x.dtype} on {x.device} and {other.dtype} on {other.device}; allowed: one of float32, "
            "bfloat16 and float16 for both, on the CPU"
        )
