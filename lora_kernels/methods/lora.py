"""LoRA on a whole model (Hu et al. 2021): which linear layers get an adapter, what is trainable, merging.

`inject(model, config)` adapts a model in place, `adapters_disabled(model)` gives the base model back for a while (a
reference policy), `merge(model)` ends with a plain model.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from lora_kernels.checks import warn
from lora_kernels.methods.heads import CLASSIFIERS, task_heads
from lora_kernels.methods.ties import check_untying, note_untied, settle, split, tied_weights, untied, users
from lora_kernels.nn.bypassed import CHANGED, bypassed_layers
from lora_kernels.nn.hooks import is_offloaded, shared_hooks
from lora_kernels.nn.lora_linear import (
    WEIGHT_DTYPES,
    FusedLoRALinear,
    check_lora_arguments,
    foreign_weight,
    has_linear_sizes,
    is_linear,
    not_linear,
)
from lora_kernels.nn.nf4_linear import NF4Linear
from lora_kernels.nn.wrappers import Model, bare, get_submodule, named_modules, replace_module, unwrapped
from lora_kernels.ops.nf4 import NF4Weight, quantize_nf4

ALL_LINEAR = "all-linear"
_Number = TypeVar("_Number", int, float)


@dataclass
class LoRAConfig:
    """What `inject` does. The matching rules are PEFT's, so that a config means the same modules in both.

    Args:
        r: rank, >= 1.
        lora_alpha: > 0; scaling = lora_alpha / r, or lora_alpha / √r with use_rslora (Kalajdzievski 2023).
        lora_dropout: in [0, 1), on the input of the low-rank branch, in training mode only.
        target_modules: "all-linear" (every nn.Linear and transformers Conv1D but the output embedding, a top-level
            classification head `score` or `classifier`, and, with a warning, layers that the model never calls or
            whose weight it changes, subclasses of nn.Linear that compute something else, layers of other classes that
            have in_features and out_features, and layers whose weight pruning, a weight norm or a parametrization
            makes); any other string is a regular expression that must match a module's whole path; a list names modules
            by their path or by its last components ("q_proj", "self_attn.q_proj").
        use_rslora: see lora_alpha.
        init: initialisation of the adapters, see FusedLoRALinear.
        rank_pattern, alpha_pattern: {pattern: r}, {pattern: lora_alpha} for single modules. A pattern is a regular
            expression for the end of the path, after a dot or the whole of it; the first one that matches counts.
        modules_to_save: modules, named as in a list of target_modules, that are trained in full on a copy, and saved
            with the adapter. They get no adapter. A copy of a tied weight is no longer tied, but for an embedding that
            only holds the weight of others (T5's `shared`): these are trained and saved with it, as one weight. None
            (default): the heads of a model for classification, question answering and the like
            (`methods.heads.task_heads`) that target_modules doesn't name, and nothing of a language model; () leaves a
            head as it is.
        exclude_modules: modules that get no adapter: a regular expression or a list, as in target_modules.
        use_dora: weight-decomposed LoRA (Liu et al. 2024), see FusedLoRALinear.

    Raises ValueError naming the argument that is out of range.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    use_rslora: bool = False
    init: str = "default"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    exclude_modules: str | Sequence[str] = ()
    use_dora: bool = False

    def __post_init__(self) -> None:
        check_lora_arguments(self.r, self.lora_alpha, self.lora_dropout, self.init)
        self.target_modules = names_or_regex("target_modules", self.target_modules)
        self.exclude_modules = names_or_regex("exclude_modules", self.exclude_modules)
        if self.modules_to_save is not None:
            self.modules_to_save = names_or_regex("modules_to_save", self.modules_to_save, may_be_regex=False)
        if not self.target_modules:
            raise ValueError('target_modules is empty; allowed: "all-linear", a regular expression, a list of names')
        for argument in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, argument).items():
                _compile(argument, pattern)
                r, lora_alpha = (value, self.lora_alpha) if argument == "rank_pattern" else (self.r, value)
                try:
                    check_lora_arguments(r, lora_alpha, self.lora_dropout, self.init)
                except ValueError as error:
                    raise ValueError(f"{argument}[{pattern!r}]: {error}") from None


def names_or_regex(argument: str, value: str | Iterable[str], may_be_regex: bool = True) -> str | tuple[str, ...]:
    """What names modules, checked: a regular expression, or names as a tuple. ValueError names the argument."""
    if isinstance(value, str):
        if not may_be_regex:
            raise ValueError(f"{argument} is the string {value!r}; allowed: a list of names, here [{value!r}]")
        if value != ALL_LINEAR:
            _compile(argument, value)
        return value
    names = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{argument} contains {name!r}; allowed: non-empty strings")
    return names


