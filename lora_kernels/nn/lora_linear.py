"""FusedLoRALinear: a frozen linear layer with a trainable low-rank update, on the fused lora_linear op."""

from __future__ import annotations

import copy
import math
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from lora_kernels import backends
from lora_kernels.checks import check_integer, check_number
from lora_kernels.nn.dora import norm_dtype, row_norms, row_squares
from lora_kernels.nn.nf4_linear import NF4Linear
from lora_kernels.ops.frozen_linear import frozen_linear
from lora_kernels.ops.layers import autocast_dtype, prepare
from lora_kernels.ops.lora_linear import lora_linear_group, project
from lora_kernels.ops.nf4 import NF4Weight, load_packed, quantize_nf4
from lora_kernels.ops.recompute import version_of
from lora_kernels.sharded import is_sharded, whole
from lora_kernels.types import Layers, Projection

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# No quantised weight is kept in one of these.
_UNPACKED_DTYPES = (*WEIGHT_DTYPES, torch.complex64, torch.complex128, torch.bool, torch.int64)
INITS = ("default", "gaussian", "both_gaussian", "both_zero", "b_gaussian")
# Along which dimension of the adapter's tensors the rank runs.
RANK_DIMENSION = {"lora_a": 0, "lora_b": 1, "lora_e": 0}
# Those beside the weight, which may be a module.
_PARAMETERS = ("lora_a", "lora_b", "lora_e", "bias", "lora_magnitude")


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D, a linear layer whose weight is stored [K, N] (GPT-2)."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and type(module) is pytorch_utils.Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether module is one that FusedLoRALinear can stand on; see `not_linear`."""
    return not_linear(module) is None


def not_linear(module: Any) -> str | None:
    """Why FusedLoRALinear can't stand on module; None for nn.Linear, NF4Linear and transformers' Conv1D.

    So for a subclass of nn.Linear that computes the same, as Falcon's does, and has nothing but a weight and a bias.
    """
    kind = type(module)
    plain = kind in (nn.Linear, NF4Linear) or is_conv1d(module)
    if not plain and not isinstance(module, nn.Linear):
        return f"a {kind.__qualname__} is no linear layer"
    if found := foreign_weight(module):
        return found
    names = {*module._parameters, *module._buffers, *module._modules}
    own = ", ".join(sorted(name for name in names - {"weight", "bias"} if getattr(module, name) is not None))
    if "weight" not in names:
        return (
            f"the weight of this {kind.__qualname__} is made anew for every call from {own}; end its pruning, weight "
            "norm or parametrization first"
        )
    if own:
        return f"a {kind.__qualname__} has {own} beside its weight and bias"
    if is_lazy(module.weight):
        return f"the weight of a {kind.__qualname__} has no shape before its first call"
    forward, which = kind.forward, "a"
    # The one that accelerate puts there is carried over with its hook.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        forward, which = getattr(module.forward, "__func__", None), "this"
    if forward is not (kind if plain else nn.Linear).forward and not _computes_linear(module, forward):
        return f"the forward of {which} {kind.__qualname__} computes something else than that of torch.nn.Linear"
    return None


