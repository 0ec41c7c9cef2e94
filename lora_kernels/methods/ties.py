"""Weights that are one in several places of a model, as the embeddings' and the output layer's mostly are.

Training one of the places apart unties them. This module does what has to follow for the model to be the same after
save_pretrained and from_pretrained.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_kernels.checks import warn
from lora_kernels.nn.wrappers import Model, get_submodule, named_parameters, unwrapped

# Where the config says "tied", their code also scales the decoder's output, so it has to go on saying so. transformers
# 5 doesn't tie weights that a file has with different values; transformers 4 does.
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
    named = {name: p for name, p in named_parameters(model) if not name.startswith("parked_adapters.")}
    copied = {
        id(named[f"{path}.{key}"]): parameter
        for path, original in originals.items()
        for key, parameter in named_parameters(original)
    }
    return one_weight((name, copied.get(id(p), p)) for name, p in named.items())


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
    cleared = [config for config in _tying(model) if getattr(config, "model_type", None) not in _SCALED_WHERE_TIED]
    for config in cleared:
        config.tie_word_embeddings = False
    flag = "; model.config.tie_word_embeddings is now False" if cleared else ""
    warn(f"{', '.join(apart[0])} are no longer the same weight, since they weren't all trained together{flag}")


def check_untying(model: nn.Module, groups: list[list[str]], adapted: Collection[str]) -> None:
    """Raises ValueError where merging the layers `adapted` unties one of `groups` and no file can keep it so."""
    scaled = [c.model_type for c in _tying(model) if getattr(c, "model_type", None) in _SCALED_WHERE_TIED]
    version = getattr(sys.modules.get("transformers"), "__version__", "5")
    if not scaled or int(version.partition(".")[0]) >= 5:
        return
    apart = untied(model, groups) + [names for names in groups if any(_parent(name) in adapted for name in names)]
    if apart:
        raise ValueError(
            f"merging would make {' and '.join(apart[0])} different weights, and transformers {version} makes them one "
            f"again when it loads a {scaled[0]} model: merge with transformers >= 5, or keep the adapter's files"
        )


def split(model: nn.Module, groups: list[list[str]]) -> None:
    """Gives each path a parameter of its own, in those of `groups` that came apart and in those that the config's flag
    tied before it was cleared: save_pretrained writes a shared one only once, and nothing would tie it again."""
    keys = [] if _tying(model) else [key for m in model.modules() for key in getattr(m, "_tied_weights_keys", ()) or ()]
    apart = untied(model, groups)
    for names in groups:
        # A key is where a path begins: it may be that of a block, all of whose weights are tied to another's.
        if names not in apart and not any(re.search(rf"(^|\.)(?:{key})", name) for key in keys for name in names):
            continue
        taken = set()
        for name in names:
            parameter = _attribute(model, name)
            if id(parameter) in taken:
                _set_attribute(model, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            taken.add(id(parameter))


def weight_holders(model: nn.Module) -> dict[str, list[str]]:
    """The embeddings that only hold the weight of others, as T5's `shared` does: it stands beside the encoder and the
    decoder, whose own embeddings have its weight. {its parameter: the parameters that are used instead}, by path."""
    found: dict[str, list[str]] = {}
    for names in tied_weights(model):
        embeddings = [name for name in names if isinstance(_module(model, _parent(name)), nn.Embedding)]
        for name in embeddings:
            beside = name[: _parent(name).rfind(".") + 1]
            if any(other.startswith(beside) and other.count(".") > name.count(".") for other in embeddings):
                found[name] = [other for other in names if other != name]
                break
    return found


def users(model: nn.Module, saved: Iterable[str]) -> tuple[str, ...]:
    """The paths of the modules that have to be trained with the modules `saved`: where one of these is such an
    embedding, those that use its weight. A path of the same module, or inside `saved`, is not among them."""
    trained, found = tuple(f"{path}." for path in saved), dict[str, None]()
    for name, used in weight_holders(model).items():
        if name.startswith(trained):
            holder = _module(model, _parent(name))
            found |= {_parent(other): None for other in used if _module(model, _parent(other)) is not holder}
    return tuple(path for path in found if not f"{path}.".startswith(trained))


def settle(model: Model) -> None:
    """After inject: copies that modules_to_save trains of such an embedding and of those that use its weight become one
    weight again, where they have the same values; what is untied nevertheless is noted."""
    trained = tuple(f"{path}." for path in model.lora_originals)
    for name, used in weight_holders(model).items():
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


def _tying(model: nn.Module) -> list[Any]:
    """The configs that say that the embeddings are tied."""
    return [config for config in _configs(model) if getattr(config, "tie_word_embeddings", False)]


def _configs(model: nn.Module) -> list[Any]:
    """The configs of the model and of its parts, with those inside them."""
    found: dict[int, Any] = {}
    rest: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    while rest:
        config = rest.pop()
        if id(config) not in found:
            found[id(config)] = config
            rest += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())
