"""PEFT's LoRA layers on our kernels: the layers of a model change their class, and nothing else.

A layer's new class is a subclass of the one that it had, with another `forward`. What our ops can't compute goes to
PEFT's own forward.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.adalora import layer as adalora
from peft.tuners.lora import dora
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_kernels.backends import is_memory, unwatched
from lora_kernels.integrations.bitsandbytes import in_place, is_linear4bit, not_nf4
from lora_kernels.models.fuse import fuse_decoder, unfuse_decoder
from lora_kernels.nn.dora import row_norms, row_squares
from lora_kernels.nn.lora_linear import AdaptedLayer, is_conv1d, not_linear
from lora_kernels.ops.frozen_linear import frozen_linear
from lora_kernels.ops.layers import autocast_dtype
from lora_kernels.ops.lora_linear import lora_linear_group
from lora_kernels.ops.nf4 import NF4Weight
from lora_kernels.types import Layers, Projection

# Variants that are computed as LoRA is, but for the magnitude of DoRA.
_VARIANTS = ("DoraLinearVariant", "MiCALinearVariant")
# Of an adapter, beside DoRA's magnitude.
_PARTS = ("lora_A", "lora_B", "lora_dropout")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What a fused layer keeps beside PEFT's attributes; made for its tensors as they are.
_PREPARED = ("_kept", "_plan", "_nf4", "_squares")
_OWN = ("group", "_checked", *_PREPARED)


@dataclass(frozen=True)
class FuseReport:
    """What `fuse_peft` has done to a model.

    fused: the paths of the layers that run on our kernels now.
    left: {path: why} of PEFT's layers that are as they were, and of fused layers one of whose adapters, named in the
        reason, runs PEFT's own forward.
    decoder: how many modules `fuse_decoder` has changed.
    """

    fused: list[str]
    left: dict[str, str]
    decoder: int = 0

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} LoRA layers fused"]
        if self.decoder:
            lines.append(f"{self.decoder} modules of the decoder fused")
        paths: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            paths.setdefault(reason, []).append(path)
        for reason, (first, *others) in paths.items():
            more = f" and {len(others)} more" if others else ""
            lines.append(f"PEFT's own forward for {first}{more}: {reason}")
        return "\n".join(lines)


def fuse_peft(model: nn.Module, strict: bool = False, decoder: bool = False) -> FuseReport:
    """Compute the LoRA and AdaLoRA layers of a PEFT model by `lora_linear`. The model is changed in place.

    PEFT's linear layers change their class, to a subclass of the one that they had. Parameters, names, files and PEFT's
    functions stay what they are: saving, merging, switching, adding and deleting adapters, hotswapping, copying and
    pickling. Taken are layers over nn.Linear, transformers' Conv1D and bitsandbytes' NF4 layers, whose packed weights
    are read where they are, double-quantised or not; with rsLoRA, DoRA, MiCA, `lora_bias`, patterns of ranks and
    alphas, several active adapters of the same dropout, and batches of mixed `adapter_names`.

    Whatever else a layer is given, now or later, goes to PEFT's own forward: weights in other formats (FP4, int8,
    GPTQ), the other variants of LoRA, further arguments, dtypes that don't fit, and hooks on the parts of a layer. The
    report names the layers and adapters for which that is so now.

    Dropout comes from torch's generator with PEFT's probability, but in other draws. Several active adapters of a layer
    drop the same elements. With DoRA only the low-rank branch has dropout; PEFT's forward also applies it to
    (magnitude / norm - 1) · x Wᵀ.

    Second derivatives are refused; so is work in place on the result of a layer with DoRA, which its gradient reads.
    DoRA's norm of the frozen weight is kept until the weight is merged, moved or changed in a way that torch counts,
    which `.data` is not.

    Args:
        model: a PeftModel, or any module that PEFT's layers are in. Call it again once adapters were added to further
            layers; twice does no harm.
        strict: raise instead of leaving a layer or an adapter to PEFT's forward.
        decoder: apply `fuse_decoder` to the model inside too: one call, with one dropout, for query, key and value, and
            for gate and up.

    Raises ValueError if the model has no layer of PEFT's LoRA or AdaLoRA; and with `strict` if a layer or one of its
    adapters can't be taken, before anything is changed.
    """
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    if not any(isinstance(layer, lora.LoraLayer) for layer in found.values()):
        raise ValueError(f"model ({type(model).__name__}) has no LoRA layer of PEFT; allowed: one that has")
    left = {path: reason for path, layer in found.items() if (reason := _layer_refusal(layer))}
    fused = {path: layer for path, layer in found.items() if path not in left}
    for path, layer in fused.items():
        names = list(layer.lora_A.keys())
        reasons = [f"adapter {name}: {why}" for name in names if (why := _adapter_refusal(layer, name))]
        if not reasons and (together := _refusal_together(layer, [n for n in layer.active_adapters if n in names])):
            reasons = [together]
        if reasons:
            left[path] = "; ".join(reasons)
    if strict and left:
        raise ValueError(f"strict is True, and model has layers that can't be fused\n{FuseReport([], left)}")
    for layer in fused.values():
        layer.__class__ = _FUSED.get(type(layer), type(layer))
        layer._base()
    count = fuse_decoder(getattr(model, "get_base_model", lambda: model)()) if decoder else 0
    return FuseReport(list(fused), left, count)


def unfuse_peft(model: nn.Module) -> None:
    """Undoes `fuse_peft`: the layers have PEFT's classes again, and the decoder's modules their own forwards."""
    plain = {fused: kind for kind, fused in _FUSED.items()}
    for layer in model.modules():
        if (kind := plain.get(type(layer))) is not None:
            layer.__class__ = kind
            for name in _OWN:
                layer.__dict__.pop(name, None)
    unfuse_decoder(model)


def _layer_refusal(layer: BaseTunerLayer) -> str | None:
    """Why no adapter of this layer can be taken."""
    kind = type(layer)
    if kind not in _FUSED and kind not in _FUSED.values():
        return f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__qualname__} is none of the layers that we know"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    return _base_refusal(layer.base_layer)


def _base_refusal(base: nn.Module) -> str | None:
    reason = not_nf4(base) if is_linear4bit(base) else not_linear(base)
    return reason or ("its base layer has hooks" if _is_hooked(base) else None)


def _adapter_refusal(layer: lora.LoraLayer, name: str) -> str | None:
    """Why this adapter of a layer can't be taken."""
    # Not layer.lora_A: nn.Module's __getattr__ would take longer than all of this.
    modules = layer._modules
    dropout, magnitude = modules["lora_dropout"]._modules[name], modules["lora_magnitude_vector"]._modules.get(name)
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant).__name__ not in _VARIANTS:
        return f"{type(variant).__name__} computes something else than LoRA"
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p >= 1):
        return f"its dropout is {dropout!r}"
    if not layer.r[name]:
        return "its rank is 0"
    parts: list[nn.Module] = [dropout]
    if magnitude is not None:
        if type(magnitude) is not dora.DoraLinearLayer or layer.ephemeral_gpu_offload:
            return f"its magnitude is a {type(magnitude).__name__}, or offloaded"
        parts.append(magnitude)
    if not isinstance(layer, adalora.AdaLoraLayer):
        for factor in ("lora_A", "lora_B"):
            part = modules[factor]._modules[name]
            if type(part) is not nn.Linear or "weight" not in part._parameters:
                return f"its {factor} is a {type(part).__name__}"
            parts.append(part)
    return "a part of it has hooks" if any(map(_is_hooked, parts)) else None


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module is more than the forward of its class."""
    own = module.__dict__
    return any([own[name] for name in _HOOKS]) or "forward" in own


def _refusal_together(layer: lora.LoraLayer, names: Sequence[str]) -> str | None:
    """Why these adapters of a layer can't be active at the same time."""
    if len(names) < 2:
        return None
    if any(name in layer.lora_magnitude_vector for name in names):
        return f"adapters {', '.join(names)} are active together, and one has DoRA"
    if len({_dropout_p(layer, name) for name in names}) > 1:
        return f"adapters {', '.join(names)} are active together, with different dropouts"
    return None


