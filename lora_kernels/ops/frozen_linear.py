"""y = x Wᵀ + bias of a frozen weight: lora_linear of rank 0, or torch's own product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels import backends
from lora_kernels.ops import dispatch, watched
from lora_kernels.ops.layers import (
    autocast_dtype,
    check_dense,
    check_frozen,
    projection_in_memory,
    weight_tensors,
)
from lora_kernels.ops.lora_linear import project
from lora_kernels.ops.nf4 import NF4Weight
from lora_kernels.types import AdapterNeeds, Layers, Needs, Projection


def frozen_linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias of a frozen weight [N, K], dense or NF4, for x [..., K]; differentiable in x (and bias).

    An NF4 weight is decoded as in `lora_linear`; a dense one is torch's affair, but where no
    gradient is taken and our own product is the faster one on this CPU (for the few rows of generation 1.2 to 5 times).
    Raises as `lora_linear` does.
    """
    if (dtype := autocast_dtype(x)) is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight if isinstance(weight, NF4Weight) else weight.to(dtype)
    in_memory = backends.unwatched(x, *weight_tensors(weight), bias)
    by_torch = None if isinstance(weight, NF4Weight) or (in_memory and _is_ours(x, weight)) else weight
    if by_torch is not None or not in_memory:
        check_dense(x, weight, bias=bias)
    check_frozen(x, weight, bias)
    if by_torch is not None:
        return torch.nn.functional.linear(x, by_torch, bias)
    layer = _frozen(x, weight, bias)
    if not in_memory:
        return watched.project(x, [layer], 0.0)[0]
    return project(x, Layers([projection_in_memory(layer)]), 0.0)[0]


def frozen_layers(x: Tensor, weight: NF4Weight, bias: Tensor | None, kept: Layers | None) -> Layers | None:
    """The layer as `project` takes it, checked for x: `kept`, if that was made for the very tensors.

    None where it is watched, or under autocast. Raises as `lora_linear` does.
    """
    if autocast_dtype(x) is not None or not backends.unwatched(x, *weight.parts, bias):
        return None
    own = *weight.parts, bias
    if kept is not None and kept.are(own, x):
        return kept
    check_frozen(x, weight, bias)
    # What is made in inference mode can't be saved for backward.
    with torch.inference_mode(False):
        layers = Layers([projection_in_memory(_frozen(x, weight, bias))])
    layers.keep(own, x)
    return layers


def frozen_linear_dx(dy: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = dy W, for what `frozen_linear` gave by a dense weight, outside of autograd.

    16 bits are, on a CPU, our backend's affair: where the processor can't multiply them, torch takes a hundred times as
    long as for float32.
    """
    backend = backends.resolve(dy, activations=True)
    if dy.dtype == torch.float32 or backend.name != "cpu" or not backends.unwatched(dy, weight):
        torch.mm(dy, weight, out=out)
        return
    layers = Layers([projection_in_memory(_frozen(dy, weight, None))])
    # Only its shape, dtype and device are looked at.
    x, h = dy.new_empty(()).expand(dy.shape[0], weight.shape[1]), dy.new_empty(dy.shape[0], 0, dtype=torch.float32)
    needs = Needs(True, (AdapterNeeds(False, False),))
    dx: Any = dispatch.backward([dispatch.matrix(dy)], x, [h], layers, None, needs).x
    out.copy_(dx)


def _frozen(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Projection:
    """A layer whose adapter has rank 0."""
    N, K = weight.shape
    return Projection(weight, x.new_empty(0, K), x.new_empty(N, 0), 1.0, bias)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    if torch.is_grad_enabled() or not x.numel() or x.dim() < 1 or x.shape[-1] != weight.shape[-1]:
        return False
    return backends.resolve(x, activations=True).beats_torch(dispatch.matrix(x), weight)
