"""What the ops and their backends hand to each other."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class NF4:
    """A [N, K] weight in 4 bits, laid out as bitsandbytes does.

    packed: uint8 [(N·K + 1) // 2]; element 2j of the row-major weight is the high half of byte j, 2j + 1 the low half.
    absmax: one scale for each block of `block_size` elements, counted through the flat weight, the last one possibly
        shorter; float32 [blocks], or uint8 [blocks] under double quantisation.
    absmax_scale, absmax_offset: float32 [(blocks + 255) // 256] and float32 [] under double quantisation, else None:
        a block's scale is then dynamic_code()[absmax] · absmax_scale + absmax_offset, rounded after either operation.

    An element is NF4_CODE[its 4 bits] · its block's scale, in float32, rounded once to the dtype that is asked for.
    """

    packed: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    block_size: int
    shape: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.packed, self.absmax, self.absmax_scale, self.absmax_offset


@dataclass(frozen=True, slots=True)
class Projection:
    """One of the layers that read the same x, as query, key and value do; see `lora_linear` for what is what."""

    weight: Any  # a Tensor or NF4; as it is given to an op an NF4Weight of `lora_kernels.ops.nf4`
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    lora_e: Tensor | None = None
    column_scale: Tensor | None = None


_TRAINABLE = ("weight", "lora_a", "lora_b", "bias", "lora_e", "column_scale")


class _Places:
    """`lora_kernels._C.Places` where there is no extension, or torch has no exchange API of DLPack: whether tensors are
    still as they were when this was made.

    tensors: a tuple of tensors or None, which whoever keeps this keeps; x: what they are used with.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], x: Tensor) -> None:
        self._were, self._x = self._are(tensors), self._values(x)

    def hold(self, tensors: tuple[Tensor | None, ...], x: Tensor | None) -> bool:
        """Whether `tensors` are the very same ones, all have the address, dtype, shape, strides and need of a gradient
        that they had, and x, unless it is None, the dtype, device and last size of the first one."""
        return (x is None or self._values(x) == self._x) and self._are(tensors) == self._were

    @staticmethod
    def _are(tensors: tuple[Tensor | None, ...]) -> list[Any]:
        return [
            t if t is None else (id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad) for t in tensors
        ]

    @staticmethod
    def _values(x: Tensor) -> tuple[Any, ...]:
        return x.dtype, x.device, x.shape[-1:]


Places: Any = _Places
if hasattr(Tensor, "__dlpack_c_exchange_api__"):
    with suppress(ImportError):
        from lora_kernels._C import Places


