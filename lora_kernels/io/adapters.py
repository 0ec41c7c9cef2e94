"""Files of every method: what `save_adapter` writes, `load_adapter` reads, whatever the method.

LoRA, AdaLoRA, prefix and prompt tuning are in PEFT's format, a fully fine-tuned model is a Hugging Face directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_kernels.files import replacing_files
from lora_kernels.io import peft, peft_adalora, peft_prompt
from lora_kernels.methods import adalora, adapter_config, full, lora, prefix, prompt
from lora_kernels.nn.wrappers import bare, state_dict
from lora_kernels.sharded import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# peft_type -> (config class, module that reads and writes its files)
_ADAPTERS = {
    "LORA": (lora.LoRAConfig, peft),
    peft_adalora.ADALORA: (adalora.AdaLoRAConfig, peft_adalora),
    peft_prompt.PREFIX: (prefix.PrefixConfig, peft_prompt),
    peft_prompt.PROMPT: (prompt.PromptConfig, peft_prompt),
}
_MODEL_CONFIG = "config.json"


def save_adapter(model: nn.Module, directory: str | os.PathLike, as_lora: bool = False) -> None:
    """Writes what was injected into `model` and trained to `directory`.

    Adapters as PEFT would (adapter_config.json, adapter_model.safetensors); after full fine-tuning the whole model as
    `save_pretrained` does (config.json, model.safetensors). Each file is written under a temporary name and then moved
    into place.

    Of a model that torch's fully_shard or tensor parallelism has distributed, whole tensors are gathered: all processes
    must call this, and each writes them to the directory that it names, which may be the same for all. (A whole model
    is written by the first process alone.)

    as_lora: write an AdaLoRA adapter as plain LoRA, with the rank of each module, for whatever reads LoRA only.

    Raises ValueError if nothing was injected, nothing that as_lora could be written as LoRA, or a tensor has no memory
    (meta); TypeError for one that isn't what lies in its memory.
    """
    model = bare(model)
    config = adapter_config(model)
    if as_lora and not isinstance(config, lora.LoRAConfig):
        if not isinstance(config, adalora.AdaLoRAConfig):
            raise ValueError(f"as_lora is True, but a {type(config).__name__} was injected; allowed: AdaLoRAConfig")
        peft_adalora.save_as_lora(model, directory)
    elif isinstance(config, full.FullConfig):
        _save_model(model, Path(directory))
    else:
        dict(_ADAPTERS.values())[type(config)].save_adapter(model, directory)


def load_adapter(model: nn.Module, directory: str | os.PathLike, trainable: bool = True) -> nn.Module:
    """Loads what `save_adapter` or PEFT wrote to `directory` into `model`, in place: a base model, or one that carries
    the same adapters. A Hugging Face directory gives the model its weights.

    A model that carries adapters may be distributed, as by fully_shard: all processes must call this, and the tensors
    of the first are taken. Adapters that it doesn't carry yet are loaded before it is distributed.

    trainable: whether what was loaded requires gradients (PEFT's `is_trainable`, which is False by default).

    Returns the model. Raises FileNotFoundError if a file is missing, and ValueError, with the model unchanged, if the
    directory holds something else or doesn't fit the model.
    """
    directory = Path(directory)
    given, model = model, bare(model)
    own = getattr(model, "adapter_config", None)
    if own is None:
        bare(given, adding=True)
    if is_model_directory(directory):
        kind, config_class = "model", full.FullConfig
    else:
        kind = peft.read_config(directory / peft.CONFIG_NAME).get("peft_type")
        if kind not in _ADAPTERS:
            raise ValueError(
                f"{directory / peft.CONFIG_NAME}: peft_type is {kind!r}; supported: {', '.join(map(repr, _ADAPTERS))}"
            )
        config_class, files = _ADAPTERS[kind]
    if own is not None and type(own) is not config_class:
        raise ValueError(f"{directory} holds a {kind}, but a {type(own).__name__} was injected into the model")
    if kind == "model":
        _load_model(model, directory, trainable)
    else:
        files.load_adapter(model, directory, trainable)
    return given


def is_model_directory(directory: Path) -> bool:
    """Whether `directory` holds a whole model, as full fine-tuning leaves it, and no adapter."""
    return (directory / _MODEL_CONFIG).is_file() and not (directory / peft.CONFIG_NAME).is_file()


def _save_model(model: PreTrainedModel, directory: Path) -> None:
    tensors = {name: peft.to_write(name, t) for name, t in state_dict(model).items()}
    # The config goes last: a directory that has one for the first time is complete.
    with replacing_files(directory, last=_MODEL_CONFIG) as staged:
        model.save_pretrained(staged, state_dict=tensors)


def _load_model(model: PreTrainedModel, directory: Path, trainable: bool) -> None:
    loaded, info = type(model).from_pretrained(directory, dtype=model.dtype, output_loading_info=True)
    problems = [f"{kind}: {sorted(map(str, found))[:3]}" for kind, found in info.items() if found]
    tensors, own = loaded.state_dict(), state_dict(model)
    for name in sorted(tensors.keys() | own.keys()):
        shapes = [list(side[name].shape) if name in side else "missing" for side in (own, tensors)]
        if shapes[0] != shapes[1]:
            problems.append(f"{name} is {shapes[0]} in the model, {shapes[1]} in the file")
    if problems:
        raise ValueError(f"{directory} doesn't fit the model, a {type(model).__name__}: {'; '.join(problems[:5])}")
    with torch.no_grad():
        for name, target in own.items():
            fill(target, tensors[name])
    if getattr(model, "adapter_config", None) is None:
        full.inject(model, full.FullConfig())
    if not trainable:
        model.requires_grad_(False)
