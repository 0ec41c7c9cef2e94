"""Linear layers whose weight the model itself uses, where an adapter would have no effect or a wrong one."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_leaves

from lora_kernels.nn.hooks import set_fast_path
from lora_kernels.nn.lora_linear import is_conv1d, is_linear
from lora_kernels.nn.wrappers import named_modules, unwrapped

_TOKENS = 2
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NEVER_CALLED = "the model uses its weight and never calls the layer itself"
CHANGED = "the model changes its weight from call to call, and would not change the adapter with it"
_DTYPE, _DEVICE, _SHAPE, _DATA = (getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "data"))
# The attributes of a weight that an NF4Weight has too: a model that asks for no more can run in 4 bits.
_IN_NF4 = {_DTYPE, _DEVICE, _SHAPE}
# (training, gradients): a model may read a weight in one mode and call its layer in another.
_MODES = ((False, True), (False, False), (True, True))


def bypassed_layers(model: nn.Module) -> dict[str, str]:
    """{path: why} of the linear layers where an adapter can't work: NEVER_CALLED, as `dt_proj` of Mamba, or CHANGED.

    This comes from dry forward passes of two tokens, in training and in evaluation, through a copy of `model` without
    its values. There, linear layers compute nothing, and every other parameter is a single zero that repeats. So a pass
    costs about the same for a model of any size and needs none of its weights. Neither the model nor torch's random
    state changes, and hooks don't run.

    A layer that is neither called nor read counts as called: it may be an expert that got no token. So do all layers of
    a model without such a pass: its forward fails with `input_ids`, zeros or an empty image for each argument that it
    needs (else for its first), or was replaced on the object by a function, which would run the model itself. The
    `out_proj` of nn.MultiheadAttention is known without a pass.
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
    found = {name for name, probe in _probe(model).items() if probe.used}
    return found | _output_projections(model)


def _output_projections(model: nn.Module) -> set[str]:
    return {
        f"{name}.out_proj".lstrip(".")
        for name, module in named_modules(model)
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    }


class _Probe(nn.Linear):
    """Stands for a linear layer: gives zeros, and notes what becomes of it.

    In one forward pass: `read` if something was computed from the weight, `called`. In any: `used` if the model asked
    for more than an NF4Weight has, `changed` if the weight was written, `bypassed` if it was read and not called.
    """

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        weight = layer.weight
        self.out_features, self.in_features = weight.shape[::-1] if is_conv1d(layer) else weight.shape
        # Not registered as a parameter.
        self.__dict__["weight"] = _zeros(*_kind(weight))
        self.register_parameter("bias", None if layer.bias is None else _zeros(*_kind(layer.bias)))
        self.read = self.called = self.used = self.changed = self.bypassed = False

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
        self.probes = {id(probe.weight): probe for probe in probes}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        weights = [self.probes[id(each)] for each in tree_leaves((args, kwargs)) if id(each) in self.probes]
        for probe in weights if func not in _IN_NF4 else ():
            probe.used = True
            first = bool(args) and probe.weight is args[0]
            probe.changed |= first and _writes(func.__name__)
            if first and (probe.changed or func in (_DATA, Tensor.detach)):
                return probe.weight
        if func is functional.linear and len(args) > 1:
            result = args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        elif func in (torch.bmm, Tensor.bmm) and len(args) > 1:
            result = args[0].new_zeros(*args[0].shape[:-1], args[1].shape[-1])
        else:
            result = func(*args, **(kwargs or {}))
        # A dtype or a size is no use of the values.
        if weights and tree_any(lambda each: isinstance(each, Tensor), result):
            for probe in weights:
                probe.read = True
        return result


def _writes(function: str) -> bool:
    """Whether torch's function of that name writes to its first argument, as mul_ does."""
    in_place = function.endswith("_") and not function.endswith("__")
    return function == "__setitem__" or (in_place and function != "requires_grad_")


def _leads_back(module: nn.Module) -> bool:
    """Whether a copy of `module` would call the model itself: a forward put on the object keeps what it was made of."""
    for own in (vars(module).get(name) for name in ("forward", "_old_forward")):
        # A bound method is copied with its module, but not what its function has kept.
        kept = inspect.getclosurevars(own).nonlocals.values() if isinstance(own, MethodType) else ()
        if isinstance(own, FunctionType) or any(isinstance(each, (nn.Module, MethodType)) for each in kept):
            return True
    return False


def _probe(model: nn.Module) -> dict[str, _Probe]:
    """{path: probe} of the linear layers, after dry forward passes of a copy of `model` in which they stand."""
    layers = {name: module for name, module in named_modules(model) if is_linear(module)}
    probes = {name: _Probe(layer) for name, layer in layers.items()}
    # Nothing can stand for a lazy layer's weight, which has no shape yet.
    if not probes or any(is_lazy(t) for t in model.parameters()):
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
            if any(map(_leads_back, model.modules())):
                return probes
            # Nothing is compiled for this. The innermost come first: torch.compile's wrapper may hold another one.
            for part in reversed(list(model.modules())):
                if unwrapped(part) is not part:
                    stand_ins[id(part)] = copy.deepcopy(unwrapped(part), stand_ins)
            twin: Any = copy.deepcopy(model, stand_ins)
            for module in twin.modules():
                set_fast_path(module, False)
                if "_old_forward" in vars(module):
                    vars(module)["forward"] = module._old_forward
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


def _inputs(twin: nn.Module, device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments that a forward pass may take, the likelier ones first."""
    arguments = inspect.signature(twin.forward).parameters
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device=device)
    layer = next(module for module in twin.modules() if isinstance(module, _Probe))
    kind: dict[str, Any] = {"dtype": layer.weight.dtype, "device": device}
    values, image = torch.zeros(1, _TOKENS, layer.in_features, **kind), _image(twin, **kind)
    if "input_ids" in arguments:
        named = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
        named = {name: value for name, value in named.items() if name in arguments}
        images = [{"pixel_values": image}] if image is not None and "pixel_values" in arguments else []
        return [((), named | each) for each in ({}, *images)]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [each for each in arguments.values() if each.default is each.empty and each.kind not in variadic]
    main = arguments.get(getattr(twin, "main_input_name", "")) or next(iter(arguments.values()), None)
    needed = needed or [each for each in (main,) if each is not None and each.kind is not each.VAR_KEYWORD]
    by_position = sum(each.kind in (each.POSITIONAL_ONLY, each.VAR_POSITIONAL) for each in needed)
    names = [each.name for each in needed if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    tensors = [ids, values] if image is None else [image, ids, values]
    # A batch that has each entry that is asked for.
    batches: list[Any] = [defaultdict(functools.partial(lambda x: x, x)) for x in tensors]
    return [((x,) * by_position, dict.fromkeys(names, x)) for x in (*tensors, *batches) if needed]


def _image(twin: nn.Module, **kind: Any) -> Tensor | None:
    """An empty image of the size in the model's config; None where it has none."""
    config = getattr(twin, "config", None)
    config = getattr(config, "vision_config", config)
    if (size := getattr(config, "image_size", None)) is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, getattr(config, "num_channels", 3), height, width, **kind)
