"""The adapter of a run: made as its settings say, or one to go on from, whose files have a say in the settings."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from lora_kernels.io.adapters import load_adapter
from lora_kernels.io.peft import CONFIG_NAME, read_config
from lora_kernels.io.whole_model import is_model_directory
from lora_kernels.methods.apply import adapter_config
from lora_kernels.methods.lora import LoRAConfig, lora_modules, plan, train_in_full
from lora_kernels.methods.registry import METHODS
from lora_kernels.nn.wrappers import Model
from lora_kernels.train.checkpoint import LAST
from lora_kernels.train.config import TrainConfig

# What PEFT takes where its file says nothing.
_PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "use_rslora": False}


def method_config(config: TrainConfig) -> Any:
    """The config of `lora_kernels.methods` that the settings of a run mean. Raises ValueError as its class does."""
    named = {name: target_modules(getattr(config, name)) for name in ("target", "exclude_modules")}
    return METHODS[config.method].make_config({**config.to_dict(), **named})


def target_modules(target: str | list[str] | None) -> str | list[str] | None:
    """A name, or names with commas between, as a list; "all", "all-linear" and regular expressions as they are."""
    if (
        target is None
        or isinstance(target, list)
        or target in ("all", "all-linear")
        or not re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)*", target)
    ):
        return target
    return re.split(r"\s*,\s*", target)


def check_adapter(config: TrainConfig, adapter: str) -> None:
    """The checks of `config.adapter` that need no model.

    Raises FileNotFoundError where it is no adapter, ValueError where it is of another method or the settings
    contradict it.
    """
    directory = Path(adapter)
    if is_model_directory(directory):
        raise ValueError(f"adapter {directory} holds a whole model; give it as model")
    output_dir = Path(config.output_dir).resolve()
    if directory.resolve() in (output_dir, output_dir / LAST):
        raise ValueError(f"adapter {directory} is where the run writes its own; choose another output_dir")
    raw = read_config(directory / CONFIG_NAME)
    kind = raw.get("peft_type")
    if kind == "ADALORA":
        raise ValueError(
            f"adapter {directory} is one of AdaLoRA, whose ranks are allocated once; save it as LoRA "
            "(lora_kernels.save_adapter(model, directory, as_lora=True)) and go on from that"
        )
    if METHODS[config.method].peft_type != kind:
        allowed = ", ".join(name for name, method in METHODS.items() if method.peft_type == kind) or "none"
        raise ValueError(
            f"adapter {directory} has peft_type {kind!r}, which goes on with method {allowed}; got {config.method!r}"
        )
    if config.method == "dora" and not raw.get("use_dora"):
        raise ValueError(f"adapter {directory} is one of LoRA without DoRA's magnitudes; method must be lora or qlora")
    for name in () if config.describes_adapter else METHODS[config.method].described:
        value = raw.get(name) if raw.get(name) is not None else _PEFT_DEFAULTS.get(name)
        if getattr(config, name) not in (None, value):
            raise _contradiction(config, name, value)


def go_on(
    model: Model, config: TrainConfig, adapter: str, targets: Any, excluded: Any, head: str | None = None
) -> None:
    """Puts `config.adapter` into `model`, a base model, to be trained on.

    targets, excluded: the modules that the settings name, as LoRAConfig takes them; None where they name none.
    head: a module that is trained in full beside it, from its values in the model where the adapter has none.
    Raises ValueError where they mean other modules than the adapter has, and what `load_adapter` raises.
    """
    named = {"target_modules": targets, "exclude_modules": excluded}
    named = {name: value for name, value in named.items() if value is not None}
    planned = plan(model, LoRAConfig(**named), from_file=True) if named else None
    load_adapter(model, adapter)
    adapted = {name for name, _ in lora_modules(model)}
    # Where an adapter has no effect, the file may have one or not.
    if planned is not None and (planned.adapters.keys() ^ adapted) - planned.problems.keys():
        name = "exclude_modules" if targets is None else "target"
        raise _contradiction(config, name, ", ".join(sorted(adapted)))
    dropout, own = config.lora_dropout, adapter_config(model)
    if dropout is not None and not config.describes_adapter and isinstance(own, LoRAConfig):
        for _, layer in lora_modules(model):
            layer.lora_dropout = dropout
        model.adapter_config = dataclasses.replace(own, lora_dropout=dropout)
    if head is not None and head not in model.lora_originals:
        train_in_full(model, head)


def _contradiction(config: TrainConfig, name: str, value: Any) -> ValueError:
    return ValueError(f"{name} is {getattr(config, name)!r}, but adapter {config.adapter} has {value}; leave it out")
