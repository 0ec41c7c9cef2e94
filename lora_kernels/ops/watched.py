"""lora_linear where something else than autograd watches: a compiler, a mode, a transform, a tensor subclass.

A compiler and a mode see one torch op for each layer, which a backend runs. In a transform of torch.func, under
forward-mode differentiation and of DTensors the formula is computed in torch's own operations.

An op's schema knows tensors only, so NF4 comes as its parts (`weight` is then `packed`); block_size 0 means dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import backends, reference
from lora_kernels.ops import dispatch
from lora_kernels.ops.layers import in_dtype_of_sums, projection_in_memory, tensors_of, vector
from lora_kernels.ops.nf4 import NF4Weight
from lora_kernels.types import NF4, AdapterNeeds, Dropout, Layers, Needs, Projection

_NF4_PARTS = "Tensor? absmax=None, Tensor? absmax_scale=None, Tensor? absmax_offset=None, int block_size=0"
# Those of lora_linear_fwd, in their order.
_ARGUMENTS = (
    "x", "weight", "lora_a", "lora_b", "scaling", "bias", "lora_e", "dropout_p", "rng", "column_scale", "absmax",
    "absmax_scale", "absmax_offset", "block_size",
)  # fmt: skip
_library = torch.library.Library("lora_kernels", "DEF")
_library.define(
    "lora_linear_fwd(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? bias, "
    f"Tensor? lora_e, float dropout_p, Tensor? rng, Tensor? column_scale=None, {_NF4_PARTS}) -> (Tensor, Tensor)"
)
_library.define(
    "lora_linear_bwd(Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, "
    f"Tensor? lora_e, float dropout_p, Tensor? rng, bool[] needs, {_NF4_PARTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define("column_scale_bwd(Tensor dy, Tensor? y, Tensor? bias, Tensor column_scale) -> (Tensor, Tensor)")


def project(x: Tensor, layers: Sequence[Projection], dropout_p: float) -> tuple[Tensor, ...]:
    """y [..., N] of each layer, whose dense weights have any strides and NF4 ones are NF4Weights."""
    if backends.by_formula(x, *tensors_of(layers)):
        return _formula(x, layers, dropout_p)
    rng = torch.randint(2**62, (2,), dtype=torch.int64, device=x.device) if dropout_p else None
    return tuple(_op(x, layer, dropout_p, rng) for layer in layers)


def _formula(x: Tensor, layers: Sequence[Projection], dropout_p: float) -> tuple[Tensor, ...]:
    if backends.in_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return _formula(x, layers, dropout_p)
    ready = []
    for layer in layers:
        weight = layer.weight.tensors() if isinstance(layer.weight, NF4Weight) else layer.weight
        adapter = layer.lora_a, layer.lora_b, layer.scaling, layer.bias, layer.lora_e, layer.column_scale
        ready.append(Projection(weight, *adapter))
    return reference.lora_linear_formula(x, ready, dropout_p)


def _op(x: Tensor, layer: Projection, dropout_p: float, rng: Tensor | None) -> Tensor:
    weight, block_size = layer.weight, 0
    scales: list[Tensor | None] = [None, None, None]
    if isinstance(weight, NF4Weight):
        block_size, (weight, *scales) = weight.block_size, weight.parts
    adapter = layer.lora_a, layer.lora_b, layer.scaling, layer.bias, layer.lora_e
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y, _ = torch.ops.lora_kernels.lora_linear_fwd(
        rows, weight, *adapter, dropout_p, rng, in_dtype_of_sums(layer.column_scale), *scales, block_size
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _layers(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None,
    lora_e: Tensor | None, column_scale: Tensor | None, absmax: Any = None, absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None, block_size: int = 0,
) -> Layers:  # fmt: skip
    """One layer, of the op's arguments."""
    frozen: Tensor | NF4 = weight
    if block_size:
        shape = lora_b.shape[0], x.shape[1]
        frozen = NF4(weight, absmax, absmax_scale, absmax_offset, block_size, shape)
    return Layers([projection_in_memory(Projection(frozen, lora_a, lora_b, scaling, bias, lora_e, column_scale))])


def _dropout(dropout_p: float, rng: Tensor | None) -> Dropout | None:
    return dispatch.drawn(dropout_p, rng) if rng is not None else None


