"""4-bit models on disk: a Hugging Face directory read straight into NF4, and bitsandbytes' checkpoints, both ways.

A bitsandbytes checkpoint, as transformers writes it, is a model directory whose config.json has a quantization_config,
and whose weights have the keys of `lora_kernels.ops.nf4.to_bitsandbytes`.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_kernels.nn.bypassed import layers_read
from lora_kernels.nn.lora_linear import is_linear
from lora_kernels.nn.nf4_linear import NF4Linear
from lora_kernels.nn.wrappers import bare, named_modules, state_dict
from lora_kernels.ops.nf4 import QUANT_STATE, NF4Weight, from_bitsandbytes, quantize_nf4
from lora_kernels.sharded import is_sharded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Written by old versions of transformers, and left out by today's without a word: computed, not read.
_OBSOLETE = r"rotary_emb\.inv_freq$|(^|\.)position_ids$"


def quantization_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantization_config of a model's config.json."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def is_bitsandbytes_nf4(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config means bitsandbytes' NF4."""
    method = getattr(quantization.get("quant_method"), "value", quantization.get("quant_method"))
    is_4bit = quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")
    return method == "bitsandbytes" and bool(is_4bit) and quantization.get("bnb_4bit_quant_type") == "nf4"


def load_nf4_model(
    directory: str | Path,
    dtype: torch.dtype | Literal["auto"],
    block_size: int = 64,
    double_quant: bool = False,
    skip_modules: Sequence[str] = (),
    progress: bool = True,
) -> PreTrainedModel:
    """A causal LM from a Hugging Face directory, its linear layers in NF4, in eval mode on the CPU.

    The model is made without weights; each tensor is then read, cast to `dtype`, quantised and freed before the next,
    so memory peaks at the 4-bit model plus its largest tensor. Every nn.Linear becomes an NF4Linear but the output
    embedding (as in transformers and bitsandbytes), layers with a tied weight, those whose weight the model itself uses
    (see `lora_kernels.nn.bypassed`) and `skip_modules`; the other tensors are in `dtype`. A bitsandbytes NF4 checkpoint
    keeps its layers, bits, block sizes and double quantisation; the arguments on those are then not used. Its layers
    whose weight the model itself uses become dense.

    Args:
        dtype: a torch dtype, or "auto": that of config.json.
        block_size, double_quant: see `quantize_nf4`.
        skip_modules: linear layers that stay dense, by their path or its last components ("v_proj").
        progress: show a bar on a terminal.

    As in transformers, tensors that the model has no place for are left out, and two that config.json ties but that
    differ stay apart, each with a warning. A tensor that is missing is an error, where transformers takes a random one.

    Raises ValueError naming the file and tensor if the files are damaged, lack a tensor, have another shape, or hold a
    weight that is not finite; and for a model that is quantised in another way or has no linear layer to quantise.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    directory = Path(directory)
    config = AutoConfig.from_pretrained(directory)
    quantization = quantization_of(config)
    if quantization is not None:
        if not is_bitsandbytes_nf4(quantization):
            raise ValueError(
                f"{directory / 'config.json'}: quantization_config is {quantization}; supported: bitsandbytes nf4"
            )
        del config.quantization_config
    files = _tensor_files(directory)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    # Parameters without memory, buffers for real: those that no file holds (rotary frequencies) get their values.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    slots = _slots(model)
    where = _places(model, files, slots)
    read = layers_read(model)
    if quantization is None:
        layers = {f"{name}.weight": [""] for name in _layers_to_quantise(model, slots, skip_modules, read)}
        if not layers:
            raise ValueError(f"model {directory} ({type(model).__name__}) has no torch.nn.Linear to quantise")
    else:
        layers = _quantised_layers(model, where)
    _check_names(model, slots, where, layers, directory)
    for name in _track([name for name in where if name in slots], progress):
        try:
            if name in layers:
                path = name.removesuffix(".weight")
                linear = model.get_submodule(path)
                entries = {key: _read(where[name + key]) for key in layers[name]}
                if quantization is None:
                    weight = quantize_nf4(entries[""].to(dtype), block_size, double_quant)
                else:
                    weight = _adopt(entries, dtype)
                _check_shape(weight.shape, linear.weight.shape)
                if path in read:
                    _set_dense(model, name, slots[name], weight.dequantize())
                else:
                    model.set_submodule(path, NF4Linear(weight, linear.bias).train(linear.training))
            else:
                _set_dense(model, name, slots[name], _read(where[name]))
        except ValueError as error:
            raise ValueError(f"{where[name].file}: tensor {where[name].key}: {error}") from None
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def save_nf4_model(
    model: PreTrainedModel, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes a model with NF4 layers as a bitsandbytes checkpoint: transformers loads it, with the very same weights.

    `directory` must not exist or be empty; it appears when it is complete. Raises ValueError if it isn't, or if the
    model has no NF4 layer, carries adapters, or is distributed by fully_shard or tensor parallelism.
    """
    from huggingface_hub import save_torch_state_dict

    from lora_kernels.files import new_directory
    from lora_kernels.methods.lora import is_injected

    model = bare(model)
    if is_injected(model):
        raise ValueError("model carries LoRA adapters; save them with save_adapter, or merge(model, quantize='nf4')")
    weights = [module for module in model.modules() if isinstance(module, NF4Weight)]
    if not weights:
        raise ValueError("model has no NF4 layer; load it with quantize='nf4', or save it with save_pretrained")
    held = (*model.named_parameters(), *model.named_buffers())
    if spread := next((name for name, tensor in held if is_sharded(tensor)), None):
        raise ValueError(
            f"{spread} of model is a DTensor, as fully_shard and tensor parallelism make them; allowed: a model that "
            "lies in one process"
        )
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(weight.double_quant for weight in weights),
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [name for name, module in named_modules(model) if isinstance(module, nn.Linear)],
    }
    with new_directory(directory) as staged:
        config.save_pretrained(staged)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        save_torch_state_dict(state_dict(model), staged)


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor, file by file."""
    index = directory / _INDEX
    files = [directory / _WEIGHTS]
    # As in transformers, one whole file comes before shards.
    if index.is_file() and not files[0].is_file():
        try:
            files = [directory / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from None
    where: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} does not exist" + (f"; {_INDEX} names it" if index.is_file() else ""))
        try:
            with safe_open(file, "pt") as reader:
                where |= dict.fromkeys(reader.keys(), file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from None
    return where


class _Place(NamedTuple):
    """Where a tensor is: in which file, and what it is called there."""

    file: Path
    key: str


def _places(model: PreTrainedModel, files: Mapping[str, Path], slots: Mapping[str, Any]) -> dict[str, _Place]:
    """The place of each tensor by the name that the model has for it: transformers renames what older versions wrote.

    Raises ValueError where it would make one tensor of several, as of the experts of a mixture.
    """
    places = {key: _Place(file, key) for key, file in files.items()}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers before 5 has no such files
        return places
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if not isinstance(each, WeightRenaming)]
    named = {}
    for key, place in places.items():
        # What belongs to a quantised weight is renamed with it.
        weight = key[: key.rfind(".weight.") + len(".weight")]
        stem = weight if weight in places else key
        name, converter = stem, None
        if stem not in slots:
            name, converter = rename_source_key(stem, renamings, converters, model.base_model_prefix, slots)
        name += key[len(stem) :]
        if converter is not None:
            raise ValueError(
                f"{place.file}: {key} is to be merged with others into {name}, which can't be read in 4 bits; load the "
                f"{type(model).__name__} dense"
            )
        named[name] = place
    return named


def _read(place: _Place) -> Tensor:
    # The file is mapped, and its pages count as memory until the map is closed: so it is opened for each tensor anew.
    with safe_open(place.file, "pt") as reader:
        return reader.get_tensor(place.key)


def _slots(model: nn.Module) -> dict[str, list[str]]:
    """For each tensor that the model's files may hold, the names that it goes by: more than one if it is tied."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in state.items()}


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) and is_linear(module)


