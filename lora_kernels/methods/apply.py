"""What is done to a model by whatever method: the functions of the module that the config's class comes from."""

from __future__ import annotations

import importlib
import os
import weakref
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from lora_kernels.methods.registry import method_of
from lora_kernels.nn.wrappers import bare


def adapter_config(model: nn.Module) -> Any:
    """The config that was injected into `model`. ValueError if there is none."""
    config = getattr(bare(model), "adapter_config", None)
    if config is None:
        raise ValueError("model has no adapter_config: it carries no adapters; call inject first")
    return config


def inject(model: nn.Module, config: Any, tokenizer: Any = None) -> nn.Module:
    """Prepares `model`, in place, for the method that `config` belongs to; only what it trains requires gradients.

    config: LoRAConfig, AdaLoRAConfig, PrefixConfig, PromptConfig or FullConfig, kept as `model.adapter_config`.
    `tokenizer` is needed for an initialisation from a text only. A transformers model's `save_pretrained` then writes
    the adapter alone, see `lora_kernels.io.adapters.save_pretrained`. Returns the model. Raises TypeError for another
    config, and ValueError, with the model unchanged, if it already carries adapters or the config doesn't fit it.
    """
    method = method_of(config)
    inner = bare(model, adding=True)
    if getattr(inner, "adapter_config", None) is not None:
        kind = type(inner.adapter_config).__name__
        raise ValueError(f"model already carries what {kind} put in; merge(model) it first, or load the model anew")
    given = method.module.inject(model, config, tokenizer)
    saves_its_adapter(inner)
    return given


class _SavePretrained:
    """`save_pretrained` of a model with adapters. The reference is weak, or the model would be part of a cycle."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        if (model := self._model()) is None:
            raise RuntimeError("the model of this save_pretrained is gone; keep it in a variable until it is saved")
        importlib.import_module("lora_kernels.io.adapters").save_pretrained(
            model, save_directory, is_main_process, **kwargs
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(),)


def saves_its_adapter(model: Any) -> None:
    """Has `model.save_pretrained`, by which other trainers write what they trained, write the adapter in it."""
    if method_of(model.adapter_config).peft_type is not None and callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained = _SavePretrained(model)


def merge(model: nn.Module, quantize: str | None = None) -> nn.Module:
    """Ends with a plain model that computes the same: LoRA's update goes into the weights. Returns the model.

    quantize: None for dense weights, "nf4" for LoRA's into 4 bits again; see `lora_kernels.methods.lora.merge`.

    Raises ValueError if the model carries no adapters, or such that can't be merged (prefix and prompt tuning).
    """
    method = method_of(adapter_config(model))
    if quantize is None:
        return method.module.merge(model)
    if not method.has_lora_b:
        raise ValueError(f"quantize is {quantize!r}, which only LoRA's and AdaLoRA's merge take")
    return method.module.merge(model, quantize)


def adapters_disabled(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """A context in which `model` is the base model, without a second copy of it. Nests.

    Raises ValueError if the model carries no adapters, or the method keeps no base model (full fine-tuning).
    """
    return method_of(adapter_config(model)).module.adapters_disabled(model)


def training_hook(module: nn.Module, total_step: int) -> Any:
    """What the method of the adapted model in `module` does in a training of `total_step` steps, or None for nothing.

    Only AdaLoRA has one; see `lora_kernels.methods.adalora.TrainingHook`, whose functions the trainers call.
    """
    model = next((part for part in module.modules() if getattr(part, "adapter_config", None) is not None), None)
    make = getattr(method_of(model.adapter_config).module, "training_hook", None) if model is not None else None
    return make(model, total_step) if make else None
