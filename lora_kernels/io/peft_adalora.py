"""AdaLoRA adapters in PEFT's file format, and as plain LoRA.

Tensors are named `base_model.model.<module path>.lora_A` [R, K], `.lora_B` [N, R] and `.lora_E` [R, 1]. The config's
`rank_pattern` is {"<module path>.lora_E": [init_r booleans]}, of which as many are true as the module has ranks.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.io import peft
from lora_kernels.io.peft import PREFIX
from lora_kernels.io.peft_embeddings import saved_embeddings
from lora_kernels.methods.adalora import AdaLoRAConfig, inject, triplets
from lora_kernels.methods.lora import lora_modules
from lora_kernels.nn.wrappers import Model

ADALORA = "ADALORA"
# our field -> PEFT's
_FIELDS = {
    "init_r": "init_r",
    "target_r": "target_r",
    "tinit": "tinit",
    "tfinal": "tfinal",
    "delta_t": "deltaT",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orth_reg_weight",
    "total_step": "total_step",
}
_LORA_FIELDS = ("lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "exclude_modules")


def save_adapter(model: Model, directory: str | os.PathLike) -> None:
    """Writes an AdaLoRA adapter as PEFT would, with the ranks that its tensors have. Raises as `peft.save_adapter`."""
    config: AdaLoRAConfig = model.adapter_config
    raw = peft.peft_config(model, config.lora_config())
    raw |= {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    # PEFT takes no config without one, nor one that leaves no step to tinit and tfinal.
    raw["total_step"] = config.total_step or config.tinit + config.tfinal + 1
    ranks = {name: layer.r for name, layer in lora_modules(model)}
    pattern = {f"{name}.lora_E": [place < r for place in range(config.init_r)] for name, r in ranks.items()}
    # r has no meaning here, and PEFT warns of any but its default.
    raw |= {"peft_type": ADALORA, "r": 8, "init_lora_weights": True, "alpha_pattern": {}}
    raw["rank_pattern"] = pattern if any(r < config.init_r for r in ranks.values()) else None
    tensors = saved_embeddings(model, PREFIX) | _adapter_tensors(model)
    peft.write_files(Path(directory), raw, peft.detached(model, tensors))


def save_as_lora(model: Model, directory: str | os.PathLike) -> None:
    """Writes an AdaLoRA adapter as a LoRA adapter that computes the same.

    lora_e goes into lora_a. Each module has its rank in `rank_pattern` and in `alpha_pattern` the lora_alpha that
    keeps the scaling; modules without ranks are left out. Raises ValueError if no module has a rank.
    """
    config: AdaLoRAConfig = model.adapter_config
    layers = {name: layer for name, layer in lora_modules(model) if layer.r}
    if not layers:
        raise ValueError("no module has a rank left: there is no LoRA adapter to write")
    tensors = saved_embeddings(model, PREFIX) | peft.saved_module_tensors(model, model.lora_originals)
    for name, layer in layers.items():
        lora_a, lora_b, lora_e = triplets(layer)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_a * lora_e[:, None]
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_b
    peft.warn_of_misread(model, layers)
    lora_config = dataclasses.replace(config.lora_config(), r=config.target_r, init="default")
    raw = peft.peft_config(model, lora_config, layers)
    # A path alone would also name the longer ones that end in it.
    raw["rank_pattern"] = {f"^{re.escape(name)}": layer.r for name, layer in layers.items()}
    raw["alpha_pattern"] = {f"^{re.escape(name)}": layer.scaling * layer.r for name, layer in layers.items()}
    peft.write_files(Path(directory), raw, peft.detached(model, tensors))


def _adapter_tensors(model: Model) -> dict[str, Tensor]:
    """The tensors of an injected model by PEFT's key; they share memory with the model."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_modules(model):
        lora_a, lora_b, lora_e = triplets(layer)
        tensors |= {f"{PREFIX}{name}.lora_A": lora_a, f"{PREFIX}{name}.lora_B": lora_b}
        tensors[f"{PREFIX}{name}.lora_E"] = lora_e[:, None]
    return tensors | peft.saved_module_tensors(model, model.lora_originals)


def load_adapter(model: Model, directory: str | os.PathLike, trainable: bool = True) -> nn.Module:
    """Loads an AdaLoRA adapter in PEFT's format, as `peft.load_adapter` does; the tensors say which rank each has.

    A model that has AdaLoRA adapters must have them with the same ranks. One whose ranks have been allocated
    computes and merges, and trains on as LoRA (`save_adapter(..., as_lora=True)`).
    """
    return peft.load_as(_ADALORA, model, directory, trainable)


def _put_in(model: Model, config: AdaLoRAConfig, tensors: Mapping[str, Tensor]) -> None:
    # The values come from the file, so that torch's random state is left alone.
    with torch.random.fork_rng(devices=[]):
        inject(model, config, from_file=True)
    for name, layer in lora_modules(model):
        layer.keep_ranks(torch.arange(len(tensors[f"{PREFIX}{name}.lora_E"]), device=layer.lora_a.device))


def _config(model: Model, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> AdaLoRAConfig:
    own = {ours: raw[theirs] for ours, theirs in _FIELDS.items() if raw.get(theirs) is not None}
    _check_rank_pattern(raw.get("rank_pattern") or {}, tensors, path)
    shared = {key: value for key, value in raw.items() if key not in (*_FIELDS.values(), "rank_pattern")}
    shared |= {"peft_type": "LORA", "r": own.get("init_r", AdaLoRAConfig.init_r)}
    lora_config = peft.lora_config(model, shared, [f"{key}.weight" for key in tensors], path)
    if lora_config.use_rslora or lora_config.alpha_pattern:
        raise ValueError(f"{path}: use_rslora and alpha_pattern have no meaning for AdaLoRA; allowed: none of them")
    try:
        return AdaLoRAConfig(**own, **{name: getattr(lora_config, name) for name in _LORA_FIELDS})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _check_rank_pattern(pattern: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    if not isinstance(pattern, dict) or not all(isinstance(kept, list) for kept in pattern.values()):
        raise ValueError(f"{path}: rank_pattern is no mapping of names to lists of booleans")
    for name, kept in pattern.items():
        # In a running PEFT model the adapter's name comes behind.
        key = f"{PREFIX}{name[: name.rindex('.lora_E') + len('.lora_E')]}" if ".lora_E" in name else name
        if key in tensors and len(tensors[key]) != sum(kept):
            raise ValueError(
                f"{path}: rank_pattern gives {name} rank {sum(kept)}, its tensors have rank {len(tensors[key])}"
            )


def _shapes(config: AdaLoRAConfig, name: str, N: int, K: int, tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    e = tensors.get(f"{PREFIX}{name}.lora_E")
    r = config.init_r if e is None else len(e)
    return {".lora_A": (r, K), ".lora_B": (N, r), ".lora_E": (r, 1)}


_ADALORA = peft.Form(_config, _adapter_tensors, _shapes, lambda config, name: (config.scaling, ""), _put_in)