def _compile(argument: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from None


def named_by(name: str, suffix: str) -> bool:
    """Whether `suffix` names the module path `name`: the whole of it or its last components."""
    return name == suffix or name.endswith("." + suffix)


def matches(name: str, names: str | Sequence[str]) -> bool:
    """Whether a regular expression means the whole module path `name`, or one of a list of names does."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, name))
    return any(named_by(name, suffix) for suffix in names)


def from_pattern(patterns: Mapping[str, _Number], name: str, default: _Number) -> _Number:
    """The value of the first key of rank_pattern or alpha_pattern that means the module path `name`, or `default`."""
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, name)), default)


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the module path `name`."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@dataclass(frozen=True)
class Plan:
    """What a config means on one model: {path: (r, lora_alpha)} of the adapters, the paths trained in full, {path: why}
    of the layers where an adapter can't work, and what on top of the base model stays frozen, perhaps random."""

    adapters: dict[str, tuple[int, float]]
    modules_to_save: tuple[str, ...]
    problems: dict[str, str]
    frozen_heads: tuple[str, ...] = ()


def plan(model: nn.Module, config: LoRAConfig, from_file: bool = False) -> Plan:
    """What `inject` of the same arguments would do; changes nothing. Raises what inject raises."""
    model = bare(model, adding=True)
    if is_injected(model):
        raise ValueError("model already carries LoRA adapters; merge(model) them first, or load the base model anew")
    modules = {name: module for name, module in named_modules(model) if name}
    foreign = {name: what for name, module in modules.items() if (what := foreign_weight(module))}
    linears = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) or is_linear(module) or has_linear_sizes(module)
    ]
    for argument in ("target_modules", "exclude_modules", "modules_to_save"):
        _check_names_exist(argument, getattr(config, argument) or (), modules, linears)

    heads, others = task_heads(model)
    heads = tuple(name for name in heads if not _is_target(name, config.target_modules, modules))
    asked = config.modules_to_save
    saved = heads if asked is None else tuple(name for name in modules if matches(name, asked))
    # An empty modules_to_save says that nothing but adapters is wanted.
    frozen = tuple(name for name in (*heads, *others) if not inside(name, saved)) if asked is None or saved else ()
    nested = [name for name in saved if any(name.startswith(outer + ".") for outer in saved)]
    if nested:
        raise ValueError(f"modules_to_save names {nested[0]!r} as well as a module that contains it; name one of them")
    for name in saved:
        kind = type(modules[name])
        if kind in (nn.ModuleList, nn.ModuleDict) or not list(modules[name].parameters()):
            raise ValueError(
                f"modules_to_save names {name!r}, a {kind.__name__}; allowed: a module with parameters and a forward"
            )
    if not from_file:
        saved += users(model, saved)

    if config.target_modules == ALL_LINEAR:
        skipped = _heads(model)
        chosen = [name for name in linears if not inside(name, skipped)]
    else:
        chosen = [name for name in modules if matches(name, config.target_modules)]
    excluded = config.exclude_modules
    chosen = [name for name in chosen if not inside(name, saved) and not (excluded and matches(name, excluded))]
    if bad := next((name for name in chosen if name in foreign), None):
        raise ValueError(
            f"target_modules={config.target_modules!r} includes {bad!r}, where an adapter can't work: "
            f"{foreign[bad]}. Adapters go on dense weights ({', '.join(map(str, WEIGHT_DTYPES))}) and on the NF4 "
            'weights of load_model(quantize="nf4"); load a model in one of these, and inject before it is sharded'
        )
    for name in (*chosen, *saved):
        outer = [modules[path] for path in itertools.accumulate(name.split("."), "{}.{}".format)]
        if is_offloaded(modules[name], (model, *outer)):
            raise ValueError(
                f"accelerate has offloaded the weights of {name!r}, which is to be trained; load the model without "
                'offloading (device_map, cpu_offload, disk_offload), in 4 bits with load_model(quantize="nf4") '
                "where it is too large"
            )
    problems = {name: problem for name in chosen if (problem := not_linear(modules[name]))}
    if len(problems) < len(chosen):
        # In a file such an adapter was trained beside the changes.
        idle = {name: why for name, why in bypassed_layers(model).items() if not (from_file and why == CHANGED)}
        problems |= {name: why for name, why in idle.items() if name in chosen}
    refused = [name for name in problems if not (from_file and is_linear(modules[name]))]
    if refused and config.target_modules != ALL_LINEAR:
        raise ValueError(
            f"target_modules={config.target_modules!r} includes {refused[0]!r}, where an adapter can't work: "
            f"{problems[refused[0]]}. Leave it out with exclude_modules, or name others of the linear layers: "
            f"{shorten(name for name in linears if name not in problems)}"
        )
    chosen = [name for name in chosen if name not in refused]
    if not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} leaves no module for an adapter; linear layers of the model: "
            f"{shorten(linears)}{''.join(f'; {reason}' for reason in dict.fromkeys(problems.values()))}"
        )
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, argument):
            if not any(pattern_matches(pattern, name) for name in chosen):
                raise ValueError(f"{argument}: {pattern!r} matches none of the adapted modules: {shorten(chosen)}")
    adapters = {
        name: (
            from_pattern(config.rank_pattern, name, config.r),
            from_pattern(config.alpha_pattern, name, config.lora_alpha),
        )
        for name in chosen
    }
    return Plan(adapters, saved, problems, frozen)


