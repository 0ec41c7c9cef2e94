"""y = c ∘ (x Wᵀ + scaling · ((dropout(x) Aᵀ) ∘ e) Bᵀ) + bias, with autograd; c is column_scale, 1 where there is none.

x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R], bias [N], lora_e [R]; h = dropout(x) Aᵀ [M, R] in float32.
Saved for backward: x, h and the random (seed, offset), and y where column_scale [N] is trained. Never the mask, never
dropout(x).
The weight is dense or NF4. An op's schema knows tensors only, so NF4 comes as its parts (`weight` is then `packed`);
block_size 0 means dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels import backends, reference
from lora_kernels.backends import choice as strategy
from lora_kernels.backends import cpu
from lora_kernels.ops.cpu_only import is_fused
from lora_kernels.ops.nf4 import NF4Weight
from lora_kernels.types import NF4, Projection

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_NF4_PARTS = "Tensor? absmax=None, Tensor? absmax_scale=None, Tensor? absmax_offset=None, int block_size=0"
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


def _matrix(t: Tensor) -> Tensor:
    """t [..., K] as [M, K]."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _rows(t: Tensor) -> Tensor:
    """t [M, K] with unit stride along K and rows that don't overlap, which is what every backend reads."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _frozen(weight: Tensor, shape: tuple[int, int], absmax=None, absmax_scale=None, absmax_offset=None, block_size=0):
    """The weight as backends take it: NF4, or dense with unit stride along either dimension (Conv1D's as it is)."""
    if block_size:
        return NF4(weight, absmax, absmax_scale, absmax_offset, block_size, shape)
    return weight if 1 in weight.stride() else weight.contiguous()


def _run(name: str, x: Tensor, layers: Sequence[tuple[Tensor | NF4, Tensor]], variant: tuple, *args):
    """Call the function ``name`` of the backend that is in force, or of the fastest; see `strategy.resolve`.

    layers: (weight, lora_a) of each.
    """
    if not backends.in_autocast(x.device.type):
        empty = not x.numel() or not all(weight.shape[0] for weight, _ in layers)
        backend = reference if empty else strategy.resolve(name, x, layers, variant, args)
        return getattr(backend, name)(*args)
    # The op has chosen its dtypes already: autocast must not round inside it.
    with torch.autocast(x.device.type, enabled=False):
        return _run(name, x, layers, variant, *args)


def _parts_of(weight: Tensor | NF4) -> tuple[Tensor | int | None, ...]:
    """The four tensors that make up a weight and its block size, as `_frozen` and the op take them."""
    return weight[:-1] if isinstance(weight, NF4) else (weight, None, None, None, 0)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _fwd(x, weight, lora_a, lora_b, scaling, bias, lora_e, dropout_p, rng, column_scale=None, *nf4_parts):
    frozen = _frozen(weight, (lora_b.shape[0], x.shape[1]), *nf4_parts)
    x, lora_a, lora_b, bias, lora_e = _rows(x), lora_a.contiguous(), lora_b.contiguous(), _vector(bias), _vector(lora_e)
    args = (x, frozen, lora_a, lora_b, scaling, bias, lora_e, dropout_p, rng, _vector(column_scale))
    variant = (bias is not None, dropout_p > 0, column_scale is not None)
    return _run("lora_linear_fwd", x, ((frozen, lora_a),), variant, *args)


def _bwd(dy, x, h, weight, lora_a, lora_b, scaling, lora_e, dropout_p, rng, needs, *nf4_parts):
    frozen = _frozen(weight, (lora_b.shape[0], x.shape[1]), *nf4_parts)
    adapters = (lora_a.contiguous(), lora_b.contiguous())
    tensors = (_rows(dy), _rows(x), h.contiguous(), frozen, *adapters)
    args = (*tensors, scaling, _vector(lora_e), dropout_p, rng, needs)
    grads = _run("lora_linear_bwd", x, ((frozen, lora_a),), (dropout_p > 0, *needs), *args)
    # An op's schema has no optional results: a gradient that nobody asked for is an empty tensor.
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _column_scale_bwd(dy, y, bias, column_scale):
    backend = reference if 0 in dy.shape else backends.resolve(dy, activations=True)
    with torch.autocast(dy.device.type, enabled=False):
        dz, dscale = backend.column_scale_bwd(_rows(dy), y, _vector(bias), _vector(column_scale))
    return dz, dz.new_empty(0) if dscale is None else dscale


def _column_scale_bwd_fake(dy, y, bias, column_scale):
    return dy.new_empty(dy.shape), dy.new_empty(0) if y is None else torch.empty_like(column_scale)


def _fwd_fake(x, weight, lora_a, lora_b, scaling, bias, lora_e, dropout_p, rng, column_scale=None, *nf4_parts):
    h_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape[0], lora_b.shape[0]),
        x.new_empty(x.shape[0], lora_a.shape[0], dtype=h_dtype),
    )


