"""Linear layers that a model never calls, though it uses their weight: an adapter put there would have no effect."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lora_kernels.nn.lora_linear import is_conv1d, is_linear
from lora_kernels.nn.wrappers import named_modules, unwrapped

_TOKENS = 2
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def bypassed_layers(model: nn.Module) -> list[str]:
    """The paths of the linear layers whose weight the model reads without ever calling them, as Mamba does `dt_proj`.

    A dry forward pass of two tokens tells, through a copy of `model` without its values: linear layers compute nothing
    there, and every other parameter is one zero in the shape of the whole, so that it costs about the same for a model
    of any size, and needs none of its weights. Neither the model nor torch's random state changes, and hooks don't run.

    A layer that is neither called nor read counts as called: it may be an expert that got no token, or belong to
    images. So do all layers of a model that has no `input_ids` or can't run like this, but for the `out_proj` of
    nn.MultiheadAttention, which is known.
    """
    found = {
        f"{name}.out_proj".lstrip(".")
        for name, module in named_modules(model)
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    }
    probes = {name: (module, _Probe(module)) for name, module in named_modules(model) if is_linear(module)}
    if probes and _dry_forward(model, probes.values()):
        found |= {name for name, (_, probe) in probes.items() if probe.read and not probe.called}
    return [name for name in probes if name in found]


class _Probe(nn.Linear):
    """Stands for a linear layer: gives zeros, and notes whether it is called or its weight read."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        weight = layer.weight
        self.out_features, self.in_features = weight.shape[::-1] if is_conv1d(layer) else weight.shape
        self.stored = (weight.shape, weight.dtype, weight.device)
        self.bias = None if layer.bias is None else _zeros(*_kind(layer.bias))
        self.read = self.called = False

    @property
    def weight(self) -> Tensor:
        self.read = True
        return _zeros(*self.stored)

    def forward(self, x: Tensor) -> Tensor:
        self.called = True
        return x.new_zeros(*x.shape[:-1], self.out_features)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Zeros of that shape which take the memory of one. On meta, models that look at their values could not run."""
    zero = torch.zeros((), dtype=dtype, device="cpu" if device.type == "meta" else device)
    return nn.Parameter(zero.expand(shape), requires_grad=dtype.is_floating_point)


class _NoProducts(TorchFunctionMode):
    """Inside it F.linear and bmm give zeros; computing them would copy each expert's weights in full."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is functional.linear and len(args) > 1:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        if func in (torch.bmm, Tensor.bmm) and len(args) > 1:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


def _dry_forward(model: nn.Module, probes: Iterable[tuple[nn.Module, _Probe]]) -> bool:
    """Runs a copy of `model` in which probes stand for their layers; whether it could run."""
    arguments = inspect.signature(model.forward).parameters
    if "input_ids" not in arguments:
        return False
    # What deepcopy takes in place of copying.
    stand_ins: dict[int, Any] = {id(layer): probe for layer, probe in probes}
    stand_ins |= {id(parameter): _zeros(*_kind(parameter)) for parameter in model.parameters()}
    stand_ins |= {id(getattr(module, name)): OrderedDict() for module in model.modules() for name in _HOOKS}
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=device)
    # Without devices it would start every GPU.
    random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    try:
        # With gradients, since without them torch's encoder layers take a way that training doesn't.
        with warnings.catch_warnings(), random, torch.enable_grad():
            warnings.simplefilter("ignore")
            # Nothing is compiled for this. The innermost come first: torch.compile's wrapper may hold another one.
            for part in reversed(list(model.modules())):
                if unwrapped(part) is not part:
                    stand_ins[id(part)] = copy.deepcopy(unwrapped(part), stand_ins)
            twin = copy.deepcopy(model, stand_ins).eval()
            if hasattr(twin, "set_experts_implementation"):
                # Grouped products take no weight that repeats one zero.
                twin.set_experts_implementation("eager")
            with _NoProducts():
                twin(**{name: value for name, value in inputs.items() if name in arguments})
    except Exception:
        # Models are anybody's code, and zeros in place of weights are more than some were made for.
        return False
    return True
