"""y = c ∘ (x Wᵀ + scaling · ((dropout(x) Aᵀ) ∘ e) Bᵀ) + bias, with autograd; c is column_scale, 1 where there is none.

x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R], bias [N], lora_e [R]; h = dropout(x) Aᵀ [M, R] in float32.
Saved for backward: x, h and the random (seed, offset), and y where column_scale [N] is trained. Never the mask, never
dropout(x).

There are three roads to a kernel: the torch op where something else than autograd watches, which `prepare` says and
`ops/watched.py` takes; otherwise `project` takes one autograd Function where a gradient is asked for, or the backend
alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lora_kernels.ops import dispatch, watched
from lora_kernels.ops.layers import prepare, under_autocast
from lora_kernels.ops.nf4 import NF4Weight
from lora_kernels.types import AdapterNeeds, Dropout, Layers, Needs, Projection

ADAPTER = ("lora_a", "lora_b", "lora_e")


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
    return lora_linear_group(x, [Projection(weight, lora_a, lora_b, scaling, bias, lora_e, column_scale)], dropout_p)[0]


def lora_linear_group(x: Tensor, layers: Sequence[Projection], dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    """`lora_linear` of one x and several layers, such as query, key and value: (y of each layer).

    dropout(x) is one for all of them (as in the merged projections of loralib, Hu et al. 2021). On the CPU, and in
    groups of up to three by Triton's kernels, x is read once for the low-rank part of all layers, and so is its dropout
    drawn; backward writes dx once. CUDA C++ queues the kernels of all layers at once. Elsewhere, and where something
    sees the ops (a compiler, a mode), the layers are computed one after the other. The result is the same but for the
    order and the rounding in which dx is summed.

    Raises as `lora_linear` does, and ValueError where there is no layer.
    """
    if not layers:
        raise ValueError("layers is empty; allowed: at least one Projection")
    x, layers = under_autocast(x, layers)
    prepared = prepare(x, layers)
    _check_dropout(dropout_p)
    if prepared is None:
        return watched.project(x, layers, float(dropout_p))
    return project(x, prepared, float(dropout_p))


def _check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; allowed: 0 <= dropout_p < 1")


def project(x: Tensor, layers: Layers, dropout_p: float) -> tuple[Tensor, ...]:
    """y [..., N] of each layer, for x that fits them and is `unwatched`, outside of autocast or in its dtype."""
    dropout = None
    if dropout_p:
        _check_dropout(dropout_p)
        rng = torch.randint(2**62, (2,), dtype=torch.int64, device=x.device)
        dropout = dispatch.drawn(dropout_p, rng)
    if len(layers) > 1 and len(layers) > dispatch.most_layers(x):
        return tuple(_one_pass(x, Layers([layer]), dropout)[0] for layer in layers)
    return _one_pass(x, layers, dropout)


def _one_pass(x: Tensor, layers: Layers, dropout: Dropout | None) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled():
        trained = layers.trained()
        if trained or x.requires_grad:
            return _Pass.apply(x, layers, dropout, tuple(trained), *trained.values())
    ys = [output.y for output in dispatch.forward(dispatch.matrix(x), layers, dropout)]
    return tuple(ys) if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class _Pass(torch.autograd.Function):
    """The layers by a backend's two functions; `tensors` are what is trained of them, whose places are `trained`.

    Only what has a gradient is an argument of its own: torch looks at each of them four times. All else that backward
    reads is saved too, so that torch says where it has been changed, and frees it.
    """

    @staticmethod
    def forward(ctx, x, layers, dropout, trained, *tensors):
        outputs = dispatch.forward(dispatch.matrix(x), layers, dropout)
        ys, hs = [output.y for output in outputs], [output.h for output in outputs]
        rng, dropout_p = (None, 0.0) if dropout is None else (dropout.rng, dropout.p)
        reads_x, scaled = _saved(trained)
        more = [t for i in scaled for t in (ys[i], layers.biases[i])]
        ctx.save_for_backward(x if reads_x else None, rng, *hs, *layers.tensors, *more)
        # Not the layers themselves, which would keep what torch frees after backward.
        ctx.state = weakref.ref(layers), layers.settings, trained, dropout_p, x.shape
        if x.dim() != 2:
            # Not by a view: one that is made in here could not be changed in place outside.
            for y in ys:
                y.resize_(*x.shape[:-1], y.shape[-1])
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        weak_layers, settings, trained, dropout_p, shape = ctx.state
        x, rng, *saved = ctx.saved_tensors
        count = len(dys)
        end = count + sum(8 if block_size else 5 for _, block_size, _ in settings)
        hs, tensors, scaled = saved[:count], saved[count:end], saved[end:]
        layers = weak_layers()
        if layers is None or not layers.are(tensors):
            # Nobody keeps them, or something has stored the tensors elsewhere, as hooks on saved tensors do.
            layers = Layers.of(settings, tensors)
        need, needs = _needs(trained, ctx.needs_input_grad, count)
        dzs, found = [dispatch.matrix(dy) for dy in dys], {}
        rows = dzs[0].new_empty(()).expand(len(dzs[0]), shape[-1]) if x is None else dispatch.matrix(x)
        for i, layer in enumerate(layers.projections):
            if (i, "bias") in need:
                found[i, "bias"] = dzs[i].sum(0)
            if layer.column_scale is not None:
                y, bias = None, None
                if (i, "column_scale") in trained:
                    y, bias, *scaled = scaled
                    y = dispatch.matrix(y)
                sources = (dys[i], y, x, *tensors)
                dzs[i], found[i, "column_scale"] = _unscaled(dzs[i], y, bias, layer.column_scale, sources)
            if (i, "weight") in need:
                # The base is frozen in LoRA; this and the bias's serve those who train it as well.
                found[i, "weight"] = dzs[i].T @ rows
        dx = None
        if needs is not None:
            dropout = None if rng is None else Dropout(dropout_p, rng)
            dx, adapters = _by_backend(dzs, rows, hs, layers, dropout, needs, (x, *tensors, *dys))
            dx = dx if dx is None or len(shape) == 2 else dx.view(shape)
            found.update(adapters)
        return dx, None, None, None, *(found[place] if place in need else None for place in trained)


def _unscaled(
    dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor, sources: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """The gradients of what column_scale multiplies and of itself, made of the `sources`; as in `_by_backend`."""
    if not torch.is_grad_enabled():
        return dispatch.column_scale_bwd(dy, y, bias, column_scale)
    with torch.no_grad():
        gradients = dispatch.column_scale_bwd(dy, y, bias, column_scale)
    return _NoSecondDerivative.apply(2, *gradients, *sources)


def _by_backend(
    dzs: Sequence[Tensor], x: Tensor, hs: Sequence[Tensor], layers: Layers, dropout: Dropout | None, needs: Needs,
    sources: Sequence[Tensor | None],
) -> tuple[Tensor | None, dict[tuple[int, str], Tensor | None]]:  # fmt: skip
    """dx and, by place, the adapters' gradients, made of the `sources`; they have no derivatives of their own."""
    if not torch.is_grad_enabled():
        gradients = dispatch.backward(dzs, x, hs, layers, dropout, needs)
        places = {}
        for i, own in enumerate(gradients.layers):
            places[i, "lora_a"], places[i, "lora_b"], places[i, "lora_e"] = own.lora_a, own.lora_b, own.lora_e
        return gradients.x, places
    with torch.no_grad():
        dx, places = _by_backend(dzs, x, hs, layers, dropout, needs, ())
    dx, *adapters = _NoSecondDerivative.apply(1 + len(places), dx, *places.values(), *sources)
    return dx, dict(zip(places, adapters, strict=True))


@lru_cache
def _saved(trained: tuple[tuple[int, str], ...]) -> tuple[bool, list[int]]:
    """Whether x is kept, for the gradient of a weight or an adapter; and the layers whose y and bias are, for that of
    their column_scale."""
    return any(name in ("lora_a", "weight") for _, name in trained), [
        i for i, name in trained if name == "column_scale"
    ]


@lru_cache
def _needs(
    trained: tuple[tuple[int, str], ...], needs_input_grad: tuple[bool, ...], count: int
) -> tuple[frozenset[tuple[int, str]], Needs | None]:
    """Of what is trained, that of which a gradient is asked for; and what of it a backend computes, if anything."""
    need_x, _, _, _, *needed = needs_input_grad
    need = frozenset(place for place, asked in zip(trained, needed, strict=True) if asked)
    adapters = tuple(AdapterNeeds(*((i, name) in need for name in ADAPTER)) for i in range(count))
    computed = need_x or any((i, name) in need for i in range(count) for name in ADAPTER)
    return need, Needs(need_x, adapters) if computed else None


class _NoSecondDerivative(torch.autograd.Function):
    """The first `count` of the tensors, gradients, as something made of the others that nobody can differentiate."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    backward = staticmethod(watched.refuse_second_derivative)
