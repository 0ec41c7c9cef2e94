"""Layers as they are given to lora_linear: their checks, and how they come to the backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import backends
from lora_kernels.ops.nf4 import NF4Weight
from lora_kernels.types import NF4, Layers, Projection

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors_of(layers: Sequence[Projection]) -> list[Tensor | None]:
    """What an op reads of them."""
    tensors: list[Tensor | None] = []
    for layer in layers:
        tensors += weight_tensors(layer.weight)
        tensors += (layer.lora_a, layer.lora_b, layer.bias, layer.lora_e, layer.column_scale)
    return tensors


def weight_tensors(weight: Tensor | NF4Weight) -> tuple[Tensor | None, ...]:
    return weight.parts if isinstance(weight, NF4Weight) else (weight,)


def prepare(x: Tensor, layers: Sequence[Projection]) -> Layers | None:
    """The layers, checked for x, as a backend takes them; None where they are `watched`, and then checked too.

    Raises as `lora_linear`, the argument's name preceded by the layer's place if there are several.
    """
    in_memory = backends.unwatched(x, *tensors_of(layers))
    for index, layer in enumerate(layers):
        try:
            if not in_memory:
                _check_dense(x, layer)
            check_layer(x, layer)
        except (TypeError, ValueError) as error:
            if len(layers) == 1:
                raise
            raise type(error)(f"layers[{index}]: {error}") from None
    if not in_memory:
        return None
    return Layers([projection_in_memory(layer) for layer in layers])


def projection_in_memory(layer: Projection) -> Projection:
    """With contiguous vectors, and NF4 or unit stride along either dimension of the weight (Conv1D's as it is)."""
    weight = layer.weight
    if isinstance(weight, NF4Weight):
        weight = weight.tensors()
    elif not isinstance(weight, NF4) and 1 not in weight.stride():
        weight = weight.contiguous()
    lora_a, lora_b = layer.lora_a.contiguous(), layer.lora_b.contiguous()
    vectors = vector(layer.bias), vector(layer.lora_e), vector(in_dtype_of_sums(layer.column_scale))
    return Projection(weight, lora_a, lora_b, float(layer.scaling), *vectors)


def in_dtype_of_sums(t: Tensor | None) -> Tensor | None:
    """A column_scale as every backend reads it: float32, or float64 where it is that."""
    return t if t is None or t.dtype == torch.float64 else t.float()


def vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """That to which x is cast; None outside of autocast, and for float64."""
    if not backends.in_autocast(x) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def under_autocast(x: Tensor, layers: Sequence[Projection]) -> tuple[Tensor, Sequence[Projection]]:
    """Under autocast, x and the layers in its dtype, but for adapters in float32."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, layers

    def cast(t: Any) -> Any:
        return None if t is None else t.to(dtype)

    def cast_adapter(t: Any) -> Any:
        return cast(t) if t is not None and t.itemsize == 2 else t

    cast_layers = [
        Projection(
            layer.weight if isinstance(layer.weight, NF4Weight) else cast(layer.weight),
            cast_adapter(layer.lora_a),
            cast_adapter(layer.lora_b),
            layer.scaling,
            cast(layer.bias),
            cast_adapter(layer.lora_e),
            cast_adapter(layer.column_scale),
        )
        for layer in layers
    ]
    return x.to(dtype), cast_layers


def check_layer(x: Tensor, layer: Projection) -> None:
    """Raises ValueError for a wrong shape or device, TypeError for a wrong dtype."""
    check_frozen(x, layer.weight, layer.bias)
    lora_a = layer.lora_a
    if lora_a.dim() != 2 or lora_a.shape[0] < 1:
        raise ValueError(f"lora_a has shape {list(lora_a.shape)}; expected [R, K], and the rank R must be at least 1")
    (N, K), R = layer.weight.shape, lora_a.shape[0]
    dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    _check_tensor("lora_a", lora_a, (R, K), x, dtypes)
    _check_tensor("lora_b", layer.lora_b, (N, R), x, dtypes)
    if layer.lora_e is not None:
        _check_tensor("lora_e", layer.lora_e, (R,), x, dtypes)
    if layer.column_scale is not None:
        _check_tensor("column_scale", layer.column_scale, (N,), x, dtypes)


def check_frozen(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> None:
    """As `check_layer`, of a layer without an adapter."""
    if x.dtype not in _FLOATING:
        raise TypeError(f"x has dtype {x.dtype}; allowed: {', '.join(str(dtype) for dtype in _FLOATING)}")
    if x.dim() < 1 or len(weight.shape) != 2:
        raise ValueError(f"x and weight must be [..., K] and [N, K]; given {list(x.shape)} and {list(weight.shape)}")
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(
            f"x has {x.shape[-1]} features (shape {list(x.shape)}); weight [N, K] = [{N}, {K}] expects {K}"
        )
    if isinstance(weight, NF4Weight):
        _check_device("weight", weight, x)
    else:
        _check_tensor("weight", weight, (N, K), x, (x.dtype,))
    if bias is not None:
        _check_tensor("bias", bias, (N,), x, (x.dtype,))


def check_dense(x: Tensor, weight: Tensor | NF4Weight, **others: Tensor | None) -> None:
    """TypeError for a tensor without strides, and for a DTensor beside a tensor that is none."""
    if isinstance(weight, NF4Weight):
        weight.check()
    backends.check_dense(x=x, weight=weight_tensors(weight)[0], **others)


def _check_dense(x: Tensor, layer: Projection) -> None:
    adapter: dict[str, Tensor | None] = {"lora_a": layer.lora_a, "lora_b": layer.lora_b}
    adapter |= {"lora_e": layer.lora_e, "column_scale": layer.column_scale}
    check_dense(x, layer.weight, bias=layer.bias, **adapter)


def _check_tensor(name: str, t: Tensor, shape: tuple[int, ...], x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.shape != shape:
        raise ValueError(f"{name} has shape {list(t.shape)}; expected {list(shape)}")
    if t.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{name} has dtype {t.dtype}; with x of {x.dtype} it must be {allowed}")
    _check_device(name, t, x)


def _check_device(name: str, t: Tensor | NF4Weight, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, x on {x.device}; both must be on the same device")