def _layers_to_quantise(
    model: PreTrainedModel, slots: Mapping[str, list[str]], skip: Sequence[str], read: Collection[str]
) -> list[str]:
    from lora_kernels.methods.lora import named_by

    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    for suffix in skip:
        if not any(named_by(name, suffix) for name in linears):
            raise ValueError(f"skip_modules: the model has no linear layer {suffix!r}")
    head = model.get_output_embeddings()
    return [
        name
        for name, linear in linears.items()
        if linear is not head
        and name not in read
        and len(slots[f"{name}.weight"]) == 1
        and not any(named_by(name, suffix) for suffix in skip)
    ]


def _quantised_layers(model: nn.Module, where: Mapping[str, _Place]) -> dict[str, list[str]]:
    """{name of a quantised weight: what follows that name in the names of its entries}."""
    end = f".{QUANT_STATE}"
    modules = dict(model.named_modules())
    layers: dict[str, list[str]] = {}
    for name in (name.removesuffix(end) for name in where if name.endswith(end)):
        module = modules.get(name.removesuffix(".weight"))
        if module is None:
            continue
        if not _is_linear(module) or not name.endswith(".weight"):
            raise ValueError(
                f"{where[name + end].file}: {name} is quantised, but is no weight of a torch.nn.Linear here"
            )
        layers[name] = [other[len(name) :] for other in where if other == name or other.startswith(f"{name}.")]
    return layers