def _is_target(head: str, targets: str | Sequence[str], modules: Iterable[str]) -> bool:
    """Whether the targets name this head or modules in it, as "classifier.0" does. "dense" alone names no head, though
    one may have a layer of that name."""
    if targets == ALL_LINEAR:
        return False
    mentioned = re.search(rf"\b{re.escape(head)}\b", targets if isinstance(targets, str) else " ".join(targets))
    return bool(mentioned) and any(inside(name, [head]) and matches(name, targets) for name in modules)


def _check_names_exist(
    argument: str, names: str | Sequence[str], modules: Mapping[str, nn.Module], linears: Sequence[str]
) -> None:
    if isinstance(names, str):
        return
    for suffix in names:
        if not any(named_by(name, suffix) for name in modules):
            known = {name.rsplit(".", 1)[-1]: None for name in modules} | dict.fromkeys(modules)
            close = difflib.get_close_matches(suffix, known, n=3)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(
                f"{argument}: the model has no module {suffix!r}.{hint} Its linear layers: {shorten(linears)}"
            )


def shorten(names: Iterable[str]) -> str:
    """Module paths as a reader wants them: layers.0 to layers.31 once, as layers.*."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)) or "none"


def inside(name: str, outer: Iterable[str]) -> bool:
    """Whether the module path `name` is one of `outer` or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in outer)


def _heads(model: nn.Module) -> list[str]:
    getter = getattr(model, "get_output_embeddings", None)
    output = unwrapped(getter()) if getter is not None and getter() is not None else None
    heads = [name for name, module in named_modules(model) if output is not None and module is output]
    return heads + [name for name in CLASSIFIERS if isinstance(getattr(model, name, None), nn.Module)]


def is_injected(model: nn.Module) -> bool:
    """Whether the model, or a part of it, carries LoRA adapters."""
    return any(isinstance(module, FusedLoRALinear) for module in model.modules())


def inject(model: nn.Module, config: LoRAConfig, tokenizer: Any = None, from_file: bool = False) -> nn.Module:
    """Puts LoRA adapters into `model`, in place, and freezes everything else but the modules_to_save.

    Each chosen linear layer becomes a FusedLoRALinear that shares its weight and bias; module paths and tied weights
    stay as they were. The config is kept as `model.adapter_config`, and the untrained originals of the modules_to_save
    as `model.lora_originals`. Adapters are float32 whatever the model's dtype.

    from_file: the values come from a file later. Layers that the model never calls get adapters too, frozen and
        without effect; the modules_to_save are taken as they are named; the caller calls `ties.settle(model)`.

    Returns the model. Raises ValueError, with the model unchanged, if it already carries adapters, or if the config
    names a module that isn't there or can't have an adapter. "all-linear" leaves such modules out, with a warning, but
    raises too where another package has quantised or sharded a weight, or accelerate has offloaded it. Hooks on a
    layer, accelerate's too, stay on what replaces it, here and in `merge`.
    """
    given, model = model, bare(model, adding=True)
    planned = plan(model, config, from_file)
    for reason in dict.fromkeys(planned.problems.values()):
        names = [name for name, problem in planned.problems.items() if problem == reason]
        what = "LoRA adapters without effect, which stay frozen" if names[0] in planned.adapters else "no LoRA adapter"
        warn(f"{shorten(names)}: {what}, since {reason}")
    if planned.frozen_heads:
        warn(
            f"{', '.join(planned.frozen_heads)} of {type(model).__name__}: neither trained nor in the adapter's files, "
            "so a head with new weights stays random; modules_to_save names what is trained in full"
        )
    for name, others in _other_places(model, (*planned.adapters, *planned.modules_to_save)).items():
        stays = "it stays as it is and is not trained"
        here = stays if name in planned.adapters else "it is trained with it, which PEFT does not do"
        warn(f"{name}: the same layer is used at {shorten(others)} too, where {here}")
    for parameter in model.parameters():
        # Parameters of lazy layers lack requires_grad_.
        parameter.requires_grad = False
    for name, (r, lora_alpha) in planned.adapters.items():
        linear, how = unwrapped(get_submodule(model, name)), (config.lora_dropout, config.use_rslora, config.init)
        layer = FusedLoRALinear.from_linear(linear, r, lora_alpha, *how, use_dora=config.use_dora)
        if name in planned.problems:
            layer.bypassed = True
            layer.requires_grad_(False)
        replace_module(model, name, layer)
    model.lora_originals = {}
    for name in planned.modules_to_save:
        _train_copy(model, name)
    model.adapter_config = config
    if not from_file:
        settle(model)
    return given


