"""What autograd needn't keep: results of ops that backward makes again, from what the ops keep in any case.

A linear layer that trains an adapter keeps its input, which is what `rms_norm` and `swiglu` return. Where `recomputing`
is in force, that isn't kept: backward makes it again, in one pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import backends

_RECIPE = "lora_kernels_recipe"


class _Recipe:
    """How the contents of a storage are made from other tensors. The storage carries it as an attribute."""

    def __init__(self, result: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.make = make
        # Detached tensors share their version with the original.
        self.inputs = [t.detach() for t in inputs]
        self.versions = [t._version for t in inputs]
        self.version = result._version
        self.made: Tensor | None = None
        setattr(result.untyped_storage(), _RECIPE, self)

    def __call__(self) -> Tensor:
        if self.made is None:
            if [t._version for t in self.inputs] != self.versions:
                raise RuntimeError(
                    "a tensor that RMSNorm or SwiGLU was computed from has been modified by an inplace operation, so "
                    "that backward can't compute it again"
                )
            with torch.no_grad():
                self.made = self.make(*self.inputs)
        return self.made


class _Kept(NamedTuple):
    """A saved tensor and its version, which torch doesn't look at where there are hooks."""

    tensor: Tensor
    version: int | None


def version_of(t: Tensor) -> int | None:
    """How often the contents have changed; None for an inference tensor, of which torch doesn't know."""
    return None if t.is_inference() else t._version


def _pack(t: Tensor) -> Any:
    recipe = getattr(t.untyped_storage(), _RECIPE, None) if backends.is_memory(t) else None
    if recipe is None or recipe.version != t._version:
        # Not t itself, which keeps the node alive whose result it is, and that keeps what this returns.
        return _Kept(t.detach(), version_of(t))
    return recipe, t.shape, t.stride(), t.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Kept):
        t, version = packed
        if version_of(t) != version:
            raise RuntimeError(
                f"a tensor {list(t.shape)} that is needed for gradient computation has been modified by an inplace "
                f"operation: it is at version {version_of(t)}; expected version {version}"
            )
        return t
    recipe, *view = packed
    return recipe().as_strided(*view)


def remember(result: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """Notes that make(*inputs) is `result`. Backward calls what this returns when it no longer needs the result: that
    frees what was made again."""
    # A graph outlives its backward, and would keep the recipe's inputs with it; hence the weak reference.
    recipe = weakref.ref(_Recipe(result, make, *inputs))

    def forget() -> None:
        if (alive := recipe()) is not None:
            alive.made = None

    return forget


def recomputing() -> AbstractContextManager[None]:
    """In the `with` block, autograd keeps no result of `rms_norm` and `swiglu`, but makes it again in backward.

    Results are bit for bit the same. Inside activation checkpointing, which has hooks of its own, it has no effect.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)