def _check_names(
    model: PreTrainedModel,
    slots: Mapping[str, list[str]],
    where: Mapping[str, _Place],
    layers: Mapping[str, list[str]],
    directory: Path,
) -> None:
    """Warns of tensors that the model has no place for; ValueError for those that it needs and no file has."""
    ignored = "|".join([_OBSOLETE, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())])
    entries = {name + key for name, keys in layers.items() for key in keys}
    if unexpected := [
        place.key
        for name, place in where.items()
        if name not in slots and name not in entries and not re.search(ignored, name)
    ]:
        warnings.warn(
            f"{directory}: {type(model).__name__} has no place for {_some(unexpected)}, left out", stacklevel=3
        )
    # Buffers that the model computes where a file lacks them; a parameter would be random.
    computed = "|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    buffers = {name for name, _ in model.named_buffers() if computed and re.search(computed, name)}
    if missing := [
        name for name, same in slots.items() if name not in buffers and not any(other in where for other in same)
    ]:
        raise ValueError(f"the weights in {directory} don't fit {type(model).__name__}: {_some(missing)} missing")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _check_shape(found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        raise ValueError(f"shape is {list(found)}, the model needs {list(expected)}")


def _adopt(entries: Mapping[str, Tensor], dtype: torch.dtype) -> NF4Weight:
    # Cloned: a tensor as read would keep its whole file mapped.
    return NF4Weight(from_bitsandbytes({key: entry.clone() for key, entry in entries.items()})[0], dtype)


def _set_dense(model: PreTrainedModel, name: str, names: Sequence[str], tensor: Tensor) -> None:
    """Gives all `names`, which are one tensor of the model, a copy of the values that the files have for `name`."""
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    current = getattr(*owners[0])
    _check_shape(tensor.shape, current.shape)
    if len(names) > 1 and not current.is_meta:
        if torch.equal(current, tensor.to(current.dtype)):
            return
        warnings.warn(
            f"config.json ties {' and '.join(names)}, but they differ in the files, so {name} stays apart; set "
            "tie_word_embeddings to false there",
            stacklevel=3,
        )
        getattr(model, "all_tied_weights_keys", {}).pop(name, None)
        owners = [owners[names.index(name)]]
    value = torch.empty(tensor.shape, dtype=current.dtype).copy_(tensor)
    if isinstance(current, nn.Parameter):
        value = nn.Parameter(value, requires_grad=current.requires_grad)
    for owner, leaf in owners:
        setattr(owner, leaf, value)


def _track(names: Sequence[str], progress: bool) -> Iterable[str]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(names, "loading in 4 bits", console=console, disable=not (progress and console.is_terminal))
