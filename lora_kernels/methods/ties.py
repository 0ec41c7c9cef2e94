"""Weights that are one in several places of a model, as the embeddings' and the output layer's mostly are.

Training one of the places apart unties them. This module does what has to follow for the model to be the same after
save_pretrained and from_pretrained.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_kernels.nn.wrappers import get_submodule, named_parameters, unwrapped

# Where the config says "tied", their code also scales the decoder's output, so it has to go on saying so. transformers
# doesn't tie weights that a file has with different values.
_SCALED_WHERE_TIED = ("longt5", "mt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5")


def one_weight(named: Iterable[tuple[str, nn.Parameter]]) -> list[list[str]]:
    """The names by parameter, of those that have several."""
    names = defaultdict(list)
    for name, parameter in named:
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def tied_weights(model: nn.Module) -> list[list[str]]:
    """Groups of paths with one parameter, in the base model where adapters were injected."""
    originals: Mapping[str, nn.Module] = getattr(model, "lora_originals", {})
    replaced = (*(f"{path}." for path in originals), "parked_adapters.")
    named = [item for item in named_parameters(model) if not item[0].startswith(replaced)]
    for path, original in originals.items():
        named += [(f"{path}.{key}", p) for key, p in named_parameters(original)]
    return one_weight(named)


def untied(model: nn.Module, groups: Iterable[list[str]]) -> list[list[str]]:
    """Those of `groups` that are not one parameter in `model`."""
    parameters = dict(named_parameters(model))
    return [names for names in groups if len({id(parameters.get(name)) for name in names}) > 1]


def note_untied(model: nn.Module, groups: Iterable[list[str]]) -> None:
    """Says which of `groups` are not one weight any more. A config that says "tied" would tie them again when the model
    is loaded, and throw what was trained away: its flag is cleared."""
    apart = untied(model, groups)
    if not apart:
        return
    cleared = [config for config in _configs(model) if getattr(config, "tie_word_embeddings", False)]
    cleared = [config for config in cleared if getattr(config, "model_type", None) not in _SCALED_WHERE_TIED]
    for config in cleared:
        config.tie_word_embeddings = False
    flag = "; model.config.tie_word_embeddings is now False" if cleared else ""
    warnings.warn(
        f"{', '.join(apart[0])} are no longer the same weight, since they weren't all trained together{flag}",
        stacklevel=4,
    )


def split(model: nn.Module, groups: Iterable[list[str]]) -> None:
    """Gives each path in `groups` a parameter of its own: save_pretrained writes a shared one only once, and without
    the config's flag nothing puts it in the other places again."""
    for names in groups:
        taken = set()
        for name in names:
            parameter = _attribute(model, name)
            if id(parameter) in taken:
                _set_attribute(model, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            taken.add(id(parameter))


def stand_ins(model: nn.Module) -> dict[str, list[str]]:
    """The embeddings that only hold the weight of others, as T5's `shared` does: it stands beside the encoder and the
    decoder, whose own embeddings have its weight. {its parameter: the parameters that are used instead}, by path."""
    found = {}
    for names in tied_weights(model):
        embeddings = [name for name in names if isinstance(_module(model, _parent(name)), nn.Embedding)]
        for name in embeddings:
            beside = name[: _parent(name).rfind(".") + 1]
            if any(other.startswith(beside) and other.count(".") > name.count(".") for other in embeddings):
                found[name] = [other for other in names if other != name]
                break
    return found


def users(model: nn.Module, saved: Iterable[str]) -> tuple[str, ...]:
    """The paths of the modules that use the weight of such an embedding in the modules `saved`, but for those there."""
    trained = tuple(f"{path}." for path in saved)
    paths = [_parent(other) for name, used in stand_ins(model).items() if name.startswith(trained) for other in used]
    return tuple(dict.fromkeys(path for path in paths if not f"{path}.".startswith(trained)))


def settle(model: nn.Module) -> None:
    """After inject: copies that modules_to_save trains of such an embedding and of those that use its weight become one
    weight again, where they have the same values; what is untied nevertheless is noted."""
    trained = tuple(f"{path}." for path in model.lora_originals)
    for name, used in stand_ins(model).items():
        weight = _attribute(model, name)
        for other in used:
            if name.startswith(trained) and other.startswith(trained) and torch.equal(_attribute(model, other), weight):
                _set_attribute(model, other, weight)
    note_untied(model, tied_weights(model))


def tied_copies(model: nn.Module) -> list[list[str]]:
    """Groups of paths with one parameter in the copies that modules_to_save trains."""
    trained = tuple(f"{path}." for path in getattr(model, "lora_originals", ()))
    named = named_parameters(model)
    return one_weight(item for item in named if item[0].startswith(trained))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _attribute(model: nn.Module, path: str) -> Any:
    return getattr(_module(model, _parent(path)), path.rpartition(".")[2])


def _set_attribute(model: nn.Module, path: str, value: Any) -> None:
    setattr(_module(model, _parent(path)), path.rpartition(".")[2], value)


def _module(model: nn.Module, path: str) -> nn.Module:
    return unwrapped(get_submodule(model, path))


def _configs(model: nn.Module) -> list[Any]:
    """The configs of the model and of its parts, with those inside them."""
    found, rest = {}, [module.config for module in model.modules() if hasattr(module, "config")]
    while rest:
        config = rest.pop()
        if id(config) not in found:
            found[id(config)] = config
            rest += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())