def _bwd_fake(dy, x, h, weight, lora_a, lora_b, scaling, lora_e, dropout_p, rng, needs, *nf4_parts):
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


def _setup_context(ctx, inputs, output):
    y, h = output
    ctx.mark_non_differentiable(h)
    _save(ctx, inputs, y, h)


def _save(ctx, inputs, y, h):
    x, weight, lora_a, lora_b, scaling, bias, lora_e, dropout_p, rng, column_scale, *scales, block_size = inputs
    # What the gradient of column_scale takes; y and bias are not kept for any other.
    scaled = (column_scale, y, bias) if ctx.needs_input_grad[9] else (column_scale, None, None)
    ctx.save_for_backward(x, h, weight, lora_a, lora_b, lora_e, rng, *scaled, *scales)
    ctx.scaling, ctx.dropout_p, ctx.block_size = scaling, dropout_p, block_size


def _autograd(ctx, dy, _dh=None):
    x, h, weight, lora_a, lora_b, lora_e, rng, column_scale, y, bias, *scales = ctx.saved_tensors
    shape, x, dy = x.shape, _matrix(x), _matrix(dy)
    need_x, need_weight, need_a, need_b, _, need_bias, need_e = ctx.needs_input_grad[:7]
    needs = [need_x, need_a, need_b, need_e]
    dbias = dy.sum(0) if need_bias else None
    dscale = None
    if column_scale is not None:
        y = None if y is None else _matrix(y)
        dy, dscale = torch.ops.lora_kernels.column_scale_bwd(dy, y, bias, column_scale)
    # With create_graph the dispatcher is needed: the op's own autograd is what refuses the second derivative.
    direct = not torch.is_grad_enabled() and backends.unwatched(dy, x, h, weight, lora_a, lora_b, lora_e, rng, *scales)
    op = _bwd if direct else torch.ops.lora_kernels.lora_linear_bwd
    tensors = (dy, x, h, weight, lora_a, lora_b)
    grads = op(*tensors, ctx.scaling, lora_e, ctx.dropout_p, rng, needs, *scales, ctx.block_size)
    dx, da, db, de = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    if need_x and len(shape) != 2:
        dx = dx.view(shape)
    # The base is frozen in LoRA; this and dbias serve those who train it or its bias as well.
    dweight = dy.T @ x if need_weight else None
    return dx, dweight, da, db, None, dbias, de, None, None, dscale if y is not None else None, None, None, None, None


def _double_backward(ctx, *grads):
    raise NotImplementedError("lora_linear has no second derivative; use lora_kernels.reference.lora_linear_ref for it")


torch.library.register_autograd("lora_kernels::lora_linear_fwd", _autograd, setup_context=_setup_context, lib=_library)
for _name in ("lora_linear_bwd", "column_scale_bwd"):
    torch.library.register_autograd(f"lora_kernels::{_name}", _double_backward, lib=_library)


class _Eager(torch.autograd.Function):
    """The op with the same autograd, where nothing else sees it and `_Group` doesn't take it: what torch.library
    generates takes as long as a layer.

    So would `setup_context`, for which torch inspects the signature of forward in each call.
    """

    @staticmethod
    def forward(ctx, x, *rest):
        y, h = _fwd(_matrix(x), *rest)
        _save(ctx, (x, *rest), y, h)
        if x.dim() != 2:
            # Not by a view: one that is made in here could not be changed in place outside.
            y.resize_(*x.shape[:-1], y.shape[-1])
        return y

    backward = staticmethod(_autograd)


