"""y = c ∘ (x Wᵀ + scaling · ((dropout(x) Aᵀ) ∘ e) Bᵀ) + bias, with autograd; c is column_scale, 1 where there is none.

x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R], bias [N], lora_e [R]; h = dropout(x) Aᵀ [M, R] in float32.
Saved for backward: x, h and the random (seed, offset), and y where column_scale [N] is trained. Never the mask, never
dropout(x).

There are three roads to a kernel: the torch op where something else than autograd watches, which `prepare` says and
`ops/watched.py` takes; otherwise `project` takes one autograd Function where a gradient is asked for, or the backend
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops import dispatch, watched
from lora_kernels.ops.layers import prepare, under_autocast
from lora_kernels.ops.nf4 import NF4Weight
from lora_kernels.types import NF4, AdapterGradients, AdapterNeeds, Dropout, Gradients, Layers, Needs, Projection

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
    if torch.is_grad_enabled() and (layers.trained or x.requires_grad):
        return _Pass.apply(x, (layers, dropout), *layers.trained.values())
    ys = dispatch.forward(dispatch.matrix(x), layers, dropout).ys
    return tuple(ys) if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class _Pass(torch.autograd.Function):
    """The layers by a backend's two functions; `tensors` are what is trained of them.

    Only what has a gradient is an argument of its own, and of layers that last only what they don't hold is saved: a
    tensor that torch saves takes longer than a small product. Of others all that backward reads is saved, so that torch
    frees it. Whether it has been changed in place is for torch to say of what it saves, for `_unchanged` of the rest.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: tuple[Layers, Dropout | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        layers, dropout = state
        outputs = dispatch.forward(dispatch.matrix(x), layers, dropout)
        ys, trained = outputs.ys, tuple(layers.trained)
        reads_x, scaled = _saved(trained)
        held, versions, own = None, None, layers.tensors
        if layers.lasting:
            held, versions, own = layers, layers.versions(), ()
        more = [t for i in scaled for t in (ys[i], layers.biases[i])]
        ctx.save_for_backward(x if reads_x else None, *outputs.hs, *own, *more)
        ctx.state = held, versions, layers.settings, trained, dropout, x.shape
        if x.dim() != 2:
            # Not by a view: one that is made in here could not be changed in place outside.
            for y in ys:
                y.resize_(*x.shape[:-1], y.shape[-1])
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        layers, versions, settings, trained, dropout, shape = ctx.state
        x, *saved = ctx.saved_tensors
        count = len(dys)
        hs, saved = saved[:count], saved[count:]
        need, needs = _needs(trained, ctx.needs_input_grad, count)
        if layers is not None:
            layers = _unchanged(layers, versions, needs)
        else:
            size = sum(8 if block_size else 5 for _, block_size, _ in settings)
            layers, saved = Layers.of(settings, saved[:size]), saved[size:]
        dzs = [dispatch.matrix(dy) for dy in dys]
        rows = dzs[0].new_empty(()).expand(len(dzs[0]), shape[-1]) if x is None else dispatch.matrix(x)
        found = {}
        for i, name in need:
            if name == "bias":
                found[i, name] = dzs[i].sum(0)
        if layers.scaled:
            dzs = _unscaled(dys, dzs, saved, x, layers, trained, found)
        for i, name in need:
            if name == "weight":
                # The base is frozen in LoRA; this and the bias's serve those who train it as well.
                found[i, name] = dzs[i].T @ rows
        dx = None
        if needs is not None:
            gradients = _by_backend(dzs, rows, hs, layers, dropout, needs, (x, *layers.tensors, *dys))
            dx = gradients.x if gradients.x is None or len(shape) == 2 else gradients.x.view(shape)
            for i, name in need:
                if name in ADAPTER:
                    found[i, name] = getattr(gradients.layers[i], name)
        return dx, None, *map(found.get, trained)


# What the gradient of x and of a part of the adapter reads.
_READ = {
    "x": {"weight", "lora_a", "lora_b", "lora_e"},
    "lora_a": {"lora_b", "lora_e"},
    "lora_b": {"lora_e"},
    "lora_e": {"lora_b"},
}


def _unchanged(layers: Layers, versions: list[int | None], needs: Needs | None) -> Layers:
    """The layers; prepared anew where something has stored their tensors elsewhere since forward, as FSDP does with the
    same values. RuntimeError where one that `needs` reads was changed in place."""
    if (now := layers.versions()) != versions and needs is not None:
        rest = zip(now, versions, strict=True)
        for layer, need in zip(layers, needs.layers, strict=True):
            asked = ["x"] * needs.x + [name for name in ADAPTER if getattr(need, name)]
            read = set().union(*(_READ[name] for name in asked))
            weights = 4 if isinstance(layer.weight, NF4) else 1
            for name in ("weight",) * weights + (*ADAPTER, "column_scale"):
                current, before = next(rest)
                if current != before and name in read:
                    raise RuntimeError(
                        f"{name} {list(getattr(layer, name).shape)}, which the gradient of {' and '.join(asked)} "
                        "reads, has been modified by an inplace operation since lora_linear's forward pass"
                    )
    still = layers.places is not None and layers.places.hold(layers.own, None)
    return layers if still else Layers(layers.projections)


def _unscaled(
    dys: Sequence[Tensor], dzs: Sequence[Tensor], saved: Sequence[Tensor | None], x: Tensor | None, layers: Layers,
    trained: tuple[tuple[int, str], ...], found: dict[tuple[int, str], Tensor],
) -> list[Tensor]:  # fmt: skip
    """The gradients of what each column_scale multiplies; those of the trained ones themselves go to `found`.

    saved: of each trained one in turn y and bias. All are made of dys, y, x and the layers, as in `_by_backend`.
    """
    rest: Iterator[Any] = iter(saved)
    unscaled: list[Tensor] = []
    for i, (dy, dz, layer) in enumerate(zip(dys, dzs, layers, strict=True)):
        place = (i, "column_scale")
        if layer.column_scale is None:
            unscaled.append(dz)
            continue
        y, bias = (dispatch.matrix(next(rest)), next(rest)) if place in trained else (None, None)
        with torch.no_grad():
            gradients = dispatch.column_scale_bwd(dz, y, bias, layer.column_scale)
        dz, of_scale = _without_second_derivative(gradients, (dy, y, x, *layers.tensors))
        unscaled.append(dz)
        found[place] = of_scale
    return unscaled


def _by_backend(
    dzs: Sequence[Tensor], x: Tensor, hs: Sequence[Tensor], layers: Layers, dropout: Dropout | None, needs: Needs,
    sources: Sequence[Tensor | None],
) -> Gradients:  # fmt: skip
    """dx and the adapters' gradients, made of the `sources`; they have no derivatives of their own."""
    if not torch.is_grad_enabled():
        return dispatch.backward(dzs, x, hs, layers, dropout, needs)
    with torch.no_grad():
        gradients = dispatch.backward(dzs, x, hs, layers, dropout, needs)
    adapters = [getattr(own, name) for own in gradients.layers for name in ADAPTER]
    dx, *adapters = _without_second_derivative((gradients.x, *adapters), sources)
    rest = iter(adapters)
    return Gradients(dx, [AdapterGradients(*islice(rest, len(ADAPTER))) for _ in gradients.layers])


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
) -> tuple[tuple[tuple[int, str], ...], Needs | None]:
    """Of what is trained, that of which a gradient is asked for; and what of it a backend computes, if anything."""
    need_x, _, *needed = needs_input_grad
    need = tuple(place for place, asked in zip(trained, needed, strict=True) if asked)
    adapters = tuple(AdapterNeeds(*((i, name) in need for name in ADAPTER)) for i in range(count))
    computed = need_x or any((i, name) in need for i in range(count) for name in ADAPTER)
    return need, Needs(need_x, adapters) if computed else None


def _without_second_derivative(gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> Sequence[Any]:
    """The gradients as something made of the sources that nobody can differentiate."""
    return _NoSecondDerivative.apply(len(gradients), *gradients, *sources) if torch.is_grad_enabled() else gradients


class _NoSecondDerivative(torch.autograd.Function):
    """The first `count` of the tensors, gradients, as something made of the others that nobody can differentiate."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    backward = staticmethod(watched.refuse_second_derivative)
