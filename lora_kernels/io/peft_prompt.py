"""Prefix and prompt tuning in PEFT's file format: adapter_config.json and one tensor `prompt_embeddings`.

Prefix tuning: [n, layers · 2 · heads · head_dim], the keys and values themselves (a reparametrisation is evaluated and
dropped). Prompt tuning: [n, hidden]. What PEFT writes is read here and the other way round, with the same logits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.io.peft import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_tensors,
    read_config,
    read_tensors,
    task_type,
    to_write,
    write_files,
)
from lora_kernels.io.peft_embeddings import load_embeddings, saved_embeddings, take_embeddings
from lora_kernels.methods import prefix, prompt
from lora_kernels.methods.apply import adapter_config
from lora_kernels.methods.prefix import PrefixConfig, PrefixKeyValues
from lora_kernels.methods.virtual_tokens import decoder_of
from lora_kernels.nn.wrappers import Model
from lora_kernels.sharded import fill

PREFIX, PROMPT = "PREFIX_TUNING", "PROMPT_TUNING"
_TENSOR = "prompt_embeddings"
# Of the base model's own paths, beside virtual tokens.
_MODEL = "base_model."


def save_adapter(model: Model, directory: str | os.PathLike) -> None:
    """Writes the virtual tokens of `model` to `directory` as PEFT would, for `PeftModel.from_pretrained`."""
    tokens = model.virtual_tokens
    config = {
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens.num_virtual_tokens,
        "task_type": task_type(model, []),
    }
    if isinstance(tokens, PrefixKeyValues):
        config |= {
            "peft_type": PREFIX,
            "num_attention_heads": tokens.heads,
            "num_layers": tokens.layers,
            "prefix_projection": False,
            "token_dim": tokens.heads * tokens.head_dim,
        }
    else:
        text_config = model.config.get_text_config()
        config |= {
            "peft_type": PROMPT,
            "num_attention_heads": text_config.num_attention_heads,
            "num_layers": text_config.num_hidden_layers,
            # PEFT asks for a tokenizer to read a "TEXT", though the values come from the file.
            "prompt_tuning_init": "RANDOM",
            "token_dim": tokens.embeddings.shape[1],
        }
    with torch.no_grad():
        saved = {_TENSOR: tokens.saved().float(), **saved_embeddings(model, _MODEL)}
        saved = {key: to_write(key, tensor).to("cpu", copy=True).contiguous() for key, tensor in saved.items()}
    write_files(Path(directory), config, saved)


def load_adapter(model: Model, directory: str | os.PathLike, trainable: bool = True) -> nn.Module:
    """Loads virtual tokens in PEFT's format into `model`: a base model, or one that has virtual tokens of that kind.

    Returns the model. Raises as `lora_kernels.io.peft.load_adapter` does, with the model unchanged.
    """
    directory = Path(directory)
    raw = read_config(directory / CONFIG_NAME)
    tensors = read_tensors(directory / WEIGHTS_NAME)
    config = _config(raw, directory / CONFIG_NAME)
    n = config.num_virtual_tokens
    path = directory / WEIGHTS_NAME
    tensors, embeddings = take_embeddings(model, tensors, {_TENSOR: torch.Size()}, path, _MODEL)
    present = getattr(model, "virtual_tokens", None)
    if present is not None:
        _check_same(model, config, directory / CONFIG_NAME)
        check_tensors(tensors, {_TENSOR: present.saved().shape}, path)
        with torch.no_grad():
            fill(present.saved(), tensors[_TENSOR])
    else:
        decoder = decoder_of(model, n)
        if isinstance(config, PrefixConfig):
            like, layers, heads = prefix.flatten(prefix.computed_key_values(model, decoder, n))
            check_tensors(tensors, {_TENSOR: like.shape}, path)
            PrefixKeyValues(like.copy_(tensors[_TENSOR]), layers, heads).attach(model, decoder)
        else:
            table = model.get_input_embeddings().weight
            check_tensors(tensors, {_TENSOR: torch.Size((n, table.shape[1]))}, path)
            prompt.attach(model, decoder, tensors[_TENSOR].to(table.device))
        model.adapter_config = config
    load_embeddings(model, embeddings)
    model.virtual_tokens.requires_grad_(trainable)
    return model


def _config(raw: Mapping[str, Any], path: Path) -> PrefixConfig | prompt.PromptConfig:
    number: Any = raw.get("num_virtual_tokens")
    kind = PrefixConfig if raw["peft_type"] == PREFIX else prompt.PromptConfig
    try:
        config = kind(num_virtual_tokens=number, init="random")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if raw.get("num_transformer_submodules") not in (None, 1):
        submodules = raw["num_transformer_submodules"]
        raise ValueError(f"{path}: num_transformer_submodules is {submodules}; supported: 1, a causal language model")
    if raw.get("modules_to_save"):
        raise ValueError(f"{path}: modules_to_save is {raw['modules_to_save']!r}, which is not supported yet")
    return config


def _check_same(model: Model, config: PrefixConfig | prompt.PromptConfig, path: Path) -> None:
    own = adapter_config(model)
    if type(own) is not type(config) or own.num_virtual_tokens != config.num_virtual_tokens:
        raise ValueError(
            f"{path} is a {type(config).__name__} with {config.num_virtual_tokens} virtual tokens, the model has a "
            f"{type(own).__name__} with {own.num_virtual_tokens}"
        )
    if getattr(own, "mlp_hidden", None) is not None:
        raise ValueError(f"{path} holds keys and values, which can't be put back into the model's mlp_hidden layers")