class _Frozen(torch.autograd.Function):
    """frozen_linear of an NF4 weight, where x alone has a gradient, for which x need not be kept."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(*weight[:-2])
        ctx.settings = weight[-2:], x.shape
        rows = _rows(_matrix(x))
        lora_a, lora_b = _no_adapter(rows, weight)
        args = (rows, weight, lora_a, lora_b, 1.0, _vector(bias), None, 0.0, None, None)
        y, _ = _run("lora_linear_fwd", rows, ((weight, lora_a),), (bias is not None, False, False), *args)
        return y.resize_(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        settings, shape = ctx.settings
        return _frozen_dx(_rows(_matrix(dy)), NF4(*ctx.saved_tensors, *settings)).view(shape), None, None


def _frozen_dx(dy: Tensor, weight: Tensor | NF4) -> Tensor:
    lora_a, lora_b = _no_adapter(dy, weight)
    # Only its shape, dtype and device are looked at.
    x = dy.new_empty(()).expand(dy.shape[0], weight.shape[1])
    needs = (True, False, False, False)
    args = (dy, x, dy.new_empty(dy.shape[0], 0, dtype=torch.float32), weight, lora_a, lora_b, 1.0, None, 0.0, None)
    if backends.by_formula(dy):
        return reference.lora_linear_bwd(*args, needs)[0]
    dx, *_ = _run("lora_linear_bwd", x, ((weight, lora_a),), (False, *needs), *args, needs)
    return dx


def _no_adapter(x: Tensor, weight: NF4) -> tuple[Tensor, Tensor]:
    """lora_a and lora_b of rank 0."""
    N, K = weight.shape
    return x.new_empty(0, K), x.new_empty(N, 0)


class _Group(torch.autograd.Function):
    """lora_linear_group by a backend's two functions; the tensors after `layers` are lora_a, lora_b and lora_e of each.

    Only what may have a gradient is an argument of its own: torch looks at each of them four times. All else of the
    layers that backward reads is saved too, so that torch says where it has been changed, and frees it.
    """

    @staticmethod
    def forward(ctx, x, dropout_p, rng, layers, *adapters):
        results = _group_fwd(_rows(_matrix(x)), layers, dropout_p, rng)
        ys, hs = zip(*results, strict=True)
        frozen = [_parts_of(layer.weight) for layer in layers]
        ctx.save_for_backward(x, rng, *hs, *adapters, *chain.from_iterable(parts[:-1] for parts in frozen))
        ctx.dropout_p = dropout_p
        ctx.settings = [(layer.scaling, parts[-1]) for layer, parts in zip(layers, frozen, strict=True)]
        if x.dim() != 2:
            # Not by a view: one that is made in here could not be changed in place outside.
            for y in ys:
                y.resize_(*x.shape[:-1], y.shape[-1])
        return ys

    @staticmethod
    def backward(ctx, *dys):
        with torch.no_grad():
            dx, grads, sources = _group_bwd(ctx, dys)
        if torch.is_grad_enabled():
            dx, *grads = _NoSecondDerivative.apply(1 + len(grads), dx, *grads, *sources)
        return dx, None, None, None, *grads


def _group_bwd(ctx, dys: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor | None], list[Tensor]]:
    """The gradients of x and of the adapters, and what they are made of."""
    layers, count = [], len(dys)
    x, rng, *rest = ctx.saved_tensors
    hs, adapters, frozen = rest[:count], rest[count : 4 * count], rest[4 * count :]
    for i, (scaling, block_size) in enumerate(ctx.settings):
        lora_a, lora_b, lora_e = adapters[3 * i : 3 * i + 3]
        weight, *scales = frozen[4 * i : 4 * i + 4]
        weight = _frozen(weight, (lora_b.shape[0], x.shape[-1]), *scales, block_size)
        layers.append(Projection(weight, lora_a, lora_b, scaling, None, lora_e))
    need_x, _, _, _, *needs = ctx.needs_input_grad
    rows, needs = _rows(_matrix(x)), [needs[i : i + 3] for i in range(0, len(needs), 3)]
    variant = (ctx.dropout_p > 0, need_x, *chain(*needs))
    args = ([_rows(_matrix(dy)) for dy in dys], rows, hs, layers, ctx.dropout_p, rng, need_x, needs)
    if backends.by_formula(*dys):
        dx, grads = reference.lora_linear_group_bwd(*args)
    else:
        dx, grads = _run("lora_linear_group_bwd", rows, _frozen_and_lora_a(layers), variant, *args)
    return None if dx is None else dx.view(x.shape), list(chain(*grads)), [x, *adapters, *dys]


class _NoSecondDerivative(torch.autograd.Function):
    """The first `count` of the tensors, gradients, as something made of the others that nobody can differentiate."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    backward = staticmethod(_double_backward)


