"""Full fine-tuning: the model's own weights are trained, all or some of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_kernels.methods.lora import matches, named_by, names_or_regex
from lora_kernels.nn.wrappers import bare, named_modules
from lora_kernels.ops.nf4 import NF4Weight

ALL = "all"


@dataclass
class FullConfig:
    """Args:
        modules: what is trained, with everything inside: "all"; any other string is a regular expression that must
            match a module's whole path; a list names modules by their path or by its last components. A weight that a
            module shares with another one, as tied embeddings do, is trained for both.
        exclude_modules: what of that stays frozen, with everything inside, named in the same ways; shared weights too.

    Raises ValueError naming the argument that is wrong.
    """

    modules: str | Sequence[str] = ALL
    exclude_modules: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        self.modules = names_or_regex("modules", self.modules)
        self.exclude_modules = names_or_regex("exclude_modules", self.exclude_modules)
        if not self.modules:
            raise ValueError('modules is empty; allowed: "all", a regular expression, a list of names')


def inject(model: nn.Module, config: FullConfig, tokenizer: Any = None) -> nn.Module:
    """Makes the parameters of config.modules, and no others, require gradients.

    Returns the model. Raises ValueError, with the model unchanged, if a name matches no module, or a weight is
    quantized. Weights of 16 bits lose most updates to rounding: load the model in float32.
    """
    given, model = model, bare(model, adding=True)
    chosen = [model] if config.modules == ALL else _chosen(model, "modules", config.modules)
    excluded = _chosen(model, "exclude_modules", config.exclude_modules) if config.exclude_modules else []
    parts = {part for module in chosen for part in module.modules()}
    parts -= {part for module in excluded for part in module.modules()}
    parameters = {parameter for part in parts for parameter in part.parameters(recurse=False)}
    parameters -= {parameter for module in excluded for parameter in module.parameters()}
    if excluded and not parameters:
        raise ValueError(f"exclude_modules leaves nothing of modules={config.modules!r} to train")
    for name, weight in [*model.named_modules(), *model.named_parameters()]:
        integer = isinstance(weight, nn.Parameter) and weight in parameters and not weight.is_floating_point()
        if integer or (isinstance(weight, NF4Weight) and weight in parts):
            raise ValueError(f"modules includes {name!r}, which is quantized; allowed: floating-point weights")
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.adapter_config = config
    return given


def _chosen(model: nn.Module, argument: str, names: str | Sequence[str]) -> list[nn.Module]:
    modules = {name: module for name, module in named_modules(model) if name}
    chosen = [module for name, module in modules.items() if matches(name, names)]
    if isinstance(names, str):
        missing = [] if any(next(module.parameters(), None) is not None for module in chosen) else [names]
    else:
        missing = [suffix for suffix in names if not any(named_by(name, suffix) for name in modules)]
    if missing:
        raise ValueError(f"{argument}: {missing[0]!r} matches no module of {type(model).__name__} with parameters")
    return chosen


def merge(model: nn.Module) -> nn.Module:
    """The model as it is: its weights are the trained ones. They are frozen, as after every merge."""
    del bare(model).adapter_config
    return model.requires_grad_(False)


def adapters_disabled(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Raises ValueError: the weights that were there before are gone."""
    raise ValueError("full fine-tuning keeps no base model to go back to; load it anew")
