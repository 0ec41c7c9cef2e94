"""What the ops and their backends hand to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class NF4(NamedTuple):
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
    shape: tuple[int, int]


class Projection(NamedTuple):
    """One of the layers that read the same x, as query, key and value do; see `lora_linear_fwd` for what is what."""

    weight: Tensor | NF4
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    lora_e: Tensor | None = None
    column_scale: Tensor | None = None


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