def _other_places(model: nn.Module, names: Collection[str]) -> dict[str, list[str]]:
    """{path: its other paths} of those modules in `names` that the model has in several places, but for other names."""
    places = defaultdict(list)
    for path, parent in named_modules(model):
        for child, module in parent._modules.items():
            places[id(module)].append(f"{path}.{child}".lstrip("."))
    found = {name: [p for p in places[id(get_submodule(model, name))] if p not in names] for name in names}
    return {name: others for name, others in found.items() if others}


def _train_copy(model: Model, name: str) -> None:
    original = model.lora_originals[name] = get_submodule(model, name)
    inner = unwrapped(original)
    replace_module(model, name, copy.deepcopy(inner, shared_hooks(inner)).requires_grad_(True))


def train_in_full(model: nn.Module, name: str) -> None:
    """Makes the module at the path `name`, which has no adapter, one of the modules_to_save of an injected model."""
    model = bare(model, adding=True)
    _train_copy(model, name)
    model.adapter_config = replace(model.adapter_config, modules_to_save=tuple(model.lora_originals))


def lora_modules(model: nn.Module) -> Iterator[tuple[str, FusedLoRALinear]]:
    """(path, module) of each FusedLoRALinear in use in the model, those of other named adapters left out."""
    for name, module in named_modules(model):
        if isinstance(module, FusedLoRALinear) and not name.startswith("parked_adapters."):
            yield name, module


@dataclass(frozen=True)
class MergeCost:
    """What quantising merged weights to NF4 cost, over the layers whose adapter changes anything.

    With W' = W + Δ the merged weight in float32 and Q(W') its NF4 value, where Δ = scaling · lora_b · lora_a without
    DoRA:

    Attributes:
        error: ‖Q(W') - W'‖ / ‖W'‖ of each layer.
        survival: ⟨Q(W') - W, Δ⟩ / ⟨Δ, Δ⟩ of each layer: 1 where all of the update is left, 0 where it was rounded away.
    """

    error: Mapping[str, float]
    survival: Mapping[str, float]

    def __str__(self) -> str:
        if not self.error:
            return "rounding to NF4: no adapter changes its layer"
        errors, survivals = self.error.values(), self.survival.values()
        worst_error = max(self.error, key=self.error.__getitem__)
        worst_survival = min(self.survival, key=self.survival.__getitem__)
        return (
            f"rounding to NF4 moved the merged weights by {sum(errors) / len(errors):.2%} on average, at most "
            f"{max(errors):.2%} ({worst_error}); of the update {sum(survivals) / len(survivals):.1%} is left on "
            f"average, at least {min(survivals):.1%} ({worst_survival})"
        )


