"""LoRA adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

Tensors are named `base_model.model.<module path>.lora_A.weight` [R, K] and `.lora_B.weight` [N, R], with DoRA
`.lora_magnitude_vector` [N], modules trained in full by `base_model.model.<module path>.<their own key>`. What PEFT
writes is read here and the other way round, with the same logits. PEFT's spelling of names lives in this file only.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_kernels.backends import check_memory
from lora_kernels.files import replacing
from lora_kernels.io.peft_embeddings import load_embeddings, saved_embeddings, take_embeddings
from lora_kernels.methods.apply import adapter_config
from lora_kernels.methods.lora import (
    LoRAConfig,
    from_pattern,
    inject,
    inside,
    lora_modules,
    named_by,
    pattern_matches,
    plan,
    shorten,
)
from lora_kernels.methods.named import add_adapter, use_adapter
from lora_kernels.methods.ties import settle, tied_copies
from lora_kernels.nn.lora_linear import FusedLoRALinear, is_conv1d, lora_scaling
from lora_kernels.nn.wrappers import Model, bare, get_submodule, named_modules, state_dict, unwrapped
from lora_kernels.sharded import fill, local, whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"

_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "bias",
}
# No bearing on what a loaded adapter computes. The *_config ones belong to initialisations, and init_lora_weights is
# checked; fan_in_fan_out follows from the module; qalora_group_size and layers_pattern serve use_qalora and
# layers_to_transform, which are refused.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# PEFT's initialisations that leave the base weights alone. PiSSA and its kin change them when the adapter is created.
_INITS = {True: "default", False: "default", "gaussian": "gaussian", "eva": "default", "orthogonal": "default"}

_TASK_TYPES = (
    (r"For(CausalLM)$|LMHeadModel$", "CAUSAL_LM"),
    (r"ForSequenceClassification$", "SEQ_CLS"),
    (r"ForTokenClassification$", "TOKEN_CLS"),
    (r"ForQuestionAnswering$", "QUESTION_ANS"),
)
# The heads that PEFT takes to be in the files of such a task.
_HEADS = {"SEQ_CLS": ("score", "classifier"), "TOKEN_CLS": ("score", "classifier"), "QUESTION_ANS": ("qa_outputs",)}
# What PEFT 0.21 takes for the names of a mixture's experts in files from transformers 4, by the kind of mixture.
_EXPERTS = {"mixtral": {"gate", "w1", "w2", "w3"}, "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"}}


def save_adapter(model: Model, directory: str | os.PathLike) -> None:
    """Writes the adapter of an injected model to `directory` as PEFT would, for `PeftModel.from_pretrained`.

    The config names the very modules that carry an adapter. LoRA tensors of 16 bits are written as float32, exactly;
    modules_to_save keep their dtype. Each file is written under a temporary name and then moved into place. Warns of
    adapters that PEFT would put elsewhere.

    Raises ValueError if the model carries no adapters, RuntimeError inside `adapters_disabled`.
    """
    config = _config_of(model)
    warn_of_misread(model, [name for name, _ in lora_modules(model)])
    tensors = saved_embeddings(model, PREFIX) | _adapter_tensors(model)
    write_files(Path(directory), peft_config(model, config), detached(model, tensors))


def to_write(name: str, tensor: Tensor) -> Tensor:
    """All of the tensor, as `whole` gathers it. Raises as `check_memory`, with the name."""
    tensor = whole(tensor.detach())
    check_memory(**{name: tensor})
    return tensor


def detached(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies as they are written: on the CPU, adapters of 16 bits as float32.

    RuntimeError inside adapters_disabled. Raises as `to_write`.
    """
    for name, original in model.lora_originals.items():
        if get_submodule(model, name) is original:
            raise RuntimeError("save_adapter was called inside adapters_disabled, where trained modules are set aside")
    saved = {}
    for key, tensor in tensors.items():
        is_adapter = key.removesuffix(".weight").endswith((".lora_A", ".lora_B", ".lora_E", _MAGNITUDE))
        tensor = to_write(key, tensor)
        wide = tensor.float() if is_adapter and tensor.itemsize < 4 else tensor
        saved[key] = wide.to("cpu", copy=True).contiguous()
    return saved