def _fwd(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None,
    lora_e: Tensor | None, dropout_p: float, rng: Tensor | None, column_scale: Tensor | None = None, *nf4_parts: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layers = _layers(x, weight, lora_a, lora_b, scaling, bias, lora_e, column_scale, *nf4_parts)
    outputs = dispatch.forward(dispatch.matrix(x), layers, _dropout(dropout_p, rng))
    return outputs.ys[0], outputs.hs[0]


def _bwd(
    dy: Tensor, x: Tensor, h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
    lora_e: Tensor | None, dropout_p: float, rng: Tensor | None, needs: list[bool], *nf4_parts: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    layers = _layers(x, weight, lora_a, lora_b, scaling, None, lora_e, None, *nf4_parts)
    need_x, need_a, need_b, need_e = needs
    own_needs = Needs(need_x, (AdapterNeeds(need_a, need_b, need_e and lora_e is not None),))
    dy, x = dispatch.matrix(dy), dispatch.matrix(x)
    found = dispatch.backward([dy], x, [h.contiguous()], layers, _dropout(dropout_p, rng), own_needs)
    (adapter,) = found.layers
    # An op's schema has no optional results: a gradient that nobody asked for is an empty tensor.
    every = found.x, adapter.lora_a, adapter.lora_b, adapter.lora_e
    return tuple(dy.new_empty(0) if grad is None else grad for grad in every)


def _column_scale_bwd(dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    dz, dscale = dispatch.column_scale_bwd(dispatch.matrix(dy), y, vector(bias), column_scale.contiguous())
    return dz, dz.new_empty(0) if dscale is None else dscale


def _column_scale_bwd_fake(
    dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(0) if y is None else torch.empty_like(column_scale)


def _fwd_fake(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    h_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape[0], lora_b.shape[0]),
        x.new_empty(x.shape[0], lora_a.shape[0], dtype=h_dtype),
    )


def _bwd_fake(
    dy: Tensor, x: Tensor, h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
    lora_e: Tensor | None, dropout_p: float, rng: Tensor | None, needs: list[bool], *nf4_parts: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    likes = (x, lora_a, lora_b, lora_e)
    return tuple(
        like.new_empty(like.shape) if need and like is not None else dy.new_empty(0)
        for like, need in zip(likes, needs, strict=True)
    )


for _name, _implementation, _fake in (
    ("lora_linear_fwd", _fwd, _fwd_fake),
    ("lora_linear_bwd", _bwd, _bwd_fake),
    ("column_scale_bwd", _column_scale_bwd, _column_scale_bwd_fake),
):
    # CompositeExplicitAutograd: one implementation for every device; the backend is chosen when it runs, so that
    # compiled graphs obey use_backend too.
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)


def _needed(ctx: Any) -> dict[str, bool]:
    """Of which arguments a gradient is asked for. The last ones are missing in ctx where they were not given."""
    return dict.fromkeys(_ARGUMENTS, False) | dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=False))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, h = output
    ctx.mark_non_differentiable(h)
    given = dict(zip(_ARGUMENTS, inputs, strict=True))
    needs = _needed(ctx)
    # What the gradient of column_scale takes; y and bias are not kept for any other.
    kept = ("y", "bias") if needs["column_scale"] else ()
    tensors = {**given, "h": h, "y": y}
    ctx.names = [name for name in tensors if name in kept or (name in _SAVED and tensors[name] is not None)]
    ctx.save_for_backward(*(tensors[name] for name in ctx.names))
    ctx.settings = {name: given[name] for name in ("scaling", "dropout_p", "block_size")}


_SAVED = {"x", "h", "weight", "lora_a", "lora_b", "lora_e", "rng", "column_scale"}
_SAVED |= {"absmax", "absmax_scale", "absmax_offset"}


def _autograd(ctx: Any, dy: Tensor, _dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
    kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
    needs = _needed(ctx)
    found: dict[str, Tensor] = {}
    if needs["bias"]:
        found["bias"] = dy.sum(0)
    if "column_scale" in kept:
        args = dy, kept.get("y"), kept.get("bias"), kept["column_scale"]
        dy, found["column_scale"] = torch.ops.lora_kernels.column_scale_bwd(*args)
    tensors = (dy, *(kept[name] for name in ("x", "h", "weight", "lora_a", "lora_b")))
    settings, wanted = ctx.settings, ("x", "lora_a", "lora_b", "lora_e")
    scales = [kept.get(name) for name in ("absmax", "absmax_scale", "absmax_offset")]
    gradients = torch.ops.lora_kernels.lora_linear_bwd(
        *tensors, settings["scaling"], kept.get("lora_e"), settings["dropout_p"], kept.get("rng"),
        [needs[name] for name in wanted], *scales, settings["block_size"],
    )  # fmt: skip
    found.update(zip(wanted, gradients, strict=True))
    if needs["weight"]:
        # The base is frozen in LoRA; this and the bias's serve those who train it as well.
        found["weight"] = dy.T @ kept["x"]
    return tuple(found[name] if needs[name] else None for name in _ARGUMENTS)


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("lora_linear has no second derivative; use lora_kernels.reference.lora_linear_ref for it")


torch.library.register_autograd("lora_kernels::lora_linear_fwd", _autograd, setup_context=_setup_context, lib=_library)
for _name in ("lora_linear_bwd", "column_scale_bwd"):
    torch.library.register_autograd(f"lora_kernels::{_name}", refuse_second_derivative, lib=_library)
