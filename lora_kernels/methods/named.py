"""Several LoRA adapters over one frozen model: a policy, a value model and a reward model for the memory of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from lora_kernels.methods.apply import adapters_disabled
from lora_kernels.methods.lora import LoRAConfig, inject, lora_modules
from lora_kernels.nn.wrappers import Model, bare, get_submodule, replace_module, unwrapped

FIRST, REFERENCE = "default", "reference"


class ParkedAdapter(nn.Module):
    """An adapter that is not in use. Being a submodule of the model, it moves, saves and trains with it."""

    def __init__(
        self, config: LoRAConfig, originals: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.config = config
        # In a tuple, so that they are not registered: they are the base model's.
        self.originals = tuple(originals.items())
        self.paths = tuple(modules)
        self.parts = nn.ModuleList(modules.values())


def add_adapter(model: nn.Module, name: str, config: LoRAConfig, from_file: bool = False) -> nn.Module:
    """Adds a LoRA adapter with its own modules, rank and values beside those that `model` has; it is not in use yet.

    `with use_adapter(model, name):` puts it in use, for training, generation, `save_adapter` and `load_adapter`. The
    one that `inject` made is called "default". All of them share the frozen weights, and `model.parameters()` has the
    parameters of all of them, under names that depend on which one is in use.

    Returns the model. Raises ValueError, with the model unchanged, if it carries no LoRA adapter, `name` is taken or
    not an identifier, or config doesn't fit the model.
    """
    given, model = model, bare(model, adding=True)
    if not isinstance(config, LoRAConfig) or not isinstance(getattr(model, "adapter_config", None), LoRAConfig):
        kind = type(getattr(model, "adapter_config", None)).__name__
        raise ValueError(f"config is a {type(config).__name__}, the model's is a {kind}; allowed: LoRAConfig for both")
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f"name is {name!r}; allowed: a Python identifier that is not a method of torch.nn.ModuleDict")
    if name in adapter_names(model):
        raise ValueError(f"name is {name!r}, which is taken; the model has {', '.join(adapter_names(model))}")
    parked = getattr(model, "parked_adapters", nn.ModuleDict())
    current = _take_out(model)
    # inject freezes all that the model has.
    model.parked_adapters = None
    try:
        inject(model, config, from_file=from_file)
        parked[name] = _take_out(model)
    finally:
        _put_in(model, current)
        model.parked_adapters = parked
    model.adapter_name = getattr(model, "adapter_name", FIRST)
    return given


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's LoRA adapters, the one in use first."""
    model = unwrapped(model)
    return [getattr(model, "adapter_name", FIRST), *getattr(model, "parked_adapters", ())]


@contextmanager
def use_adapter(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Inside the `with` block the adapter `name` is the one in use. Nests.

    With activation checkpointing the backward pass computes layers anew, so it has to run inside the block too. Raises
    ValueError if there is no such adapter, RuntimeError inside `adapters_disabled` where modules_to_save are set aside.
    """
    given, model = model, bare(model)
    if name not in adapter_names(model):
        raise ValueError(f"name is {name!r}; the model has {', '.join(adapter_names(model))}")
    before = adapter_names(model)[0]
    _switch(model, name)
    try:
        yield given
    finally:
        _switch(model, before)


def reference(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """A context in which `model` is the reference policy: its adapter "reference", or the base model without one."""
    return use_adapter(model, REFERENCE) if REFERENCE in adapter_names(model) else adapters_disabled(model)


def _switch(model: Model, name: str) -> None:
    if name == adapter_names(model)[0]:
        return
    model.parked_adapters[model.adapter_name] = _take_out(model)
    _put_in(model, model.parked_adapters.pop(name))
    model.adapter_name = name


def _take_out(model: Model) -> ParkedAdapter:
    """Makes `model` the base model; returns the adapter that was in use."""
    originals = model.lora_originals
    modules = dict(lora_modules(model)) | {path: get_submodule(model, path) for path in originals}
    if any(modules[path] is original for path, original in originals.items()):
        raise RuntimeError("adapters can't be switched inside adapters_disabled, where trained modules are set aside")
    for path, module in modules.items():
        replace_module(model, path, originals[path] if path in originals else module.base_layer())
    parked = ParkedAdapter(model.adapter_config, originals, modules)
    model.adapter_config, model.lora_originals = None, {}
    return parked


def _put_in(model: Model, parked: ParkedAdapter) -> None:
    for path, module in zip(parked.paths, parked.parts, strict=True):
        replace_module(model, path, module)
    model.adapter_config, model.lora_originals = parked.config, dict(parked.originals)
