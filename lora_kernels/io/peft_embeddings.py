"""The base model's embeddings in PEFT's files.

Rows that were added to a vocabulary are in no file of the base model, so PEFT writes both embeddings in full beside the
adapter: `<prefix><module path>.weight`, with `.base_layer` before the weight under a LoRA adapter and
`.original_module` under a copy that is trained in full. They belong to the base model, and are loaded into it. A model
whose embeddings a file has changed writes them again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.lora_linear import FusedLoRALinear
from lora_kernels.nn.wrappers import Model, get_submodule, named_modules, state_dict, unwrapped
from lora_kernels.sharded import spread, whole

_BASE, _ORIGINAL, _COPY = "base_layer", "original_module", "modules_to_save"
# The attribute of a model whose embeddings were loaded from a file.
_CHANGED = "embeddings_were_loaded"


def _embeddings(model: Model) -> dict[str, nn.Module]:
    """The input and the output embeddings of the base model, by path."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    modules = [unwrapped(module) for module in found if module is not None]
    paths = [path for path, module in named_modules(model) if any(module is each for each in modules)]
    return {path: unwrapped(_originals(model).get(path, get_submodule(model, path))) for path in paths}


def _originals(model: Model) -> Mapping[str, nn.Module]:
    """The untrained modules that stand aside, by path."""
    return getattr(model, "lora_originals", {})


def saved_embeddings(model: Model, prefix: str) -> dict[str, Tensor]:
    """What belongs into a file beside the adapter, by PEFT's key: nothing where the embeddings are the base model's.

    ValueError for a vocabulary that was resized after `inject`, which leaves the untrained originals as they were.
    """
    tensors: dict[str, Tensor] = {}
    for path, module in _embeddings(model).items() if _has_own_embeddings(model) else ():
        place = f"{prefix}{path}."
        if isinstance(module, FusedLoRALinear):
            module, place = module.base_layer(), f"{place}{_BASE}."
        elif path in _originals(model):
            trained = state_dict(get_submodule(model, path))
            for name, tensor in state_dict(module).items():
                if tensor.shape != trained[name].shape:
                    raise ValueError(
                        f"{path}.{name}, of modules_to_save, is {list(trained[name].shape)} where it is trained and "
                        f"{list(tensor.shape)} in the base model; call model.resize_token_embeddings before inject"
                    )
            place = f"{place}{_ORIGINAL}."
        tensors |= {place + name: tensor for name, tensor in state_dict(module).items()}
    return tensors


def _has_own_embeddings(model: Model) -> bool:
    """Whether the embeddings are others than the base model's: a file has changed them, or the vocabulary has another
    size than the config that the model was loaded from has; a warning where that can't be read any more."""
    if getattr(model, _CHANGED, False):
        return True
    config: Any = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None)
    size = _vocab_size(config)
    if not source or size is None:
        return False
    try:
        # What a hub's id means is in the cache, since the model was loaded from there.
        base = type(config).from_pretrained(
            source, local_files_only=True, revision=getattr(config, "_commit_hash", None) or "main"
        )
    except (OSError, ValueError):
        warnings.warn(
            f"the config of the base model {source} can't be read, so the adapter is saved as if the vocabulary of "
            f"{size} tokens were its own; rows that were added to the embeddings are not in the files",
            stacklevel=2,
        )
        return False
    return _vocab_size(base) != size


def _vocab_size(config: Any) -> int | None:
    """None where the config has none, or several that it can't tell apart."""
    for decoder in (None, True) if hasattr(config, "get_text_config") else ():
        try:
            return getattr(config.get_text_config(decoder=decoder), "vocab_size", None)
        except ValueError:
            # MusicGen has a text encoder too.
            continue
    return None


def take_embeddings(
    model: Model,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    path: Path,
    prefix: str,
    trained: Sequence[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what of `tensors` is the adapter's, the base model's embeddings {name: values} for `load_embeddings`).

    Left out is what the model has anyway, such as embeddings that were not resized. trained: the modules_to_save of the
    file, which are the adapter's. ValueError for a vocabulary of another size than the model's, and for embeddings that
    would change what another adapter of the model stands on.
    """
    modules = _embeddings(model).items()
    own = {f"{name}.{leaf}": tensor for name, module in modules for leaf, tensor in state_dict(module).items()}
    everything = state_dict(model) if tensors.keys() - expected.keys() else {}
    kept, found = {}, {}
    for key, tensor in tensors.items():
        name = re.sub(rf"\.({_BASE}|{_ORIGINAL}|{_COPY})(?=\.\w+$)", "", key.removeprefix(prefix))
        if name in own and tensor.ndim == 2 and own[name].shape[1:] == tensor.shape[1:]:
            rows, mine = len(tensor), len(own[name])
            if rows != mine:
                raise ValueError(
                    f"{path}: {key} is of a vocabulary of {rows} tokens, the model's has {mine}; call "
                    f"model.resize_token_embeddings({rows}) first, or save the model like that with its tokenizer and "
                    "use the directory as the base model"
                )
        base = own.get(name, everything.get(name))
        is_copy = f".{_COPY}." in key
        if key in expected or base is None or base.shape != tensor.shape or (is_copy and prefix + name not in tensors):
            kept[key] = tensor
        elif is_copy or _agree(whole(base).cpu(), tensor):
            # PEFT writes the trained copy a second time.
            continue
        elif name not in own or (key == prefix + name and name.rpartition(".")[0] in trained):
            kept[key] = tensor
        elif getattr(model, "parked_adapters", None) is not None:
            raise ValueError(f"{path}: {key} differs from the model's, and would change it for its other adapters too")
        else:
            found[name] = tensor
    return kept, found


def _agree(base: Tensor, tensor: Tensor) -> bool:
    """Whether the two are equal, but for what either dtype rounds away."""
    return torch.equal(base.to(tensor.dtype), tensor) or torch.equal(base, tensor.to(base.dtype))


def load_embeddings(model: Model, values: Mapping[str, Tensor]) -> None:
    """Gives the base model's embeddings the values that `take_embeddings` found, with a warning."""
    if not values:
        return
    warnings.warn(
        f"the adapter's file has other embeddings than the base model: {', '.join(values)}. The base model now has "
        "those of the file, with the adapters disabled too, and save_adapter writes them again",
        stacklevel=4,
    )
    setattr(model, _CHANGED, True)
    for path, module in _embeddings(model).items():
        targets = {name: target for name, target in state_dict(module).items() if f"{path}.{name}" in values}
        # Not fill: DoRA's norms follow load_state_dict.
        module.load_state_dict(
            {name: spread(values[f"{path}.{name}"], target) for name, target in targets.items()}, strict=False
        )
