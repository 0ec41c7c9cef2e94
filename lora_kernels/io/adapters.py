"""Files of every method: what `save_adapter` writes, `load_adapter` reads, whatever the method.

LoRA, AdaLoRA, prefix and prompt tuning are in PEFT's format, a fully fine-tuned model is a Hugging Face directory.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import save_file
from torch import nn

from lora_kernels.files import replacing
from lora_kernels.io.peft import CONFIG_NAME, read_config
from lora_kernels.io.whole_model import is_model_directory
from lora_kernels.methods.apply import adapter_config, saves_its_adapter
from lora_kernels.methods.registry import METHODS, Method, method_of
from lora_kernels.nn.wrappers import bare
from lora_kernels.sharded import is_sharded

# As transformers' Trainer names them.
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def _files(method: Method) -> ModuleType:
    return importlib.import_module(f"{__package__}.{method.files}")


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
    method = method_of(config)
    save = _files(method).save_adapter
    if as_lora and method.peft_type != "LORA":
        save = getattr(_files(method), "save_as_lora", None)
        if save is None:
            raise ValueError(f"as_lora is True, but a {type(config).__name__} was injected; allowed: AdaLoRAConfig")
    save(model, directory)


def save_pretrained(
    model: nn.Module, save_directory: str | os.PathLike, is_main_process: bool = True, push_to_hub: bool = False,
    **_: Any,
) -> None:  # fmt: skip
    """What `save_pretrained` of a transformers model does while it carries adapters: `save_adapter`.

    So it is with a PEFT model in transformers' and TRL's trainers. A folder that is named as their checkpoints are gets
    model.safetensors too, with what is trained under the model's own names: they resume by `load_state_dict`.

    is_main_process: whether this process writes. Other arguments of transformers' are about files that aren't written.
    Raises ValueError where push_to_hub is asked for.
    """
    if push_to_hub:
        raise ValueError("push_to_hub is True; allowed: False; huggingface_hub's upload_folder takes the directory")
    directory = Path(save_directory)
    spread = any(map(is_sharded, model.parameters()))
    if is_main_process or spread:
        save_adapter(model, directory)
    if is_main_process and not spread and _CHECKPOINT.fullmatch(directory.name):
        trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        with replacing(directory / "model.safetensors") as path:
            save_file(trained, path, metadata={"format": "pt"})


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
    methods, kind = {method.peft_type: method for method in METHODS.values()}, None
    if not is_model_directory(directory):
        path = directory / CONFIG_NAME
        kind = read_config(path).get("peft_type")
        if kind is None or kind not in methods:
            supported = ", ".join(repr(known) for known in methods if known)
            raise ValueError(f"{path}: peft_type is {kind!r}; supported: {supported}")
    if own is not None and method_of(own).peft_type != kind:
        raise ValueError(
            f"{directory} holds a {kind or 'model'}, but a {type(own).__name__} was injected into the model"
        )
    _files(methods[kind]).load_adapter(model, directory, trainable)
    saves_its_adapter(model)
    return given