def merge(model: nn.Module, quantize: str | None = None) -> nn.Module:
    """Merges the adapters into the weights, in place, and makes every FusedLoRALinear a plain layer again.

    Of several named adapters, the one in use is merged and the others are dropped.

    W + scaling · lora_b · lora_a, with DoRA's magnitudes where there are, is made in float32 and rounded once to the
    weight's dtype. An adapter on a layer that the model never calls has no effect, and none after merging. The trained
    modules_to_save stay. Where that leaves tied weights unequal, they become parameters of their own and the config
    says so, for save_pretrained to write each of them. What comes back is a plain model, for that or for
    inference; its parameters remain frozen (`model.requires_grad_(True)` to train them).

    NF4 weights, those without an adapter too, are dequantised: the merged model is dense. With quantize="nf4" they stay
    in NF4 instead, and each adapted layer's sum is quantised anew, as its weight was (in blocks of 64 where that was
    dense). `model.merge_cost`, a MergeCost, then says what that rounding cost; print it. An update that is small beside
    the gaps between NF4's values is mostly lost.

    Returns the model. Raises ValueError if it carries no adapters, or, with the model unchanged, if a merged weight is
    not finite, if, with quantize, a layer is a Conv1D, or if transformers before 5 would tie a T5's weights again.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize is {quantize!r}; allowed: None, 'nf4'")
    given, model = model, bare(model)
    layers = dict(lora_modules(model))
    if not layers:
        raise ValueError("model carries no LoRA adapters; nothing to merge")
    for name, layer in layers.items():
        if layer.bypassed:
            continue
        try:
            layer.merged_weight()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if quantize and layer.fan_in_fan_out:
            raise ValueError(f"{name} is a Conv1D; quantize='nf4' takes torch.nn.Linear only")
    tied = tied_weights(model)
    together = [names for names in tied if names not in untied(model, tied)]
    check_untying(model, tied, [name for name, layer in layers.items() if not layer.bypassed])
    errors, survivals = {}, {}
    for name in list(layers):
        # pop: the replaced layer's weight is freed before the next one is merged
        layer = layers.pop(name)
        if layer.bypassed:
            linear = layer.base_layer()
        elif quantize:
            linear, cost = _merge_to_nf4(layer)
            if cost is not None:
                errors[name], survivals[name] = cost
        else:
            linear = layer.to_linear()
        replace_module(model, name, linear)
    if quantize:
        model.merge_cost = MergeCost(errors, survivals)
    else:
        for name, module in list(named_modules(model)):
            if isinstance(module, NF4Linear):
                replace_module(model, name, module.to_linear())
    model.requires_grad_(False)
    for attribute in ("adapter_config", "lora_originals", "parked_adapters", "adapter_name", "save_pretrained"):
        model.__dict__.pop(attribute, None)
    note_untied(model, together)
    if untied(model, tied) and hasattr(model, "config"):
        split(model, tied)
    return given


def _merge_to_nf4(layer: FusedLoRALinear) -> tuple[NF4Linear, tuple[float, float] | None]:
    """The layer merged in NF4, and (error, survival) of MergeCost unless its update is nothing but rounding."""
    if layer.merged:
        layer.unmerge()
    base, merged = layer.merged_float()
    update = merged - base
    how = (layer.weight.block_size, layer.weight.double_quant) if isinstance(layer.weight, NF4Weight) else ()
    weight = quantize_nf4(merged, *how)
    rounded = weight.dequantize()
    weight.dtype = layer.weight.dtype
    linear = NF4Linear(weight, layer.bias).train(layer.training)
    if update.norm() <= 1e-6 * base.norm():
        return linear, None
    error = ((rounded - merged).norm() / merged.norm()).item()
    return linear, (error, (((rounded - base) * update).sum() / update.square().sum()).item())


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the `with` block the model is the base model: no adapters, the original modules_to_save. Nests.

    Serves as the reference policy of DPO and PPO without a second copy of the weights.
    """
    given, model = model, bare(model)
    layers = [(layer, layer.adapters_enabled) for _, layer in lora_modules(model)]
    originals: Mapping[str, nn.Module] = getattr(model, "lora_originals", {})
    trained = {name: get_submodule(model, name) for name in originals}
    try:
        for layer, _ in layers:
            layer.adapters_enabled = False
        for name, original in originals.items():
            # The originals aren't submodules, so a model.to() after inject hasn't reached them.
            like = next(trained[name].parameters())
            replace_module(model, name, original.to(device=like.device, dtype=like.dtype))
        yield given
    finally:
        for layer, enabled in layers:
            layer.adapters_enabled = enabled
        for name, module in trained.items():
            replace_module(model, name, module)


@dataclass(frozen=True)
class TrainableSummary:
    """Numbers of parameters, each tied one counted once, 4-bit ones too, of the modules with an adapter, and the paths
    of those that are trained in full beside it."""

    trainable: int
    total: int
    adapted_modules: int
    modules_to_save: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        adapted = f"; {self.adapted_modules} modules with an adapter" if self.adapted_modules else ""
        in_full = f"; trained in full: {', '.join(self.modules_to_save)}" if self.modules_to_save else ""
        return f"trainable parameters: {self.trainable:,} of {self.total:,} ({share:.2f} %){adapted}{in_full}"


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """How many of the model's parameters are trainable; print it."""
    parameters: Collection[nn.Parameter] = list(model.parameters())
    return TrainableSummary(
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        total=sum(parameter.numel() for parameter in parameters)
        + sum(module.shape.numel() for module in model.modules() if isinstance(module, NF4Weight)),
        adapted_modules=sum(1 for _ in lora_modules(model)),
        modules_to_save=tuple(getattr(unwrapped(model), "lora_originals", ())),
    )
