"""Unsloth's fused LoRA layer over one frozen weight. It needs a GPU and the packages unsloth and bitsandbytes.

Of Unsloth only the modules that hold kernels are imported, not the __init__ of its packages: those patch transformers
and bitsandbytes under the other contenders of the process, and change settings of torch's allocator.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.bench.cases import SCALING

# Packages whose __init__ is left out, a parent before its children.
_HOLLOW = ("unsloth_zoo", "unsloth_zoo.temporary_patches", "unsloth", "unsloth.kernels")


@functools.cache
def _kernels(module: str) -> ModuleType:
    for name in _HOLLOW:
        if name in sys.modules:
            continue
        parent, _, child = name.rpartition(".")
        found = importlib.machinery.PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        spec = importlib.machinery.ModuleSpec(name, None, origin=found.origin, is_package=True)
        spec.submodule_search_locations = list(found.submodule_search_locations or ())
        sys.modules[name] = importlib.util.module_from_spec(spec)
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    return importlib.import_module(f"unsloth.kernels.{module}")


def _frozen(weight: Tensor, nf4: bool) -> tuple[Tensor, Any]:
    """The weight [N, K] and None, or bitsandbytes' NF4 of it, scales quantised too, and its state."""
    if not nf4:
        return weight, None
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def unsloth_layer(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float = 0.0, nf4: bool = False
) -> Callable[[Tensor], Tensor]:
    """What Unsloth trains with: x [M, K] to y [M, N], with gradients of x and the adapters."""
    frozen = _frozen(weight, nf4)
    function = _kernels("fast_lora").LoRA_W
    dropout = (dropout_p, None) if dropout_p else ()

    def forward(x: Tensor) -> Tensor:
        # Its backward takes [batch, tokens, K] alone.
        return function.apply(x[None], *frozen, lora_a, lora_b, SCALING, *dropout)[0]

    return forward


def unsloth_decode_layer(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, nf4: bool = False
) -> Callable[[Tensor], Tensor]:
    """What Unsloth generates with: one token of each of M sequences, without gradients, the adapters' casts kept."""
    packed, state = _frozen(weight, nf4)
    layer: Any = torch.nn.Module()
    layer.base_layer = torch.nn.Linear(1, 1, bias=False, device="meta")
    layer.base_layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    if state is not None:
        layer.base_layer.weight.quant_state = state
    for name, adapter in (("lora_A", lora_a), ("lora_B", lora_b)):
        linear = torch.nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(adapter.detach(), requires_grad=False)
        setattr(layer, name, torch.nn.ModuleDict({"default": linear}))
    layer.scaling, layer.active_adapters = {"default": SCALING}, ["default"]
    layer.disable_adapters = layer.merged = False
    function = _kernels("utils").fast_linear_forward
    return lambda x: function(layer, x[:, None])[:, 0]