def write_files(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The two files of an adapter, each under a temporary name first."""
    # Unsorted: in rank_pattern and alpha_pattern the first key that matches counts.
    text = json.dumps(config, indent=2) + "\n"
    # The config goes last: a directory that has one for the first time is complete.
    with replacing(directory / WEIGHTS_NAME) as path:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    with replacing(directory / CONFIG_NAME) as path:
        path.write_text(text, encoding="utf-8")


def _config_of(model: Model) -> LoRAConfig:
    config = adapter_config(model)
    if not isinstance(config, LoRAConfig):
        raise ValueError(f"model.adapter_config is a {type(config).__name__}; expected a LoRAConfig")
    return config


def _adapter_tensors(model: Model) -> dict[str, Tensor]:
    """The tensors of an injected model by PEFT's key; they share memory with the model."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_modules(model):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b
        if layer.lora_magnitude is not None:
            tensors[f"{PREFIX}{name}{_MAGNITUDE}"] = layer.lora_magnitude
    return tensors | saved_module_tensors(model, model.lora_originals)


def saved_module_tensors(model: Model, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of modules_to_save, by PEFT's key."""
    states = {name: state_dict(get_submodule(model, name)) for name in names}
    return {f"{PREFIX}{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}


def peft_config(
    model: Model, config: LoRAConfig, layers: Mapping[str, FusedLoRALinear] | None = None
) -> dict[str, Any]:
    """PEFT's config of the LoRA adapters that `model` carries, or of those of them in `layers`, by path."""
    names = [name for name, _ in named_modules(model) if name]
    layers = dict(lora_modules(model)) if layers is None else layers
    saved = list(model.lora_originals)
    task, kind = task_type(model, saved), type(unwrapped(model))
    # What AutoPeftModel goes by where there is no task.
    auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__} if task is None else None
    # PEFT looks for targets outside of modules_to_save only, and for the latter by the end of the string.
    targets = _suffixes(layers, [name for name in names if not inside(name, saved)])
    taken = [name for name in names if any(name.endswith(suffix) for suffix in saved)]
    if sorted(taken) != sorted(saved):
        other = next(name for name in taken if name not in saved)
        raise ValueError(f"PEFT's format can't name the modules_to_save {saved} without {other!r}; save it as well")
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": auto_mapping,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _integer_if_whole(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "target_modules": targets or "|".join(re.escape(name) for name in layers),
        "exclude_modules": None,
        "modules_to_save": saved or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {pattern: _integer_if_whole(value) for pattern, value in config.alpha_pattern.items()},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _integer_if_whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _suffixes(chosen: Mapping[str, Any], names: list[str]) -> list[str] | None:
    """The shortest ends of paths that among `names` name all of `chosen` and nothing else; None if there are none."""
    others = [name for name in names if name not in chosen]
    taken_by_others = {suffix for name in others for suffix in _ends(name)}
    suffixes = set()
    for name in chosen:
        own = next((suffix for suffix in _ends(name) if suffix not in taken_by_others), None)
        if own is None:
            return None
        suffixes.add(own)
    return sorted(suffixes)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def task_type(model: Model, saved: list[str]) -> str | None:
    name = type(model).__name__
    task = next((task for pattern, task in _TASK_TYPES if re.search(pattern, name)), None)
    if name.endswith("ForConditionalGeneration"):
        # Also what reads images and writes text by a decoder alone is called that.
        task = "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    if task == "CAUSAL_LM" and "score" in saved:
        # A reward model: the head that a sequence classifier has, on the decoder of a causal LM.
        task = "SEQ_CLS"
    elif task in _HEADS:
        # For these PEFT takes the heads to be in the file, whatever modules_to_save says.
        heads = {name for name, _ in named_modules(model) if name.endswith(_HEADS[task])}
        task = task if heads and heads <= set(saved) else None
    return task if _takes(model, task) else None


def _takes(model: Model, task: str | None) -> bool:
    """Whether the model can be called as PEFT's model of the task calls it: with all of these by name, if only None.
    Without a task PEFT passes on what it is given."""
    passed = {"input_ids", "inputs_embeds", "start_positions" if task == "QUESTION_ANS" else "labels"}
    if task == "SEQ_2_SEQ_LM":
        passed |= {"decoder_input_ids", "decoder_inputs_embeds"}
    generates = task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or hasattr(model, "prepare_inputs_for_generation")
    # A model that takes one of them in its **kwargs passes it on to parts that get their own.
    return generates and passed <= inspect.signature(model.forward).parameters.keys()


def warn_of_misread(model: Model, layers: Iterable[str]) -> None:
    """Names those of the adapted `layers` that PEFT takes for experts, as shared experts and first dense layers are."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        # The table that PEFT looks into.
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as mixtures
    except ImportError:
        return
    experts = _EXPERTS.get(mixtures.get(kind), ())
    if misread := [name for name in layers if name.rpartition(".")[2] in experts]:
        warnings.warn(
            f"PEFT 0.21 takes the adapters on {shorten(misread)} of a {kind} for those of its experts and computes "
            "something else (peft#3711); load_adapter reads them as they are",
            stacklevel=2,
        )


def load_adapter(model: Model, directory: str | os.PathLike, trainable: bool = True) -> nn.Module:
    """Loads a LoRA adapter in PEFT's format from `directory` into `model`, in place.

    A model without adapters gets them as adapter_config.json says (`inject`). One that has adapters must have them on
    the same modules with the same rank, scaling and modules_to_save. Loading is strict and comes last: with any
    missing, unexpected or mis-shaped tensor the model is left as it was.

    Args:
        model: the base model, or one that `inject` has been applied to.
        directory: where adapter_config.json and adapter_model.safetensors are.
        trainable: whether the loaded adapter requires gradients (PEFT's `is_trainable`, which is False by default).

    Returns the model. Raises FileNotFoundError if a file is missing, and ValueError, naming the field, tensor or
    module, if the adapter is of a kind that is not supported or doesn't fit the model.
    """
    return load_as(_LORA, model, directory, trainable)


@dataclasses.dataclass(frozen=True)
class Form:
    """What the LoRA adapters of a method have of their own in these files.

    read(model, raw, tensors, path): their config, of what both files hold. tensors(model): those of an injected model
    by PEFT's key, which share memory with the model. shapes(config, name, N, K, tensors): by the end of the key, of the
    adapter on a layer with a weight [N, K]. scaling(config, name): of a layer, and how it comes about. put_in(model,
    config, tensors): injects.
    """

    read: Callable[..., Any]
    tensors: Callable[[Model], dict[str, Tensor]]
    shapes: Callable[..., dict[str, tuple[int, ...]]]
    scaling: Callable[[Any, str], tuple[float, str]]
    put_in: Callable[..., None]


def load_as(form: Form, model: Model, directory: str | os.PathLike, trainable: bool) -> nn.Module:
    """`load_adapter` for adapters of that form."""
    path, weights = Path(directory) / CONFIG_NAME, Path(directory) / WEIGHTS_NAME
    raw, tensors = read_config(path), read_tensors(weights)
    config = form.read(model, raw, tensors, path)
    injected = getattr(model, "adapter_config", None) is not None
    if injected:
        _check_same_adapters(model, config, form)
        targets = form.tensors(model)
        check_memory(**{key: local(target).detach() for key, target in targets.items()})
        expected = {key: target.shape for key, target in targets.items()}
    else:
        expected = _expected_shapes(form, model, config, tensors)
    tensors, embeddings = take_embeddings(model, tensors, expected, weights, PREFIX, config.modules_to_save)
    check_tensors(tensors, expected, weights)
    _check_ties(model, tensors, weights)
    load_embeddings(model, embeddings)
    if not injected:
        form.put_in(model, config, tensors)
        model.adapter_config = config
    with torch.no_grad():
        for key, target in form.tensors(model).items():
            fill(target, tensors[key])
    for _, layer in lora_modules(model):
        layer.adapter_was_set()
        for parameter in (layer.lora_a, layer.lora_b, layer.lora_e, layer.lora_magnitude):
            if parameter is not None:
                parameter.requires_grad_(trainable and layer.r > 0 and not layer.bypassed)
    for name in model.lora_originals:
        get_submodule(model, name).requires_grad_(trainable)
    if not injected:
        settle(model)
    return model


def add_saved_adapter(model: nn.Module, name: str, directory: str | os.PathLike, trainable: bool = True) -> nn.Module:
    """`add_adapter` with the config and the values of the LoRA adapter in `directory`, which is not in use yet.

    Returns the model. Raises what add_adapter and load_adapter raise, with the model unchanged.
    """
    given, model = model, bare(model, adding=True)
    directory = Path(directory)
    raw, tensors = read_config(directory / CONFIG_NAME), read_tensors(directory / WEIGHTS_NAME)
    config = lora_config(model, raw, tensors, directory / CONFIG_NAME)
    add_adapter(model, name, dataclasses.replace(config, init="both_zero"), from_file=True)
    try:
        with use_adapter(model, name):
            load_adapter(model, directory, trainable)
            settle(model)
            model.adapter_config = config
    except Exception:
        del model.parked_adapters[name]
        raise
    return given


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a PEFT adapter directory has one")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; expected a JSON object")
    return raw


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        old = path.with_name("adapter_model.bin")
        hint = f"; {old.name} is a pickle, which is never loaded: save it again as safetensors" if old.is_file() else ""
        raise FileNotFoundError(f"{path} does not exist{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None


def lora_config(model: Model, raw: Mapping[str, Any], tensors: Iterable[str], path: Path) -> LoRAConfig:
    """The LoRAConfig of a PEFT config, or ValueError for what it asks of us and we can't do."""
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {raw.get('peft_type')!r}; supported: 'LORA'")
    if raw.get("task_type") == "SEQ_CLS" and not {"score", "classifier"} & {name for name, _ in model.named_children()}:
        raise ValueError(
            f"{path}: task_type is 'SEQ_CLS', a reward model or classifier, and the model has no head for it; "
            "lora_kernels.train.load_reward_model loads a reward model"
        )
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {raw['bias']!r}, which is not supported yet; supported: 'none'")
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, (bool, str)) or init not in _INITS:
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights and is not supported yet; convert "
            f"the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key, value in raw.items():
        # Not `value in (...)`: 0 equals False, and a layers_to_transform of 0 is a request.
        unset = value is None or value is False or value == [] or value == {}
        if key not in _READ | _IGNORED and not unset:
            raise ValueError(f"{path}: {key} is {value!r}, which is not supported yet")

    names = [name for name, _ in named_modules(model) if name]
    target_modules = raw.get("target_modules")
    if not target_modules:
        raise ValueError(f"{path}: target_modules is {target_modules!r}; expected a string or a list of names")
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        target_modules = "all-linear"
    # PEFT lets lists and patterns name what the model doesn't have; inject, where it would be a slip, does not.
    ends_saved = raw.get("modules_to_save") or ()
    if not isinstance(ends_saved, (list, tuple)):
        raise ValueError(f"{path}: modules_to_save is {ends_saved!r}; expected a list of names")
    saved = [name for name in names if any(name.endswith(suffix) for suffix in ends_saved)]
    present = [name for name in names if not inside(name, saved)]
    end = ".lora_A.weight"
    adapted = [key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end)]

    def known(value: str | Sequence[str]) -> str | list[str]:
        if isinstance(value, str):
            return value
        return [suffix for suffix in value if any(named_by(name, suffix) for name in present)]

    def known_patterns(value: Mapping[str, Any] | None) -> dict[str, Any]:
        return {pattern: n for pattern, n in (value or {}).items() if any(pattern_matches(pattern, m) for m in adapted)}

    arguments = {key: raw[key] for key in ("r", "lora_alpha", "lora_dropout") if raw.get(key) is not None}
    try:
        config = LoRAConfig(
            **{"r": 8, "lora_alpha": 8, "lora_dropout": 0.0} | arguments,
            target_modules=known(target_modules) or target_modules,
            use_rslora=bool(raw.get("use_rslora")),
            init=_INITS[init],
            rank_pattern=known_patterns(raw.get("rank_pattern")),
            alpha_pattern=known_patterns(raw.get("alpha_pattern")),
            modules_to_save=saved,
            exclude_modules=known(raw.get("exclude_modules") or ()),
            use_dora=bool(raw.get("use_dora")),
        )
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _put_in(model: Model, config: LoRAConfig, tensors: Mapping[str, Tensor]) -> None:
    # The values come from the file: with zeros, loading leaves torch's random state alone.
    inject(model, dataclasses.replace(config, init="both_zero"), from_file=True)


def _shapes(config: LoRAConfig, name: str, N: int, K: int, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    r = from_pattern(config.rank_pattern, name, config.r)
    magnitude: dict[str, tuple[int, ...]] = {_MAGNITUDE: (N,)} if config.use_dora else {}
    return {".lora_A.weight": (r, K), ".lora_B.weight": (N, r), **magnitude}


def _scaling(config: LoRAConfig, name: str) -> tuple[float, str]:
    r = from_pattern(config.rank_pattern, name, config.r)
    lora_alpha = from_pattern(config.alpha_pattern, name, config.lora_alpha)
    how = f" (r={r}, lora_alpha={lora_alpha:g}, use_rslora={config.use_rslora})"
    return lora_scaling(r, lora_alpha, config.use_rslora), how


_LORA = Form(lora_config, _adapter_tensors, _shapes, _scaling, _put_in)


def _expected_shapes(form: Form, model: Model, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    planned = plan(model, config if isinstance(config, LoRAConfig) else config.lora_config(), from_file=True)
    shapes = {}
    for name in planned.adapters:
        linear = unwrapped(get_submodule(model, name))
        N, K = linear.weight.shape[::-1] if is_conv1d(linear) else linear.weight.shape
        for end, shape in form.shapes(config, name, N, K, tensors).items():
            shapes[f"{PREFIX}{name}{end}"] = torch.Size(shape)
    saved = saved_module_tensors(model, planned.modules_to_save)
    return shapes | {key: tensor.shape for key, tensor in saved.items()}


def _check_same_adapters(model: Model, config: Any, form: Form) -> None:
    """That the model's adapters compute what the file's config says; modules and shapes are checked by tensor."""
    for name, layer in lora_modules(model):
        if layer.merged:
            raise ValueError(f"{name} is merged; call unmerge() before loading an adapter")
        scaling, how = form.scaling(config, name)
        if not math.isclose(layer.scaling, scaling, rel_tol=1e-6):
            raise ValueError(
                f"{name}: the file has scaling {scaling:g}{how}, the model {layer.scaling:g} (r={layer.r}, "
                f"lora_alpha={layer.lora_alpha:g}, use_rslora={layer.use_rslora})"
            )


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], path: Path) -> None:
    problems = [f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in tensors]
    problems += [f"unexpected {key} {list(tensor.shape)}" for key, tensor in tensors.items() if key not in expected]
    for key, shape in expected.items():
        if key in tensors and tensors[key].shape != shape:
            problems.append(f"{key} has shape {list(tensors[key].shape)}, the model needs {list(shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} doesn't fit the model: {'; '.join(problems[:5])}{more}")


def _check_ties(model: Model, tensors: Mapping[str, Tensor], path: Path) -> None:
    """That the file has one value for what an injected model trains as one weight."""
    for names in tied_copies(model):
        first, *others = [f"{PREFIX}{name}" for name in names]
        for other in others:
            if not torch.equal(tensors[first], tensors[other]):
                raise ValueError(f"{path} doesn't fit the model: {first} and {other} differ, and are one weight there")
