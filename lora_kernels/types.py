"""What the ops and their backends hand to each other."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import is_
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

    weight: Tensor | NF4
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    lora_e: Tensor | None = None
    column_scale: Tensor | None = None


_TRAINABLE = ("weight", "lora_a", "lora_b", "bias", "lora_e", "column_scale")


def _places(tensors: Sequence[Tensor | None]) -> list[tuple | None]:
    return [None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


class Layers:
    """Layers that read the same x, checked for x of one dtype on one device, and what backends have prepared for them.

    projections: in memory, with contiguous vectors, and a weight that is NF4 or has unit stride along one dimension.
    tensors: of each in turn the weight's (four of NF4), lora_a, lora_b, lora_e and column_scale.
    settings: of each scaling, the block size of an NF4 weight or 0, and the weight's shape.
    empty: whether a weight has no elements.
    prepared: whatever a backend makes once for these tensors as they lie in memory, by a key of its own.
    """

    __slots__ = (
        *("_bias_places", "_places", "biases", "empty", "prepared", "projections", "settings", "tensors"),
        "__weakref__",
    )

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = tuple(projections)
        self.prepared: dict[Hashable, Any] = {}
        tensors: list[Tensor | None] = []
        settings = []
        for layer in self.projections:
            weight = layer.weight
            tensors += weight.tensors if isinstance(weight, NF4) else (weight,)
            settings.append((layer.scaling, weight.block_size if isinstance(weight, NF4) else 0, tuple(weight.shape)))
            tensors += (layer.lora_a, layer.lora_b, layer.lora_e, layer.column_scale)
        self.tensors, self.biases = tuple(tensors), tuple(layer.bias for layer in self.projections)
        self.settings = tuple(settings)
        self.empty = any(0 in layer.weight.shape for layer in self.projections)
        self._places, self._bias_places = _places(self.tensors), _places(self.biases)

    def __len__(self) -> int:
        return len(self.projections)

    def __iter__(self) -> Iterator[Projection]:
        return iter(self.projections)

    def trained(self) -> dict[tuple[int, str], Tensor]:
        """What requires a gradient, by the layer's number and the name of its field."""
        found = {}
        for index, layer in enumerate(self.projections):
            for name in _TRAINABLE:
                t = getattr(layer, name)
                if t is not None and t.__class__ is not NF4 and t.requires_grad:
                    found[index, name] = t
        return found

    def are(self, tensors: Sequence[Tensor | None], biases: Sequence[Tensor | None] | None = None) -> bool:
        """Whether these, in the order of `tensors`, are the very ones, and lie where they did; likewise the biases."""
        if not all(map(is_, tensors, self.tensors)) or _places(tensors) != self._places:
            return False
        return biases is None or (all(map(is_, biases, self.biases)) and _places(biases) == self._bias_places)

    @classmethod
    def of(cls, settings: Sequence[tuple[float, int, tuple[int, ...]]], tensors: Sequence[Tensor | None]) -> Layers:
        """Layers of these `settings` and `tensors`, without biases."""
        rest, made = iter(tensors), []
        for scaling, block_size, shape in settings:
            weight = NF4(*islice(rest, 4), block_size, shape) if block_size else next(rest)
            lora_a, lora_b, lora_e, column_scale = islice(rest, 4)
            made.append(Projection(weight, lora_a, lora_b, scaling, None, lora_e, column_scale))
        return cls(made)


@dataclass(frozen=True, slots=True)
class Dropout:
    """Each element of x is zeroed with probability `p` > 0 and the rest scaled; rng: int64 [2], (seed, offset)."""

    p: float
    rng: Tensor


@dataclass(slots=True)
class Output:
    """Of one layer: y [M, N] in the dtype of x, and h = dropout(x) lora_aᵀ [M, R] in float32 (float64 for such x)."""

    y: Tensor
    h: Tensor


@dataclass(frozen=True, slots=True)
class AdapterNeeds:
    """Which gradients of a layer's adapter are asked for; lora_e's only where the layer has one."""

    lora_a: bool
    lora_b: bool
    lora_e: bool = False


@dataclass(frozen=True, slots=True)
class Needs:
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