def _group_fwd(
    x: Tensor, layers: Sequence[Projection], dropout_p: float, rng: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    variant = (dropout_p > 0, *(layer.bias is not None for layer in layers))
    return _run("lora_linear_group_fwd", x, _frozen_and_lora_a(layers), variant, x, layers, dropout_p, rng)


def _frozen_and_lora_a(layers: Sequence[Projection]) -> tuple[tuple[Tensor | NF4, Tensor], ...]:
    return tuple((layer.weight, layer.lora_a) for layer in layers)


def _check_tensor(name: str, t: Tensor, shape: tuple[int, ...], x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.shape != shape:
        raise ValueError(f"{name} has shape {list(t.shape)}; expected {list(shape)}")
    if t.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{name} has dtype {t.dtype}; with x of {x.dtype} it must be {allowed}")
    _check_device(name, t, x)


def _check_device(name: str, t: Tensor | NF4Weight, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, x on {x.device}; both must be on the same device")


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    lora_e: Tensor | None = None,
    dropout_p: float = 0.0,
    column_scale: Tensor | None = None,
) -> Tensor:
    """LoRA's linear map (Hu et al. 2021, section 4.1), fused:

        y = c ∘ (x Wᵀ + scaling · ((dropout(x) Aᵀ) ∘ e) Bᵀ) + bias

    Args:
        x: [..., K], float16, bfloat16, float32 or float64 (float64 runs on the reference backend).
        weight: [N, K], the frozen W0: dense in the dtype of x (a transposed view is read in place), or an NF4Weight
            (QLoRA, Dettmers et al. 2023), which is decoded to at least the precision of x: inside the kernels, but for
            many rows on a GPU, where a dense weight in the dtype of x lives for the time of a pass.
        lora_a: [R, K], in the dtype of x or float32.
        lora_b: [N, R], in the dtype of x or float32.
        scaling: lora_alpha / r (rsLoRA: lora_alpha / √r).
        bias: [N] in the dtype of x, or None.
        lora_e: [R], AdaLoRA's diagonal (Zhang et al. 2023), in the dtype of x or float32; None stands for ones.
        dropout_p: in [0, 1): each element of x is zeroed with this probability (rounded to a multiple of 2⁻¹⁶) in the
            low-rank branch only, and the rest scaled by its inverse keep probability. Pass 0 in evaluation.
        column_scale: c [N], DoRA's magnitude over norm (Liu et al. 2024, equation 5), in the dtype of x or float32;
            None stands for ones. Its gradient is taken from y, which is kept for it and must not be changed in place:
            z = (y - bias) / c, so y's rounding is in it, and a column whose scale is 0 has the gradient 0.

    Returns y [..., N] in the dtype of x. Sums run in float32 and are rounded once. All of x, lora_a, lora_b, lora_e,
    column_scale, weight and bias receive gradients if they require them. Under autocast x, weight and bias are cast to
    its dtype, and so are adapters in 16 bits. The dropout mask comes from torch's generator of the device of x, so
    seeds, activation checkpointing and CUDA graphs behave as with torch's own dropout.

    In the transforms of torch.func, under forward-mode differentiation and of tensors that no kernel can read
    (DTensors, other subclasses), torch's own operations compute the same, with torch's dropout and speed.

    Raises ValueError for a wrong shape, device, or dropout_p; TypeError for a wrong dtype, a tensor without strides,
    and for a DTensor beside a tensor that is none.
    """
    x, (layer,) = _cast_layers(x, [Projection(weight, lora_a, lora_b, scaling, bias, lora_e, column_scale)])
    direct = backends.unwatched(*_tensors_of(x, (layer,)))
    _check_layer(x, layer, direct)
    return _call_layers(x, (layer,), dropout_p, direct)[0]


def lora_linear_group(x: Tensor, layers: Sequence[Projection], dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    """`lora_linear` of one x and several layers, such as query, key and value: (y of each layer).

    dropout(x) is one for all of them (as in the merged projections of loralib, Hu et al. 2021). On the CPU, and in
    groups of up to three by Triton's kernels, x is read once for the low-rank part of all layers, and so is its dropout
    drawn; backward writes dx once. CUDA C++ queues the kernels of all layers at once. Elsewhere, and where a weight, a
    bias or a column_scale is trained or something sees the ops (a compiler, a mode), the layers are computed one after
    the other. The result is the same but for the order and the rounding in which dx is summed.

    Raises as `lora_linear` does, and ValueError where there is no layer.
    """
    if not layers:
        raise ValueError("layers is empty; allowed: at least one Projection")
    x, layers = _cast_layers(x, layers)
    direct = backends.unwatched(*_tensors_of(x, layers))
    for index, layer in enumerate(layers):
        try:
            _check_layer(x, layer, direct)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layers[{index}]: {error}") from None
    return _call_layers(x, layers, dropout_p, direct)


def _tensors_of(x: Tensor, layers: Sequence[Projection]) -> list[Tensor | None]:
    tensors = [x]
    for weight, lora_a, lora_b, _, bias, lora_e, column_scale in layers:
        tensors += _read_of(weight)
        tensors += (lora_a, lora_b, bias, lora_e, column_scale)
    return tensors


def _read_of(weight: Tensor | NF4Weight) -> tuple[Tensor | None, ...]:
    """The tensors that an op reads of a weight."""
    return weight.tensors()[:4] if isinstance(weight, NF4Weight) else (weight,)


def _call_layers(x: Tensor, layers: Sequence[Projection], dropout_p: float, direct: bool) -> tuple[Tensor, ...]:
    """y of each layer, all by one function where `_as_one` says so; direct: whether all tensors are `unwatched`."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; allowed: 0 <= dropout_p < 1")
    dropout_p = float(dropout_p)
    if not direct and backends.by_formula(*_tensors_of(x, layers)):
        return _call_formula(x, layers, dropout_p)
    rng = torch.randint(2**62, (2,), dtype=torch.int64, device=x.device) if dropout_p else None
    if direct and _as_one(x, layers):
        return _call_group(x, layers, dropout_p, rng)
    results = []
    for weight, lora_a, lora_b, scaling, bias, lora_e, column_scale in layers:
        scale = None if column_scale is None else column_scale.to(_adapter_dtypes(x)[-1])
        results.append(_call(x, weight, lora_a, lora_b, float(scaling), bias, lora_e, dropout_p, rng, scale))
    return tuple(results)


def _call_formula(x: Tensor, layers: Sequence[Projection], dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    """y of each layer in torch's own operations, where `backends.by_formula` says so."""
    if backends.in_autocast(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _call_formula(x, layers, dropout_p)
    frozen = (layer.weight.tensors() if isinstance(layer.weight, NF4Weight) else layer.weight for layer in layers)
    ready = [layer._replace(weight=weight) for layer, weight in zip(layers, frozen, strict=True)]
    return reference.lora_linear_formula(x, ready, dropout_p)


def _call_group(x: Tensor, layers: Sequence[Projection], dropout_p: float, rng: Tensor | None) -> tuple[Tensor, ...]:
    """y of each layer, of which `_as_one` is true."""
    ready = []
    for weight, lora_a, lora_b, scaling, bias, lora_e, _ in layers:
        frozen = weight.tensors() if isinstance(weight, NF4Weight) else _frozen(weight, weight.shape)
        vectors = _vector(lora_a), _vector(lora_b), float(scaling), _vector(bias), _vector(lora_e)
        ready.append(Projection(frozen, *vectors))
    if torch.is_grad_enabled():
        adapters = chain.from_iterable((layer.lora_a, layer.lora_b, layer.lora_e) for layer in ready)
        return _Group.apply(x, dropout_p, rng, ready, *adapters)
    ys = [y for y, _ in _group_fwd(_rows(_matrix(x)), ready, dropout_p, rng)]
    return tuple(ys) if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def _as_one(x: Tensor, layers: Sequence[Projection]) -> bool:
    """Whether `_Group` takes these layers, whose tensors are `unwatched`."""
    for weight, _, _, _, bias, _, column_scale in layers:
        dense = None if isinstance(weight, NF4Weight) else weight
        if column_scale is not None or not weight.shape[0]:
            return False
        if dense is not None and dense.requires_grad or bias is not None and bias.requires_grad:
            return False
    if not x.numel():
        return False
    backend = backends.resolve(x, activations=True)
    return hasattr(backend, "lora_linear_group_fwd") and len(layers) <= getattr(backend, "MAX_GROUP", math.inf)


def is_plain_on_cpu(x: Tensor) -> bool:
    """Whether x, without a gradient, may go to our C++ past the op."""
    return _plain(x) and is_fused(x)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether C++ may read these where they are."""
    return backends.unwatched(*tensors) and all(t is None or t.is_contiguous() for t in tensors)


def few_rows_projection(x: Tensor, layer: Projection) -> Projection | None:
    """The layer checked as `lora_linear` does and as `cpu.few_rows_layer` takes it, or None where it can't."""
    _check_layer(x, layer, direct=False)
    weight, lora_a, lora_b, _, bias, lora_e, column_scale = layer
    if not _plain(*_read_of(weight), lora_a, lora_b, bias, lora_e, column_scale):
        return None
    return layer._replace(weight=weight.tensors()) if isinstance(weight, NF4Weight) else layer


def frozen_linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias of a frozen weight [N, K], dense or NF4, for x [..., K]; differentiable in x (and bias).

    An NF4 weight is decoded as in `lora_linear`; a dense one is torch's affair, but where no
    gradient is taken and our own product is the faster one on this CPU (for the few rows of generation 1.2 to 5 times).
    Raises as `lora_linear` does.
    """
    dense = not isinstance(weight, NF4Weight)
    past_the_op = _past_the_op(x, weight, bias)
    x, weight, bias = _under_autocast(x, weight, bias)
    if not past_the_op:
        _check_dense(x, weight, bias=bias)
    _check_shapes(x, weight, bias)
    if dense and not past_the_op:
        return torch.nn.functional.linear(x, weight, bias)
    if not dense and _trains_x_alone(x, weight, bias):
        return _Frozen.apply(x, weight.tensors(), bias)
    lora_a, lora_b = _no_adapter(x, weight)
    layer = Projection(weight, lora_a, lora_b, 1.0, bias)
    if backends.by_formula(*_tensors_of(x, [layer])):
        return _call_formula(x, [layer])[0]
    if past_the_op and x.numel() <= cpu.LAYER_ROWS * weight.shape[1]:
        layer = layer if dense else layer._replace(weight=weight.tensors())
        return cpu.few_rows_layers(x, [cpu.few_rows_layer(layer)])[0]
    return _call(x, weight, lora_a, lora_b, 1.0, bias, None, 0.0, None)


def frozen_linear_dx(dy: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = dy W, for what `frozen_linear` gave by a dense weight, outside of autograd.

    16 bits are, on a CPU, our backend's affair: where the processor can't multiply them, torch takes a hundred times as
    long as for float32.
    """
    if dy.dtype != torch.float32 and is_plain_on_cpu(dy) and _plain(weight):
        out.copy_(_frozen_dx(dy, weight))
    else:
        torch.mm(dy, weight, out=out)


def _trains_x_alone(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> bool:
    """Whether a gradient is taken of x but not of the bias, and nothing else sees the op."""
    is_trained = torch.is_grad_enabled() and x.requires_grad and not (bias is not None and bias.requires_grad)
    return is_trained and backends.unwatched(x, *_read_of(weight), bias)


# Elements of a dense weight below which torch's product is taken.
_DENSE_SIZE = 1 << 19


def _past_the_op(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> bool:
    """Whether our own product is called past the op: by NF4, and by a dense weight where it is the faster one."""
    if torch.is_grad_enabled() or not is_plain_on_cpu(x) or not _plain(*_read_of(weight), bias):
        return False
    if isinstance(weight, NF4Weight):
        return True
    if weight.numel() < _DENSE_SIZE or weight.dtype != x.dtype:
        return False
    native = x.dtype == torch.bfloat16 and cpu.native_bfloat16()
    M = x.numel() // weight.shape[-1]
    return M <= cpu.LAYER_ROWS or cpu.own_dtype(weight, M, native) is not None


def _under_autocast(x: Tensor, *others: Tensor | NF4Weight | None) -> tuple:
    if not backends.in_autocast(x.device.type) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), *(other.to(dtype) if isinstance(other, Tensor) else other for other in others)


def _cast_layers(x: Tensor, layers: Sequence[Projection]) -> tuple[Tensor, Sequence[Projection]]:
    """Under autocast, x and the layers in its dtype, but for adapters in float32."""
    if not backends.in_autocast(x.device.type) or x.dtype == torch.float64:
        return x, layers
    cast = []
    x = _under_autocast(x)[0]
    for layer in layers:
        _, weight, bias = _under_autocast(x, layer.weight, layer.bias)
        names = ("lora_a", "lora_b", "lora_e", "column_scale")
        adapter = {name: t.to(x.dtype) for name in names if (t := getattr(layer, name)) is not None and t.itemsize == 2}
        cast.append(layer._replace(weight=weight, bias=bias, **adapter))
    return x, cast


def _adapter_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)


def _check_layer(x: Tensor, layer: Projection, direct: bool) -> None:
    """direct: whether all tensors are `unwatched`, which are dense."""
    weight, lora_a, lora_b, _, bias, lora_e, column_scale = layer
    if not direct:
        adapter = {"lora_a": lora_a, "lora_b": lora_b, "lora_e": lora_e, "column_scale": column_scale}
        _check_dense(x, weight, bias=bias, **adapter)
    _check_shapes(x, weight, bias)
    if lora_a.dim() != 2 or lora_a.shape[0] < 1:
        raise ValueError(f"lora_a has shape {list(lora_a.shape)}; expected [R, K], and the rank R must be at least 1")
    (N, K), R, dtypes = weight.shape, lora_a.shape[0], _adapter_dtypes(x)
    _check_tensor("lora_a", lora_a, (R, K), x, dtypes)
    _check_tensor("lora_b", lora_b, (N, R), x, dtypes)
    if lora_e is not None:
        _check_tensor("lora_e", lora_e, (R,), x, dtypes)
    if column_scale is not None:
        _check_tensor("column_scale", column_scale, (N,), x, dtypes)


def _check_dense(x: Tensor, weight: Tensor | NF4Weight, **others: Tensor | None) -> None:
    if isinstance(weight, NF4Weight):
        weight.check()
        weight = weight.packed
    backends.check_dense(x=x, weight=weight, **others)


def _check_shapes(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> None:
    if x.dtype not in _FLOATING:
        raise TypeError(f"x has dtype {x.dtype}; allowed: {', '.join(str(dtype) for dtype in _FLOATING)}")
    if x.dim() < 1 or len(weight.shape) != 2:
        raise ValueError(f"x and weight must be [..., K] and [N, K]; given {list(x.shape)} and {list(weight.shape)}")
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(
            f"x has {x.shape[-1]} features (shape {list(x.shape)}); weight [N, K] = [{N}, {K}] expects {K}"
        )
    if isinstance(weight, NF4Weight):
        _check_device("weight", weight, x)
    else:
        _check_tensor("weight", weight, (N, K), x, (x.dtype,))
    if bias is not None:
        _check_tensor("bias", bias, (N,), x, (x.dtype,))


def _call(x, weight, lora_a, lora_b, scaling, bias, lora_e, dropout_p, rng, column_scale=None) -> Tensor:
    N, K = weight.shape
    weight, *nf4_parts = _parts_of(weight.tensors() if isinstance(weight, NF4Weight) else weight)
    tensors = (x, weight, lora_a, lora_b, bias, lora_e, column_scale)
    rest = (weight, lora_a, lora_b, scaling, bias, lora_e, dropout_p, rng, column_scale, *nf4_parts)
    unwatched = backends.unwatched(*tensors)
    if unwatched and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Eager.apply(x, *rest)
    op = _fwd if unwatched else torch.ops.lora_kernels.lora_linear_fwd
    y, _ = op(_matrix(x), *rest)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], N)