def has_linear_sizes(module: nn.Module) -> bool:
    """Whether module has in_features and out_features, and its weight in some form: a linear layer, or one like it."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    holds = bool(module._parameters or module._buffers) or callable(getattr(module, "weight", None))
    return holds and all(isinstance(size, int) for size in sizes)


def foreign_weight(module: nn.Module) -> str | None:
    """Says how another package has stored the weight of a linear layer: quantised, sharded or wrapped; else None.

    A layer that is no nn.Linear but has the sizes of one may have any weight that is not quantised or wrapped.
    """
    if not has_linear_sizes(module) or isinstance(module, (NF4Linear, FusedLoRALinear)):
        return None
    linear = isinstance(module, nn.Linear)
    kind, weight = type(module).__qualname__, getattr(module, "weight", None)
    tensors = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    if isinstance(weight, Tensor):
        if is_lazy(weight):
            return None
        if weight.is_nested:
            return f"the weight of this {kind} is a nested tensor"
        # A subclass of Parameter with the values of its base, in a layer that reads them as torch's does, is plain.
        own_kind = type(weight).__torch_dispatch__ if type(module) is nn.Linear else type(weight)
        plain = own_kind in (Tensor.__torch_dispatch__, Tensor, nn.Parameter) or isinstance(weight, FakeTensor)
        known = weight.dtype in WEIGHT_DTYPES and weight.dim() >= 2 if linear else weight.dtype in _UNPACKED_DTYPES
        if plain and known and weight.layout is torch.strided:
            return None
        what = weight.dtype if weight.layout is torch.strided else weight.layout
        return f"the weight of this {kind} is a {type(weight).__qualname__} of {what}, {list(weight.shape)}"
    if linear or callable(weight) or any(tensor.dtype not in _UNPACKED_DTYPES for tensor in tensors.values()):
        return f"this {kind} keeps its weight as {', '.join(tensors) or 'something else than a tensor'}"
    return None


@torch.no_grad()
def _computes_linear(module: nn.Linear, forward: Any) -> bool:
    """Whether this forward of its own is x Wᵀ + bias, by a small layer with the module's other attributes."""
    twin = copy.copy(module)
    draw: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    twin.out_features, twin.in_features = N, K = 3, 5
    x, weight = torch.randn(2, 4, K, **draw, device="cpu"), nn.Parameter(torch.randn(N, K, **draw, device="cpu"))
    bias = None if module.bias is None else nn.Parameter(torch.randn(N, **draw, device="cpu"))
    # In place of the dictionary that the copy shares with the module.
    twin.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    try:
        with torch.random.fork_rng(devices=[]):
            return all(
                torch.allclose(forward(twin.train(training), each), F.linear(each, weight, bias), rtol=1e-9)
                for training in (True, False)
                for each in (x, 1e4 * x)
            )
    except Exception:
        # It takes or gives something else.
        return False


