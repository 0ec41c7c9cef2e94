"""The files of a fully fine-tuned model: a Hugging Face directory, as `save_pretrained` writes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_kernels.files import replacing_files
from lora_kernels.io.peft import CONFIG_NAME, to_write
from lora_kernels.methods.full import FullConfig, inject
from lora_kernels.nn.wrappers import state_dict
from lora_kernels.sharded import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODEL_CONFIG = "config.json"


def is_model_directory(directory: Path) -> bool:
    """Whether `directory` holds a whole model, as full fine-tuning leaves it, and no adapter."""
    return (directory / _MODEL_CONFIG).is_file() and not (directory / CONFIG_NAME).is_file()


def save_adapter(model: PreTrainedModel, directory: str | os.PathLike) -> None:
    """Writes all weights of `model`."""
    tensors = {name: to_write(name, t) for name, t in state_dict(model).items()}
    # The config goes last: a directory that has one for the first time is complete.
    with replacing_files(Path(directory), last=_MODEL_CONFIG) as staged:
        model.save_pretrained(staged, state_dict=tensors)


def load_adapter(model: PreTrainedModel, directory: str | os.PathLike, trainable: bool = True) -> PreTrainedModel:
    """Gives `model` the weights in `directory`. Raises ValueError, with the model unchanged, if they don't fit it."""
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
        inject(model, FullConfig())
    if not trainable:
        model.requires_grad_(False)
    return model