def _dropout_p(layer: lora.LoraLayer, name: str) -> float:
    dropout = layer._modules["lora_dropout"]._modules[name]
    return dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0


def _detached(weight: Tensor | NF4Weight) -> Tensor | NF4Weight:
    return weight.detach() if isinstance(weight, Tensor) else weight


class _Checked(NamedTuple):
    """A base layer that our ops were found to take, its class, and whether it is bitsandbytes'."""

    base: Any = None
    kind: Any = None
    is_4bit: bool = False


class _Plan(NamedTuple):
    """What was found to hold for the adapter that is in use alone, and has nothing but two factors.

    active: the layer's active adapters. modules: the base layer, the factors and the dropout. hooks: theirs, all empty.
    """

    active: str | list[str]
    name: str
    kind: Any
    modules: tuple[Any, ...]
    hooks: list[dict[int, Any]]


class _Fused(AdaptedLayer, lora.LoraLayer):
    """The forward of PEFT's LoRA layers by our ops; a base before PEFT's class.

    Where all is as at the last call, which `kept_layers` looks at, what was prepared then is taken. Else `anew` asks
    whether our ops take the call.
    """

    _checked = _Checked()
    _plan: _Plan | None = None
    _nf4: NF4Weight | None = None
    _squares: tuple[tuple, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return self._with_arguments(x, *args, **kwargs)
        group = self.group
        if group is not None and group.thread == threading.get_ident():
            return group(self, x)
        return self.together((self,), x)[0]

    def kept_layers(self, x: Tensor) -> Layers | None:
        """What was prepared for such an x. None where something has changed since, or is made anew for each call."""
        # Not self.lora_A: nn.Module's __getattr__ would take longer than all of this.
        own, plan = self.__dict__, self._plan
        if plan is None or own["_disable_adapters"] or own["merged_adapters"] or own["_active_adapter"] != plan.active:
            return None
        modules, name, parts = own["_modules"], plan.name, plan.modules
        factors = [modules[key]._modules.get(name) for key in _PARTS]
        if (modules["base_layer"], *factors) != parts or type(parts[0]) is not plan.kind or any(plan.hooks):
            return None
        if any(["forward" in part.__dict__ for part in parts]) or parts[-1].__dict__.get("p", 0.0) >= 1:
            return None
        return self._still(self._own(parts), x, own["scaling"][name])

    def anew(self, layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
        names = [layer._in_use() for layer in layers]
        if not all([layer._takes(x, own) for layer, own in zip(layers, names, strict=True)]):
            return [super(_Fused, layer).forward(x) for layer in layers]
        if not names[0]:
            return [self._computed(x, [])]
        # Each layer sees to its own bias; their terms agree, and so do the dtypes.
        cast, *_ = [layer._cast(x) for layer in layers]
        kept = [layer._prepared(cast, own) for layer, own in zip(layers, names, strict=True)]
        ys = super().anew(layers, cast) if None in kept else self._project(kept, cast)
        return [layer._finished(y, x, own) for layer, y, own in zip(layers, ys, names, strict=True)]

    def _prepared(self, x: Tensor, names: Sequence[str]) -> Layers | None:
        """The layer with these adapters for x, which `kept_layers` has from now on where it can be kept."""
        if autocast_dtype(x) is not None or not unwatched(x) or len(names) > 1:
            return None
        # So it is where x was cast.
        if (kept := self.kept_layers(x)) is not None:
            return kept
        (name,), modules = names, self._modules
        has_more = name in modules["lora_magnitude_vector"]._modules or self._lora_bias(name) is not None
        if has_more or self._diagonal(name) is not None or isinstance(self.scaling[name], Tensor):
            return None
        parts: tuple[Any, ...] = (modules["base_layer"], *(modules[key]._modules[name] for key in _PARTS))
        hooks = [part.__dict__[key] for part in parts for key in _HOOKS]
        active = self._active_adapter if isinstance(self._active_adapter, str) else list(self._active_adapter)
        self.__dict__["_plan"] = _Plan(active, name, type(parts[0]), parts, hooks)
        return self._keep(self._own(parts), x)

    def _own(self, parts: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        """The tensors of a plan's modules."""
        base, lora_a, lora_b, _ = parts
        frozen = self._weight().parts if self._checked.is_4bit else (base._parameters.get("weight"),)
        return *frozen, lora_a._parameters["weight"], lora_b._parameters["weight"], base._parameters["bias"]

    def _with_arguments(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of a batch of mixed adapters; by PEFT's own forward where other arguments are given."""
        rows: Sequence[str] = kwargs.get("adapter_names") or []
        mixed = not args and kwargs.keys() == {"adapter_names"} and rows
        if not mixed or self.disable_adapters or isinstance(self, adalora.AdaLoraLayer):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, **kwargs)
        # A name that isn't of this layer, as "__base__", stands for no adapter.
        names = {row: [row] if row in self.lora_A else [] for row in rows}
        if not all([self._takes(x, own) for own in names.values()]):
            return super().forward(x, **kwargs)
        places = {row: [i for i, each in enumerate(rows) if each == row] for row in names}
        ys = [self._computed(x[place], names[row]) for row, place in places.items()]
        order = torch.tensor([i for place in places.values() for i in place], device=x.device).argsort()
        return torch.cat(ys).index_select(0, order)

    def _computed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """y with these adapters, or with none, of which nothing is kept."""
        if names:
            y = lora_linear_group(self._cast(x), [self._projection(names)], _dropout_p(self, names[0]))[0]
        elif self._checked.is_4bit:
            y = frozen_linear(self._cast(x), self._weight(), self.base_layer.bias)
        else:
            return self.base_layer(x)
        return self._finished(y, x, names)

    def _in_use(self) -> list[str]:
        """The adapters whose update the next call adds."""
        if self._disable_adapters or self.merged_adapters:
            return []
        active, held = self._active_adapter, self._modules["lora_A"]
        return [name for name in ([active] if isinstance(active, str) else active) if name in held]

    def _base(self) -> Any:
        """The frozen layer; None where our ops don't take it."""
        base, checked = self._modules["base_layer"], self._checked
        if checked.base is not base or checked.kind is not type(base) or "weight" not in base._parameters:
            if _base_refusal(base) is not None:
                return None
            self.__dict__["_checked"] = _Checked(base, type(base), is_linear4bit(base))
        return None if _is_hooked(base) else base

    def _takes(self, x: Tensor, names: Sequence[str]) -> bool:
        """Whether our ops compute this layer with these adapters, or with none, for x."""
        base = self._base()
        # Adapters that are merged and disabled are unmerged first.
        if base is None or (self._disable_adapters and self.merged_adapters):
            return False
        if any([_adapter_refusal(self, name) for name in names]) or _refusal_together(self, names):
            return False
        cast, weight = autocast_dtype(x), base._parameters["weight"]
        dtype = cast or self._compute_dtype(x)
        if self._checked.is_4bit:
            # FSDP replaces it by a parameter without one.
            if getattr(weight, "quant_state", None) is None:
                return False
        elif names and cast is None and weight.dtype != dtype:
            return False
        adapter = [t.dtype for name in names for t in self._factors(name)]
        return all([each in (dtype, torch.float32) or (cast is not None and each.itemsize == 2) for each in adapter])

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """That to which the base layer casts x: bitsandbytes' have a setting for it."""
        base, _, is_4bit = self._checked
        return (base.compute_dtype if is_4bit else None) or x.dtype

    def _cast(self, x: Tensor) -> Tensor:
        base, _, is_4bit = self._checked
        if not is_4bit:
            return x
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        x = x.to(self._compute_dtype(x))
        bias = base._parameters["bias"]
        if bias is not None and bias.dtype != x.dtype:
            # As bitsandbytes does it.
            bias.data = bias.data.to(x.dtype)
        return x

    def _finished(self, y: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        """y with the biases of these adapters, in the dtype in which the base layer gives it."""
        for name in names:
            bias = self._lora_bias(name)
            if bias is not None:
                y = (y + self.scaling[name] * bias).to(y.dtype)
        return y.to(x.dtype) if self._checked.is_4bit else y

    def _weight(self) -> Any:
        """The frozen weight [N, K], where it lies."""
        base, _, is_4bit = self._checked
        if is_4bit:
            self.__dict__["_nf4"] = weight = in_place(base, self._nf4)
            return weight
        return base._parameters["weight"].t() if is_conv1d(base) else base._parameters["weight"]

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """lora_a [R, K] and lora_b [N, R]."""
        modules = self._modules
        lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return lora_a._parameters["weight"], lora_b._parameters["weight"]

    def _diagonal(self, name: str) -> Tensor | None:
        """What stands between the factors."""
        return None

    def _lora_bias(self, name: str) -> Tensor | None:
        return self._modules["lora_B"]._modules[name]._parameters["bias"]

    def projection(self) -> Projection:
        return self._projection(self._in_use())

    def _projection(self, names: Sequence[str]) -> Projection:
        weight, scalings = self._weight(), [self.scaling[name] for name in names]
        factors = [self._factors(name) for name in names]
        diagonals = [each for each in map(self._diagonal, names) if each is not None]
        if len(names) == 1 and not isinstance(scalings[0], Tensor):
            (lora_a, lora_b), scaling = factors[0], float(scalings[0])
        else:
            # Adapters side by side are one. So is one whose scaling PEFT has made a tensor.
            lora_a = torch.cat([a for a, _ in factors])
            lora_b = torch.cat([each * b for each, (_, b) in zip(scalings, factors, strict=True)], 1)
            scaling = 1.0
        lora_e = torch.cat(diagonals) if diagonals else None
        column_scale = None
        magnitude = self.lora_magnitude_vector._modules.get(names[0])
        if magnitude is not None:
            norms = row_norms(_detached(weight), self._row_squares(weight), lora_a, lora_b, scaling)
            column_scale = magnitude.weight / norms
        return Projection(weight, lora_a, lora_b, scaling, self.base_layer.bias, lora_e, column_scale)

    def _row_squares(self, weight: Tensor | NF4Weight) -> Tensor:
        """‖W‖² of each row for DoRA; kept until W is another one, or was changed in a way that torch counts."""
        tensor = weight if isinstance(weight, Tensor) else weight.parts[0]
        if torch.compiler.is_compiling() or tensor.is_inference() or not is_memory(tensor):
            return row_squares(_detached(weight))
        state = tensor.data_ptr(), tensor._version
        if self._squares is None or self._squares[0] != state:
            with torch.inference_mode(False):
                self.__dict__["_squares"] = state, row_squares(_detached(weight))
        return self.__dict__["_squares"][1]

    def group_terms(self) -> Hashable | None:
        names, modules = self._in_use(), self._modules
        if not names or modules["lora_magnitude_vector"]._modules:
            return None
        return self.in_features, _dropout_p(self, names[0]), modules["base_layer"].__dict__.get("compute_dtype")

    @property
    def dropout_p(self) -> float:
        return _dropout_p(self, self._in_use()[0])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | dict.fromkeys(_PREPARED)

    # What was prepared holds tensors that these replace, or change in a way that torch doesn't count.

    def merge(self, *args: Any, **kwargs: Any) -> None:
        super().merge(*args, **kwargs)
        self.__dict__.update(dict.fromkeys(_PREPARED))

    def unmerge(self) -> None:
        super().unmerge()
        self.__dict__.update(dict.fromkeys(_PREPARED))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.__dict__.update(dict.fromkeys(_PREPARED))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.update(dict.fromkeys(_PREPARED))
        return super()._apply(*args, **kwargs)


class _FusedAdaLoRA(_Fused):
    """That of AdaLoRA's layers, whose adapters are parameters, with lora_E / ranknum between the factors."""

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name], self.lora_B[name]

    def _diagonal(self, name: str) -> Tensor:
        return (self.lora_E[name] / (self.ranknum[name] + 1e-5)).flatten()

    def _lora_bias(self, name: str) -> None:
        return None


# Classes of the names that they had: of those, and of subclasses, packages ask by isinstance, and some by name.
class Linear(_Fused, lora.Linear):
    """PEFT's LoRA over nn.Linear or Conv1D, on our ops."""


class SVDLinear(_FusedAdaLoRA, adalora.SVDLinear):
    """PEFT's AdaLoRA over nn.Linear or Conv1D, on our ops."""


_FUSED: dict[Any, Any] = {lora.Linear: Linear, adalora.SVDLinear: SVDLinear}

if is_bnb_4bit_available():
    from peft.tuners.adalora import bnb as adalora_bnb
    from peft.tuners.lora import bnb as lora_bnb

    class Linear4bit(_Fused, lora_bnb.Linear4bit):
        """PEFT's LoRA over bitsandbytes' 4-bit layers, on our ops."""

    class SVDLinear4bit(_FusedAdaLoRA, adalora_bnb.SVDLinear4bit):
        """PEFT's AdaLoRA over bitsandbytes' 4-bit layers, on our ops."""

    _FUSED |= {lora_bnb.Linear4bit: Linear4bit, adalora_bnb.SVDLinear4bit: SVDLinear4bit}
