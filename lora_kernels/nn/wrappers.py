"""Models inside wrappers (torch.compile, DistributedDataParallel, DataParallel, Fabric), around all or single parts.

Paths here are those of the model without wrappers, as adapter files have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_kernels.nn.hooks import FAST_PATHS, add_hooks, carry_hooks, set_fast_path
from lora_kernels.nn.lora_linear import FusedLoRALinear
from lora_kernels.sharded import is_sharded

# The attribute that holds the wrapped module, by the name of the class or of one that it is derived from. The class may
# belong to a package that isn't there.
_WRAPPERS = {
    "AveragedModel": "module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # of torch.compile
    "_FabricModule": "_forward_module",  # of Lightning's Fabric
}
# Those that can't be seen through: the way out.
_PEFT = "PEFT's model.unload() gives the base model, and load_adapter loads what PEFT has saved"
_OPAQUE = {
    "BaseTuner": _PEFT,
    "BaseTunerLayer": _PEFT,
    "PeftMixedModel": _PEFT,
    "PeftModel": _PEFT,
    "DeepSpeedEngine": "pass the model that was given to DeepSpeed, on one device",
    "FullyShardedDataParallel": "its parameters are flat shards; shard the model with torch's fully_shard instead",
}


class Model(nn.Module):
    """To the type checker: a module with whatever attributes its author, transformers or `inject` gave it. Nothing is
    made of this class."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


def unwrapped(module: Any) -> Model:
    """What is inside the wrappers around `module`; itself without any."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: Any) -> nn.Module | None:
    """What the wrapper `module` holds; None if it is no wrapper, as a model of another author with such a name."""
    name = _listed(_WRAPPERS, type(module)) if isinstance(module, nn.Module) else None
    return None if name is None else module._modules.get(name)


def bare(model: nn.Module, adding: bool = False) -> Model:
    """`unwrapped(model)`, to be looked at or changed. adding: whether it gets new parameters to train.

    Raises ValueError for a model that is, or contains, a wrapper that can't be seen through: a PEFT model, torch's
    FullyShardedDataParallel, DeepSpeed's engine; and with `adding` DistributedDataParallel, which would leave the
    gradients of parameters that it doesn't know different in each process, and DTensors.
    """
    for part in model.modules():
        kind = type(part).__name__
        if (way_out := _listed(_OPAQUE, type(part))) is not None:
            raise ValueError(f"model {_is_or_has(model, part)} a {kind}, which can't be seen through: {way_out}")
        if adding and any(base.__name__ == "DistributedDataParallel" for base in type(part).__mro__):
            raise ValueError(
                f"model {_is_or_has(model, part)} a {kind}, which does not synchronise parameters that are added later:"
                " inject or load adapters into the model first, then wrap it"
            )
    if adding and (name := next((name for name, p in model.named_parameters() if is_sharded(p)), None)) is not None:
        raise ValueError(
            f"parameter {name} of model is a DTensor, as fully_shard and tensor parallelism make them, and what is "
            "added now would not be distributed with it: inject or load adapters first, then distribute the model"
        )
    return unwrapped(model)


def _listed(table: Mapping[str, str], kind: type) -> str | None:
    """What `table` has for the name of the class or of the nearest one that it is derived from."""
    return next((table[base.__name__] for base in kind.__mro__ if base.__name__ in table), None)


def _is_or_has(model: nn.Module, part: nn.Module) -> str:
    return "is" if part is model else "contains"


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as `model.named_modules()`, without the wrappers."""
    model = unwrapped(model)
    for path, module in model.named_modules():
        if _inside(module) is None:
            yield _path(model, path), module


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(path, parameter) of each place that has one, without the wrappers: a tied one comes several times."""
    model = unwrapped(model)
    named = model.named_parameters(remove_duplicate=False)
    return list({_path(model, path): parameter for path, parameter in named}.items())


def get_submodule(model: Any, path: str) -> Model:
    """What stands at the path, with the wrappers around it."""
    for name in path.split(".") if path else ():
        model = getattr(unwrapped(model), name)
    return model


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place of what stands at the path, with its hooks and in its mode (training or not).

    A layer with an adapter goes to this path only, every other module to all the paths of what it replaces.
    torch's encoders around it call their layers where these have adapters, see `hooks.set_fast_path`.
    """
    replaced = get_submodule(model, path)
    if module.training is not replaced.training:
        module.train(replaced.training)
    inner = unwrapped(module)
    carry_hooks(unwrapped(replaced), inner)
    wrapper: nn.Module = replaced
    while (inside := _inside(wrapper)) is not None:
        add_hooks(wrapper, inner)
        wrapper = inside
    names = path.split(".")
    outer = [unwrapped(get_submodule(model, ".".join(names[:depth]))) for depth in range(len(names))]
    places: list[tuple[nn.Module, str]] = [(outer[-1], names[-1])]
    if not isinstance(inner, FusedLoRALinear):
        places += [(part, name) for part in model.modules() for name, m in part._modules.items() if m is replaced]
    for part, name in places:
        setattr(part, name, module)
    for encoder in outer:
        if isinstance(encoder, tuple(FAST_PATHS)):
            set_fast_path(encoder, not any(isinstance(part, FusedLoRALinear) for part in encoder.modules()))


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` without the wrappers."""
    model = unwrapped(model)
    return {_path(model, key): tensor for key, tensor in model.state_dict().items()}


def _path(model: nn.Module, path: str) -> str:
    """A path of `model` without the wrappers on the way."""
    names = []
    module: Any = model
    for name in path.split("."):
        if _inside(module) is None or name not in module._modules:
            names.append(name)
        module = getattr(module, name, None)
    return ".".join(names)