class Layers:
    """Layers that read the same x, checked for x of one dtype on one device, and what backends have prepared for them.

    projections: in memory, with contiguous vectors, and a weight that is NF4 or has unit stride along one dimension.
    tensors: of each in turn the weight's (four of NF4), lora_a, lora_b, lora_e and column_scale.
    settings: of each scaling, the block size of an NF4 weight or 0, and the weight's shape.
    trained: what requires a gradient, by the layer's number and the name of its field.
    empty: whether a weight has no elements. scaled: whether a layer has a column_scale.
    prepared: whatever a backend makes once for these tensors as they lie in memory, by a key of its own.
    backend: the one that runs them, after the name by which it was asked for.
    own: the tensors of the module that keeps these layers from call to call; places: where they lie. None where no
        module does.
    lasting: whether they are kept and no tensor is computed of others, so that autograd needn't keep what they hold.
    """

    __slots__ = (
        *("backend", "biases", "empty", "lasting", "own", "places", "prepared", "projections", "scaled"),
        *("settings", "tensors", "trained"),
    )

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = tuple(projections)
        self.prepared: dict[Hashable, Any] = {}
        self.backend: tuple[str, Any] | None = None
        self.own: tuple[Tensor | None, ...] = ()
        self.places: Any = None
        self.lasting = False
        tensors: list[Tensor | None] = []
        settings = []
        self.trained: dict[tuple[int, str], Tensor] = {}
        for index, layer in enumerate(self.projections):
            weight = layer.weight
            tensors += weight.tensors if isinstance(weight, NF4) else (weight,)
            settings.append((layer.scaling, weight.block_size if isinstance(weight, NF4) else 0, tuple(weight.shape)))
            tensors += (layer.lora_a, layer.lora_b, layer.lora_e, layer.column_scale)
            for name in _TRAINABLE:
                t = getattr(layer, name)
                if isinstance(t, Tensor) and t.requires_grad:
                    self.trained[index, name] = t
        self.tensors, self.biases = tuple(tensors), tuple(layer.bias for layer in self.projections)
        self.settings = tuple(settings)
        self.empty = any(0 in layer.weight.shape for layer in self.projections)
        self.scaled = any(layer.column_scale is not None for layer in self.projections)

    def __len__(self) -> int:
        return len(self.projections)

    def __iter__(self) -> Iterator[Projection]:
        return iter(self.projections)

    def keep(self, own: tuple[Tensor | None, ...], x: Tensor) -> bool:
        """Whether a module may keep the layers, made of its `own` tensors and checked for x, from call to call.

        Not where one of their tensors is a copy, which would miss what becomes of the original, or is made anew for
        each call.
        """
        addresses = {t.data_ptr() for t in own if t is not None}
        given = [t for t in (*self.tensors, *self.biases) if t is not None]
        if not all(t.is_leaf and (t.data_ptr() in addresses or not t.numel()) for t in given):
            return False
        self.own, self.places = own, Places(own, x)
        # What was made in inference mode has no version, and torch says where that can't be differentiated.
        self.lasting = not any(t.is_inference() for t in own if t is not None)
        return True

    def versions(self) -> list[int | None]:
        """How often each of `tensors` was changed in place."""
        return [None if t is None else t._version for t in self.tensors]

    def are(self, own: tuple[Tensor | None, ...], x: Tensor) -> bool:
        """Whether they were kept for these very tensors, which are as they were, and for such x."""
        return self.places is not None and self.places.hold(own, x)

    @classmethod
    def of(cls, settings: Sequence[tuple[float, int, tuple[int, ...]]], tensors: Sequence[Tensor | None]) -> Layers:
        """Layers of these `settings` and `tensors`, without biases."""
        rest: Iterator[Any] = iter(tensors)
        made = []
        for scaling, block_size, shape in settings:
            weight = next(rest)
            if block_size:
                weight = NF4(weight, next(rest), next(rest), next(rest), block_size, shape)
            lora_a, lora_b, lora_e, column_scale = islice(rest, 4)
            made.append(Projection(weight, lora_a, lora_b, scaling, None, lora_e, column_scale))
        return cls(made)


@dataclass(frozen=True, slots=True)
class Dropout:
    """Each element of x is zeroed with probability `p` > 0 and the rest scaled; rng: int64 [2], (seed, offset)."""

    p: float
    rng: Tensor


@dataclass(slots=True)
class Outputs:
    """Of each layer: y [M, N] in the dtype of x, and h = dropout(x) lora_aᵀ [M, R] in float32 (float64 for such x)."""

    ys: list[Tensor]
    hs: list[Tensor]


class AdapterNeeds(NamedTuple):
    """Which gradients of a layer's adapter are asked for; lora_e's only where the layer has one."""

    lora_a: bool
    lora_b: bool
    lora_e: bool = False


@dataclass(frozen=True, slots=True)
class Needs:
    """Which gradients of a pass are asked for."""

    x: bool
    layers: tuple[AdapterNeeds, ...]


@dataclass(slots=True)
class AdapterGradients:
    """Those of a layer's adapter, in its dtypes; None where not asked for."""

    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_e: Tensor | None = None


@dataclass(slots=True)
class Gradients:
    """dx, the sum over the layers, or None where it was not asked for; and the gradients of each layer's adapter."""

    x: Tensor | None
    layers: list[AdapterGradients]


class AdamWGroup(NamedTuple):
    """Tensors that share their settings: one list entry per parameter that has a gradient. All of it is contiguous.

    params and grads: any floating dtypes. exp_avgs, exp_avg_sqs: of the parameter's shape, float32 (float64 for a
    float64 parameter). steps: scalar tensors, float32, the number of steps taken so far. masters: the unrounded
    float32 parameter for each float16 or bfloat16 one, None for the others.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    masters: Sequence[Tensor | None]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
