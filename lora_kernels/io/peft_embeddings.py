"""Embeddings of a resized vocabulary in PEFT's files.

Rows that were added are in no file of the base model, so PEFT writes both embeddings in full beside the adapter:
`<prefix><module path>.weight`, with `.base_layer` before the weight under a LoRA adapter and `.original_module` under a
copy that is trained in full. They belong to the base model, and are loaded into it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels.nn.lora_linear import FusedLoRALinear
from lora_kernels.nn.wrappers import get_submodule, named_modules, state_dict, unwrapped

_BASE, _ORIGINAL = "base_layer", "original_module"


def _embeddings(model: nn.Module) -> dict[str, nn.Module]:
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


def _originals(model: nn.Module) -> Mapping[str, nn.Module]:
    """The untrained modules that stand aside, by path."""
    return getattr(model, "lora_originals", {})


def saved_embeddings(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """What belongs into a file beside the adapter, by PEFT's key: nothing but for a resized vocabulary."""
    tensors = {}
    for path, module in _embeddings(model).items() if _is_resized(model) else ():
        place = f"{prefix}{path}."
        if isinstance(module, FusedLoRALinear):
            module, place = module.base_layer(), f"{place}{_BASE}."
        elif path in _originals(model):
            place = f"{place}{_ORIGINAL}."
        tensors |= {place + name: tensor for name, tensor in state_dict(module).items()}
    return tensors


def _is_resized(model: nn.Module) -> bool:
    """Whether the vocabulary has another size than the config that the model was loaded from has; a warning where that
    can't be read any more."""
    config = getattr(model, "config", None)
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


def _vocab_size(config: object) -> int | None:
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "vocab_size", None)


def take_embeddings(
    model: nn.Module,
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
        name = re.sub(rf"\.({_BASE}|{_ORIGINAL}|modules_to_save)(?=\.\w+$)", "", key.removeprefix(prefix))
        if name in own and tensor.ndim == 2 and own[name].shape[1:] == tensor.shape[1:]:
            rows, mine = len(tensor), len(own[name])
            if rows != mine:
                raise ValueError(
                    f"{path}: {key} is of a vocabulary of {rows} tokens, the model's has {mine}; call "
                    f"model.resize_token_embeddings({rows}) first, or save the model like that with its tokenizer and "
                    "use the directory as the base model"
                )
        base = own.get(name, everything.get(name))
        if key in expected or base is None or base.shape != tensor.shape:
            kept[key] = tensor
        elif ".modules_to_save." in key or torch.equal(base.cpu(), tensor.to(base.dtype)):
            # PEFT writes the trained copy a second time.
            continue
        elif name not in own or (key == prefix + name and name.rpartition(".")[0] in trained):
            kept[key] = tensor
        elif getattr(model, "parked_adapters", None) is not None:
            raise ValueError(f"{path}: {key} differs from the model's, and would change it for its other adapters too")
        else:
            found[name] = tensor
    return kept, found


def load_embeddings(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives the base model's embeddings the values that `take_embeddings` found."""
    for path, module in _embeddings(model).items() if values else ():
        own = {name.removeprefix(f"{path}."): v for name, v in values.items() if name.startswith(f"{path}.")}
        module.load_state_dict(own, strict=False)