def check_lora_arguments(r: int, lora_alpha: float, lora_dropout: float, init: str) -> None:
    """Raises ValueError naming the argument that is out of range."""
    check_integer("r", r, 1)
    check_number("lora_alpha", lora_alpha, lambda alpha: 0 < alpha < math.inf, "a finite number > 0")
    check_number("lora_dropout", lora_dropout, lambda p: 0 <= p < 1, "0 <= lora_dropout < 1")
    if init not in INITS:
        raise ValueError(f"init is {init!r}; allowed: {', '.join(INITS)}")


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / √r with use_rslora (Kalajdzievski 2023)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class AdaptedLayer:
    """A linear layer with an adapter, which is prepared once for its tensors, and in a group is computed with others.

    A base beside nn.Module. `group` is the one that is open, if any. Subclasses have `projection`, `kept_layers`,
    `group_terms` and `dropout_p`.
    """

    group: ProjectionGroup | None = None
    _kept: Layers | None = None

    def projection(self) -> Projection:
        """The frozen layer and its adapter as `lora_linear_group` takes them."""
        raise NotImplementedError

    def kept_layers(self, x: Tensor) -> Layers | None:
        """The layer as ops take it, checked for x; None where something makes its tensors anew for each call."""
        raise NotImplementedError

    def group_terms(self) -> Hashable | None:
        """What the layers of a group must have in common; None where this one must be computed by itself."""
        raise NotImplementedError

    @property
    def dropout_p(self) -> float:
        """That of the next call: 0 in evaluation."""
        raise NotImplementedError

    def together(self, layers: Sequence[AdaptedLayer], x: Tensor) -> Sequence[Tensor]:
        """y of each of these layers, with equal `group_terms`, of which this is one. Their adapters are in use."""
        if autocast_dtype(x) is None and backends.unwatched(x):
            kept: list[Any] = [layer.kept_layers(x) for layer in layers]
            if None not in kept:
                return self._project(kept, x)
        return self.anew(layers, x)

    def _project(self, kept: list[Layers], x: Tensor) -> Sequence[Tensor]:
        return project(x, kept[0] if len(kept) == 1 else _joined(kept, x), self.dropout_p)

    def anew(self, layers: Sequence[AdaptedLayer], x: Tensor) -> Sequence[Tensor]:
        """`together` where not all of it is kept."""
        return lora_linear_group(x, [layer.projection() for layer in layers], self.dropout_p)

    def _still(self, own: tuple[Tensor | None, ...], x: Tensor, scaling: float) -> Layers | None:
        """What was kept of these tensors, of which the layer is made; None where one has moved or is another one."""
        kept = self._kept
        if kept is not None and kept.projections[0].scaling == scaling and kept.are(own, x):
            return kept
        return None

    def _keep(self, own: tuple[Tensor | None, ...], x: Tensor) -> Layers | None:
        """The layer, prepared and kept; None where it is watched."""
        layers = prepare(x, [self.projection()])
        self.__dict__["_kept"] = layers if layers is not None and layers.keep(own, x) else None
        return layers

    def __getstate__(self) -> dict[str, Any]:
        # What is kept is of these tensors in this process.
        return {**self.__dict__, "_kept": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        # It would hold the tensors that are moved.
        self.__dict__["_kept"] = None
        module: Any = super()
        return module._apply(fn, recurse)


class ProjectionGroup:
    """Layers that are called with the same x, one after the other: the first call computes them all.

    `idle` is set where the result of a layer wasn't fetched: they didn't read the same x after all.
    """

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        self.layers = layers
        self.idle = False
        # Other threads that run the same model meanwhile have nothing to do with it.
        self.thread = threading.get_ident()
        self._waiting: tuple[Tensor | None, int | None, dict[AdaptedLayer, Tensor]] = (None, None, {})

    def __call__(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        source, source_version, results = self._waiting
        version = version_of(x)
        if source is not x or source_version != version or layer not in results:
            self.idle = self.idle or bool(results)
            ys = layer.together(self.layers, x)
            results = dict(zip(self.layers, ys, strict=True))
            self._waiting = (x, version, results)
        return results.pop(layer)

    def close(self) -> None:
        self.idle = self.idle or bool(self._waiting[2])
        for layer in self.layers:
            layer.__dict__["group"] = None


def _joined(kept: list[Layers], x: Tensor) -> Layers:
    """All of them as one, which the first of them keeps."""
    first, *others = kept
    members, joined = first.prepared.get("joined", ((), None))
    if len(members) != len(others) or not all(map(is_, members, others)):
        joined = Layers([layer for each in kept for layer in each])
        joined.keep(tuple(t for each in kept for t in each.own), x)
        first.prepared["joined"] = others, joined
    return joined


def open_group(layers: Sequence[Any]) -> ProjectionGroup | None:
    """A group of these layers, which until it is closed compute each other's results; None where they can't be one.

    They must be AdaptedLayers whose `group_terms` agree, and nothing may wait for a layer's own call, such as a hook
    that fills its weight.
    """
    terms = set()
    for layer in layers:
        if not isinstance(layer, AdaptedLayer) or layer.group is not None:
            return None
        own = layer.__dict__
        if own["_forward_pre_hooks"] or own["_forward_hooks"] or "forward" in own:
            return None
        terms.add(layer.group_terms())
    if None in terms or len(terms) > 1:
        return None
    group = ProjectionGroup(layers)
    for layer in layers:
        # Not layer.group: nn.Module's __setattr__ would take longer than all of this.
        layer.__dict__["group"] = group
    return group


class FusedLoRALinear(AdaptedLayer, nn.Module):
    """A frozen linear layer plus a trainable low-rank update (LoRA, Hu et al. 2021, section 4.1):

        y = x Wᵀ + bias + scaling · (dropout(x) · lora_aᵀ) · lora_bᵀ

    Args:
        in_features: K >= 1.
        out_features: N >= 1.
        r: rank R >= 1.
        lora_alpha: > 0. scaling = lora_alpha / r, or lora_alpha / √r with use_rslora (Kalajdzievski 2023).
        lora_dropout: in [0, 1); applied to x in the low-rank branch, in training mode only.
        bias: whether the frozen layer has a bias.
        use_rslora: see lora_alpha.
        init: how lora_a and lora_b start:

            - "default": lora_a kaiming-uniform with a=√5, that is U(-1/√K, 1/√K); lora_b zero. Training starts at
              the pretrained model. What Microsoft's loralib and PEFT do, and called Init[A] by Hayou et al.
              (2406.08447), who find that it tolerates larger learning rates than "b_gaussian".
            - "gaussian": lora_a normal with standard deviation 1/r (PEFT's "gaussian"), lora_b zero. The distribution
              that Hu et al. describe, whose standard deviation the paper leaves open.
            - "b_gaussian": lora_a zero, lora_b normal with standard deviation 1/√r: Init[B] of Hayou et al. It also
              starts at the pretrained model and trains, on average to a somewhat worse loss.
            - "both_gaussian": lora_a as in "gaussian", lora_b as in "b_gaussian". Trains, but starts away from the
              pretrained model.
            - "both_zero": both zero. Cannot train: each gradient has the other, zero matrix as a factor. For tests,
              and where values are loaded afterwards.
        device, dtype: of weight and bias.
        use_dora: weight-decomposed LoRA (Liu et al. 2024, equation 5): with lora_magnitude m [N], which starts as the
            row norms of W + scaling · lora_b · lora_a,

                y = m / ‖W + scaling · lora_b · lora_a‖ ∘ (x Wᵀ + scaling · (dropout(x) · lora_aᵀ) · lora_bᵀ) + bias

            The norm of each row is a constant to autograd (section 4.3). ‖W‖ is computed once: change `weight` by
            `load_state_dict` only. Without gradients the norms are kept from call to call, until lora_a or lora_b
            changes in a way that torch counts (`.data` is none).
        adapter_dtype: of lora_a and lora_b; torch.float32 by default, whatever the base is, so that small updates are
            not rounded away. The dtype of the weight is the other choice. Over a float64 weight it is float64.

    Attributes: weight [N, K] and bias [N], frozen; lora_a [R, K] and lora_b [N, R], the only parameters that require
    gradients; lora_e, None or the factor [R] of x · lora_aᵀ that AdaLoRA trains; lora_magnitude, None or DoRA's m [N],
    trained too, float32 (float64 over a float64 weight). `adapters_enabled = False` makes the layer the frozen one.
    `bypassed`: whether the model never calls it, so that its adapter is not to be trained. A layer made from
    transformers' Conv1D (`fan_in_fan_out`) keeps that weight's stored shape [K, N]. Input x [..., K], output y
    [..., N].

    In evaluation without gradients, nn.TransformerEncoderLayer and nn.TransformerEncoder read their layers' weights and
    never call them, so that a layer put there by hand has no effect: use `lora_kernels.inject`, which makes them call
    it, or `torch.backends.mha.set_fastpath_enabled(False)`.

    Raises ValueError naming the argument that is out of range.
    """

    weight: Any  # a Parameter or an NF4Weight
    bias: Any  # a Parameter or None
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_e: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    _unmerged_weight: Any
    _weight_squares: Tensor | None
    _eval_norms: tuple[tuple[Any, ...], Tensor] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        init: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed: an integer >= 1")
        check_lora_arguments(r, lora_alpha, lora_dropout, init)
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        how = (r, lora_alpha, lora_dropout, use_rslora, init, adapter_dtype, use_dora)
        self._adopt(linear.weight, linear.bias, False, *how)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "default",
        adapter_dtype: torch.dtype = torch.float32,
        quantize: str | None = None,
        double_quant: bool = False,
        use_dora: bool = False,
    ) -> FusedLoRALinear:
        """A FusedLoRALinear over the very weight and bias of `linear` (nn.Linear, NF4Linear or transformers' Conv1D).

        A subclass of nn.Linear is taken where it computes the same, see `not_linear`. The parameters are shared, not
        copied, and stop requiring gradients. With quantize="nf4" the layer holds an NF4 copy of the weight instead, in
        blocks of 64 (QLoRA; `double_quant` as in `quantize_nf4`). Other arguments as for the class. Raises TypeError
        for another module, ValueError for a bad argument.
        """
        if problem := not_linear(linear):
            raise TypeError(f"linear: {problem}; allowed: torch.nn.Linear, NF4Linear, transformers' Conv1D")
        check_lora_arguments(r, lora_alpha, lora_dropout, init)
        if quantize not in (None, "nf4"):
            raise ValueError(f"quantize is {quantize!r}; allowed: None, 'nf4'")
        if quantize is not None and is_conv1d(linear):
            raise TypeError("linear is a Conv1D; quantize='nf4' takes torch.nn.Linear only")
        weight: Any = linear.weight
        bias: Any = linear.bias
        if quantize is not None and not isinstance(weight, NF4Weight):
            weight = quantize_nf4(weight.detach(), double_quant=double_quant)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        how = (r, lora_alpha, lora_dropout, use_rslora, init, adapter_dtype, use_dora)
        layer._adopt(weight, bias, is_conv1d(linear), *how)
        return layer.train(linear.training)

    def _adopt(
        self,
        weight: Tensor | NF4Weight,
        bias: Tensor | None,
        fan_in_fan_out: bool,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init: str,
        adapter_dtype: torch.dtype,
        use_dora: bool,
    ) -> None:
        if not weight.dtype.is_floating_point:
            raise ValueError(f"linear.weight has dtype {weight.dtype}; allowed: a floating-point dtype")
        adapter_dtype = torch.float64 if weight.dtype == torch.float64 else adapter_dtype
        if adapter_dtype not in (torch.float32, weight.dtype):
            raise ValueError(f"adapter_dtype is {adapter_dtype}; allowed: torch.float32 or {weight.dtype}")
        self.fan_in_fan_out = fan_in_fan_out
        self.out_features, self.in_features = weight.shape[::-1] if fan_in_fan_out else weight.shape
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = float(lora_dropout)
        self.use_rslora = bool(use_rslora)
        self.scaling = lora_scaling(r, lora_alpha, use_rslora)
        self.adapters_enabled = True
        self.bypassed = False
        # Holds the frozen weight while a merged one stands in its place. In __dict__, so that it is not registered as
        # a parameter: it must not show up in state_dict or parameters() under a second name.
        self.__dict__["_unmerged_weight"] = None
        self.weight = weight.requires_grad_(False)  # NF4Weight has no parameters, so this says the same of both
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = bias.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(r, self.in_features, dtype=adapter_dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, r, dtype=adapter_dtype, device=weight.device))
        self.register_parameter("lora_e", None)
        self.register_parameter("lora_magnitude", None)
        self.register_buffer("_weight_squares", None, persistent=False)
        if use_dora:
            magnitude = torch.empty(self.out_features, dtype=norm_dtype(weight), device=weight.device)
            self.lora_magnitude = nn.Parameter(magnitude)
            self._weight_was_set()
        self.reset_lora_parameters(init)

    @torch.no_grad()
    def reset_lora_parameters(self, init: str = "default") -> None:
        """Draws lora_a and lora_b anew, and sets lora_magnitude to the norms; `init` as described for the class."""
        if init not in INITS:
            raise ValueError(f"init is {init!r}; allowed: {', '.join(INITS)}")
        if init == "default":
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        elif init in ("gaussian", "both_gaussian"):
            nn.init.normal_(self.lora_a, std=1 / self.r)
        else:
            nn.init.zeros_(self.lora_a)
        if init in ("b_gaussian", "both_gaussian"):
            nn.init.normal_(self.lora_b, std=1 / math.sqrt(self.r))
        else:
            nn.init.zeros_(self.lora_b)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self._norms())

    def _base(self) -> Tensor | NF4Weight:
        """The frozen weight as [N, K], merged or not."""
        weight = self._unmerged_weight if self.merged else self.weight
        return weight.t() if self.fan_in_fan_out else weight

    def _weight_was_set(self) -> Tensor:
        """Makes, keeps and returns ‖W‖² of each row."""
        # Not a DTensor, since nothing gathers a buffer before forward.
        self._weight_squares = squares = whole(row_squares(self._base()))
        self._eval_norms = None
        return squares

    def adapter_was_set(self) -> None:
        """Forget DoRA's norms. They are told by versions, which don't count what fully_shard gathers."""
        self._eval_norms = None

    def _norms(self) -> Tensor:
        """‖W + scaling · lora_b · lora_a‖ of each row, a constant to autograd.

        Kept from call to call where gradients are off, as in generation: for one token it costs as much as the layer.
        """
        lora_b = self.lora_b if self.lora_e is None else self.lora_b * self.lora_e
        adapter = tuple(t for t in (self.lora_a, self.lora_b, self.lora_e) if t is not None)
        if backends.by_formula(*adapter):
            # Nothing of a transform is kept, and forward-mode differentiation goes on where gradients are off.
            base = self._base()
            base = base.detach() if isinstance(base, Tensor) else base
            return row_norms(base, row_squares(base), self.lora_a.detach(), lora_b.detach(), self.scaling)
        squares = self._weight_was_set() if self._weight_squares is None else self._weight_squares
        args = (self._base(), squares, self.lora_a, lora_b, self.scaling)
        if torch.compiler.is_compiling():
            return row_norms(*args)
        if torch.is_grad_enabled() or any(t.is_inference() for t in adapter):
            self._eval_norms = None
            return row_norms(*args)
        state = (self.scaling, *((id(t), t.data_ptr(), t._version) for t in adapter))
        if self._eval_norms is None or self._eval_norms[0] != state:
            self._eval_norms = (state, row_norms(*args))
        return self._eval_norms[1]

    def _column_scale(self) -> Tensor | None:
        """DoRA's magnitude over norm."""
        return None if self.lora_magnitude is None else self.lora_magnitude / self._norms()

    def projection(self) -> Projection:
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        own = self.lora_a, self.lora_b, self.scaling
        return Projection(weight, *own, self.bias, self.lora_e, self._column_scale())

    def kept_layers(self, x: Tensor) -> Layers | None:
        """The layer as ops take it, checked for x; made anew when one of its tensors has moved, or is another one.

        None where it is watched, or something makes its tensors anew for each call, as DoRA makes its column_scale.
        """
        # Not self.lora_a: nn.Module's __getattr__ would take longer than all of this.
        own, parameters = self.__dict__, self._parameters
        nf4: Any = self._modules.get("weight")
        try:
            weight = (parameters["weight"],) if nf4 is None else nf4.parts
            tensors = *weight, *map(parameters.__getitem__, _PARAMETERS)
        except KeyError:
            # What pruning or a parametrization makes anew is no parameter, but an attribute.
            return None
        if (kept := self._still(tensors, x, own["scaling"])) is not None:
            return kept
        made_anew = any(own.get(name) is not None or name in self._buffers for name in _PARAMETERS)
        if made_anew or self.lora_magnitude is not None or type(self) is not FusedLoRALinear:
            return None
        return self._keep(tensors, x)

    def group_terms(self) -> Hashable | None:
        """None without an adapter in use, and with DoRA, whose norms are made anew for each call."""
        if type(self) is not FusedLoRALinear or not self.adapters_enabled or not self.r:
            return None
        if self.merged or self.lora_magnitude is not None:
            return None
        return self.in_features, self.dropout_p

    @property
    def dropout_p(self) -> float:
        return self.lora_dropout if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K]; the frozen layer alone when merged or when adapters_enabled is False."""
        group = self.group
        if group is not None and group.thread == threading.get_ident():
            return group(self, x)
        if self.adapters_enabled and not self.merged and self.r:
            return self.together((self,), x)[0]
        weight = self._unmerged_weight if self.merged and not self.adapters_enabled else self.weight
        if self.fan_in_fan_out:
            # The call that Conv1D makes, so that disabling the adapters returns the base model's very bits.
            y = torch.addmm(self.bias, x.reshape(-1, self.in_features), weight)
            return y.view(*x.shape[:-1], self.out_features)
        return frozen_linear(x, weight, self.bias)

    @property
    def merged(self) -> bool:
        """Whether `weight` currently holds the merged weight."""
        return self._unmerged_weight is not None

    @torch.no_grad()
    def merged_float(self) -> tuple[Tensor, Tensor]:
        """(W, W') [N, K] in float32 (float64 over a float64 weight), W' what the adapter makes of the frozen W:

        W + scaling · lora_b · diag(lora_e) · lora_a, its rows scaled to the length lora_magnitude where there is one.
        """
        base, dtype = self._base(), norm_dtype(self.weight)
        base = base.dequantize(dtype) if isinstance(base, NF4Weight) else base.to(dtype)
        lora_b = self.lora_b.to(dtype)
        if self.lora_e is not None:
            lora_b = lora_b * self.lora_e
        merged = base + self.scaling * (lora_b @ self.lora_a.to(dtype))
        if self.lora_magnitude is not None:
            norms = torch.linalg.vector_norm(merged, dim=1).clamp(min=torch.finfo(dtype).tiny ** 0.5)
            merged *= (self.lora_magnitude / norms)[:, None]
        return base, merged

    @torch.no_grad()
    def keep_ranks(self, index: Tensor) -> None:
        """Cuts the adapter to the ranks `index`, an int64 tensor; the scaling stays.

        lora_a, lora_b and lora_e become new parameters. With no rank left the layer is the frozen one, and its empty
        parameters require no gradient.
        """
        for name, dimension in RANK_DIMENSION.items():
            whole = getattr(self, name)
            if whole is not None:
                trained = whole.requires_grad and len(index) > 0
                setattr(self, name, nn.Parameter(whole.index_select(dimension, index), requires_grad=trained))
        self.r = len(index)
        self._kept = None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        if self.merged:
            return self.weight.detach().clone()
        if is_sharded(self.lora_a) or is_sharded(self.weight):
            raise ValueError(
                "the layer is distributed (its parameters are DTensors), and what distributed it would not know a "
                "merged weight; save the adapter, and merge a model that has loaded it in one process"
            )
        weight = self.weight.packed if isinstance(self.weight, NF4Weight) else self.weight.detach()
        backends.check_memory(weight=weight, lora_a=self.lora_a.detach(), lora_b=self.lora_b.detach())
        _, merged = self.merged_float()
        merged = (merged.t().contiguous() if self.fan_in_fan_out else merged).to(self.weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the merged weight is not finite in {self.weight.dtype}")
        return merged

    def merge(self) -> None:
        """Replaces `weight` by W + scaling · lora_b · lora_a, or DoRA's, made in float32 and rounded once to W's dtype.

        An NF4 weight is dequantised for it: the merged one is dense, in the dtype that was quantised.
        The frozen W is set aside, not overwritten: `unmerge` brings back its exact bits, and modules that share it
        (tied embeddings) keep it. The price is a second weight in memory while merged. Rounding to bfloat16 or
        float16 loses the part of the update below W's last bit, so train and evaluate unmerged.

        Raises RuntimeError if already merged, ValueError if the result is not finite or a tensor has no memory (meta).
        """
        if self.merged:
            raise RuntimeError("the adapter is already merged")
        merged = nn.Parameter(self.merged_weight(), requires_grad=False)
        self.__dict__["_unmerged_weight"] = self.weight
        self.weight = merged

    def unmerge(self) -> None:
        """Undoes `merge`: `weight` is the original parameter again, bit for bit. RuntimeError if not merged."""
        if not self.merged:
            raise RuntimeError("the adapter is not merged")
        # torch puts no module where a parameter is.
        del self.weight
        self.weight = self._unmerged_weight
        self.__dict__["_unmerged_weight"] = None

    def to_linear(self) -> nn.Module:
        """A plain layer of the original kind (nn.Linear or Conv1D) with the merged weight; self is unchanged.

        Its weight is new and frozen, its bias is this layer's. Raises ValueError if the merged weight is not finite or
        a tensor has no memory (meta).
        """
        return self._plain_layer(nn.Parameter(self.merged_weight(), requires_grad=False))

    def base_layer(self) -> nn.Module:
        """The plain layer (nn.Linear, NF4Linear or Conv1D) over the very frozen weight and bias; self is unchanged."""
        weight = self._unmerged_weight if self.merged else self.weight
        if isinstance(weight, NF4Weight):
            return NF4Linear(weight, self.bias).train(self.training)
        return self._plain_layer(weight)

    def _plain_layer(self, weight: nn.Parameter) -> nn.Module:
        linear: Any
        if self.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                linear = Conv1D(self.out_features, self.in_features)
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = weight
        linear.bias = self.bias
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRALinear:
        super()._apply(fn, recurse)
        if self.merged:
            with torch.no_grad():
                if isinstance(self._unmerged_weight, NF4Weight):
                    self._unmerged_weight._apply(fn)
                else:
                    weight, moved = self._unmerged_weight, fn(self._unmerged_weight.data)
                    # Those of meta don't go into it.
                    if torch._has_compatible_shallow_copy_type(weight, moved):
                        weight.data = moved
                    else:
                        self.__dict__["_unmerged_weight"] = nn.Parameter(moved, requires_grad=False)
        if self.lora_magnitude is not None:
            # fn may have cast the squares, or W to a dtype in which they are others.
            self._weight_was_set()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            # Beside lora_a and lora_b a merged weight would count the update twice after loading.
            weight = self._unmerged_weight
            if isinstance(weight, NF4Weight):
                weight._save_to_state_dict(destination, prefix + "weight.", keep_vars)
            else:
                destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.merged:
            *_, error_msgs = rest
            error_msgs.append(f"{prefix[:-1] or 'FusedLoRALinear'} is merged; call unmerge() before loading")
            return
        load_packed(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.lora_magnitude is not None:
            if isinstance(self.weight, NF4Weight):
                # It is loaded after this.
                self._weight_squares = None
            else:
                self._weight_was_set()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout}, "
            f"use_rslora={self.use_rslora}, use_dora={self.lora_magnitude is not None}, merged={self.merged}"
        )
