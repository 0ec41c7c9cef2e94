"""Linear layers whose weight the model itself uses, where an adapter would have no effect or a wrong one."""

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
from torch.utils._pytree import tree_leaves

from lora_kernels.nn.hooks import set_fast_path
from lora_kernels.nn.lora_linear import is_conv1d, is_linear
from lora_kernels.nn.wrappers import named_modules, unwrapped

_TOKENS = 2
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NEVER_CALLED = "the model uses its weight and never calls the layer itself"
CHANGED = "the model changes its weight from call to call, and would not change the adapter with it"
# What the model may ask a weight in 4 bits, since an NF4Weight has it too.
_ABOUT = {Tensor.dtype.__get__, Tensor.device.__get__, Tensor.shape.__get__}
# (training, gradients): a model may read a weight in one mode and call its layer in another.
_MODES = ((False, True), (False, False), (True, True))


def bypassed_layers(model: nn.Module) -> dict[str, str]:
    """{path: why} of the linear layers where an adapter can't work: NEVER_CALLED, as `dt_proj` of Mamba, or CHANGED.

    A dry forward pass of two tokens tells, in training and in evaluation, through a copy of `model` without its values:
    linear layers compute nothing there, and every other parameter is one zero in the shape of the whole, so that it
    costs about the same for a model of any size, and needs none of its weights. Neither the model nor torch's random
    state changes, and hooks don't run.

    A layer that is neither called nor read counts as called: it may be an expert that got no token, or belong to
    images. So do all layers of a model that can't run like this, from `input_ids` or the same tensor for each argument
    that it needs, but for the `out_proj` of nn.MultiheadAttention, which is known.
    """
    known = _output_projections(model)
    return {
        name: CHANGED if probe.changed else NEVER_CALLED
        for name, probe in _probe(model).items()
        if probe.changed or probe.bypassed or name in known
    }


def layers_read(model: nn.Module) -> set[str]:
    """The paths of the linear layers whose weight the model itself uses, whether or not it calls them too.

    Such a weight has to stay dense. Found as by `bypassed_layers`.
    """
    found = {name for name, probe in _probe(model).items() if probe.used or probe.bypassed}
    return found | _output_projections(model)


def _output_projections(model: nn.Module) -> set[str]:
    return {
        f"{name}.out_proj".lstrip(".")
        for name, module in named_modules(model)
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    }


class _Probe(nn.Linear):
    """Stands for a linear layer: gives zeros, and notes what becomes of it.

    In one forward pass: `read`, `called`. In any: `used` if the weight's values were, `changed` if they were written,
    `bypassed` if the layer was read and not called.
    """

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        weight = layer.weight
        self.out_features, self.in_features = weight.shape[::-1] if is_conv1d(layer) else weight.shape
        # In a tuple, so that it is not registered.
        self.stored = (_zeros(weight.shape, weight.dtype, weight.device),)
        self.bias = None if layer.bias is None else _zeros(*_kind(layer.bias))
        self.read = self.called = self.used = self.changed = self.bypassed = False

    @property
    def weight(self) -> Tensor:
        self.read = True
        return self.stored[0]

    def forward(self, x: Tensor) -> Tensor:
        self.called = True
        return x.new_zeros(*x.shape[:-1], self.out_features)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Zeros of that shape which take the memory of one. On meta, models that look at their values could not run."""
    zero = torch.zeros((), dtype=dtype, device="cpu" if device.type == "meta" else device)
    return nn.Parameter(zero.expand(shape), requires_grad=dtype.is_floating_point)


class _Watch(TorchFunctionMode):
    """Inside it the probes learn what is done with their weights.

    F.linear and bmm give zeros; computing them would copy each expert's weights in full.
    """

    def __init__(self, probes: Iterable[_Probe]) -> None:
        super().__init__()
        self.probes = {id(probe.stored[0]): probe for probe in probes}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        for tensor in tree_leaves((args, kwargs)) if func not in _ABOUT else ():
            if (probe := self.probes.get(id(tensor))) is not None:
                probe.used = True
                first = bool(args) and tensor is args[0]
                probe.changed |= first and _writes(func.__name__)
                if first and (probe.changed or func in (Tensor.data.__get__, Tensor.detach)):
                    return tensor
        if func is functional.linear and len(args) > 1:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        if func in (torch.bmm, Tensor.bmm) and len(args) > 1:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


def _writes(function: str) -> bool:
    """Whether torch's function of that name writes to its first argument, as mul_ does."""
    in_place = function.endswith("_") and not function.endswith("__")
    return function == "__setitem__" or (in_place and function != "requires_grad_")


def _probe(model: nn.Module) -> dict[str, _Probe]:
    """{path: probe} of the linear layers, after dry forward passes of a copy of `model` in which they stand."""
    layers = {name: module for name, module in named_modules(model) if is_linear(module)}
    probes = {name: _Probe(layer) for name, layer in layers.items()}
    if not probes:
        return probes
    # What deepcopy takes in place of copying.
    stand_ins: dict[int, Any] = {id(layers[name]): probe for name, probe in probes.items()}
    stand_ins |= {id(parameter): _zeros(*_kind(parameter)) for parameter in model.parameters()}
    stand_ins |= {id(getattr(module, name)): OrderedDict() for module in model.modules() for name in _CALL_HOOKS}
    # What pruning or a weight norm has left of the last call can't be copied.
    left = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
    stand_ins |= {id(tensor): _zeros(*_kind(tensor)) for tensor in left}
    # The hooks of accelerate may hold all the weights.
    stand_ins |= {id(module._hf_hook): None for module in model.modules() if hasattr(module, "_hf_hook")}
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    # Without devices it would start every GPU.
    random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with warnings.catch_warnings(), random, _Watch(probes.values()):
        warnings.simplefilter("ignore")
        try:
            # Nothing is compiled for this. The innermost come first: torch.compile's wrapper may hold another one.
            for part in reversed(list(model.modules())):
                if unwrapped(part) is not part:
                    stand_ins[id(part)] = copy.deepcopy(unwrapped(part), stand_ins)
            twin = copy.deepcopy(model, stand_ins)
            for module in twin.modules():
                set_fast_path(module, False)
                if "_old_forward" in vars(module):
                    module.forward = module._old_forward
            if hasattr(twin, "set_experts_implementation"):
                # Grouped products take no weight that repeats one zero.
                twin.set_experts_implementation("eager")
            inputs = _inputs(twin, device)
        except Exception:
            # Some models can't be copied, or don't say what they take.
            return probes
        for training, gradients in _MODES:
            for args, kwargs in inputs:
                for probe in probes.values():
                    probe.read = probe.called = False
                try:
                    with torch.set_grad_enabled(gradients):
                        twin.train(training)(*args, **kwargs)
                except Exception:
                    # Models are anybody's code, and zeros in place of weights are more than some were made for.
                    continue
                for probe in probes.values():
                    probe.bypassed |= probe.read and not probe.called
                break
    return probes


def _inputs(twin: nn.Module, device: torch.device) -> list[tuple[tuple, dict[str, Any]]]:
    """Arguments that a forward pass may take, the likelier ones first."""
    arguments = inspect.signature(twin.forward).parameters
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=device)
    if "input_ids" in arguments:
        named = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
        return [((), {name: value for name, value in named.items() if name in arguments})]
    needed = sum(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in arguments.values())
    layer = next(module for module in twin.modules() if isinstance(module, _Probe))
    values = layer.stored[0].new_zeros(1, _TOKENS, layer.in_features)
    return [((x,) * needed, {}) for x in (ids, values) if needed]
