"""By which backend a pass of lora_linear runs: the only place that knows of autocast, of backends and of the choice
among them on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lora_kernels import backends, reference
from lora_kernels.backends import choice
from lora_kernels.backends.contract import Backend
from lora_kernels.types import Dropout, Gradients, Layers, Needs, Outputs


def matrix(t: Tensor) -> Tensor:
    """t [..., K] as [M, K], with unit stride along K and rows that don't overlap, which is what every backend reads."""
    t = t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    if t.is_contiguous() and t.shape[1] > 1:
        return t
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def most_layers(x: Tensor) -> int:
    """How many layers a pass takes at once."""
    return backends.resolve(x, activations=True).MAX_LAYERS


def forward(x: Tensor, layers: Layers, dropout: Dropout | None) -> Outputs:
    """`Backend.lora_linear_fwd` for x [M, K]."""
    if backends.in_autocast(x):
        with _own_dtypes(x):
            return forward(x, layers, dropout)
    backend = _backend(x, layers)
    if choice.is_open(backend, x):
        backend = choice.resolve(x, layers, dropout, None, lambda each: each.lora_linear_fwd(x, layers, dropout))
    return backend.lora_linear_fwd(x, layers, dropout)


def backward(
    dys: Sequence[Tensor], x: Tensor, hs: Sequence[Tensor], layers: Layers, dropout: Dropout | None, needs: Needs
) -> Gradients:
    """`Backend.lora_linear_bwd` for dy [M, N] and x [M, K]; by the formulas where a kernel can't read the gradients, as
    where torch batches several of them."""
    if backends.in_autocast(x):
        with _own_dtypes(x):
            return backward(dys, x, hs, layers, dropout, needs)
    backend = reference if backends.by_formula(*dys) else _backend(x, layers)
    args = dys, x, hs, layers, dropout, needs
    if choice.is_open(backend, x):
        backend = choice.resolve(x, layers, dropout, needs, lambda each: each.lora_linear_bwd(*args))
    return backend.lora_linear_bwd(*args)


def column_scale_bwd(
    dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`Backend.column_scale_bwd`, dy and y [M, N]."""
    by_reference = 0 in dy.shape or backends.by_formula(dy)
    backend = reference if by_reference else backends.resolve(dy, activations=True)
    with _own_dtypes(dy):
        return backend.column_scale_bwd(dy, y, bias, column_scale)


def _backend(x: Tensor, layers: Layers) -> Backend:
    if layers.empty or not x.numel():
        return reference
    name = backends.selected()
    if layers.backend is None or layers.backend[0] != name:
        layers.backend = name, backends.resolve(x, activations=True)
    return layers.backend[1]


def _own_dtypes(x: Tensor) -> AbstractContextManager[None]:
    """Without autocast: the op has chosen its dtypes already."""
    return torch.autocast(x.device.type, enabled=False) if backends.in_autocast(x) else nullcontext()


def drawn(dropout_p: float, rng: Tensor) -> Dropout | None:
    """None for a probability that rounds to 0."""
    return Dropout(dropout_p, rng) if reference.dropout_threshold(dropout_p) else None
