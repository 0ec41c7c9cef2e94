"""DTensors, as FSDP2 and tensor parallelism make of parameters: the part in this process, and the whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from lora_kernels.reference import widened

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MODULE = "torch.distributed.tensor"


def is_sharded(t: Any) -> TypeGuard[DTensor]:
    """Whether t is a DTensor."""
    # Not imported for it: where there is one, somebody has.
    return _MODULE in sys.modules and isinstance(t, sys.modules[_MODULE].DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a DTensor that lies in this process, outside of autograd; any other tensor itself."""
    if not is_sharded(t):
        return t
    with torch.no_grad():
        part = t.to_local()
    # Of a collective that is still under way.
    return part.wait() if hasattr(part, "wait") else part


def whole(t: Tensor) -> Tensor:
    """All of a DTensor, in every process, which all must ask for it at the same time; any other tensor itself."""
    return t.full_tensor() if is_sharded(t) else t


def spread(source: Tensor, target: Tensor) -> Tensor:
    """A whole source as a DTensor that lies as target does, for which all processes must ask, and of which the values
    of rank 0 count; source itself where target is no DTensor, or source is one."""
    if is_sharded(target) and not is_sharded(source):
        distribute = sys.modules[_MODULE].distribute_tensor
        return distribute(source.to(target.device), target.device_mesh, target.placements)
    return source


def fill(target: Tensor, source: Tensor) -> None:
    """target.copy_(source). Of a whole source a DTensor takes its part, that of rank 0; all processes must do so."""
    target.copy_(spread(source, target))


def norm(owners: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, of which `parts` lie in this process and `owners` are laid out alike.

    One collective for all that share a mesh and a layout. A scalar in float32, or float64.
    """
    squares: dict[Any, Tensor] = {}
    for owner, part in zip(owners, parts, strict=True):
        key = (owner.device_mesh, owner.placements) if is_sharded(owner) else None
        square = widened(part).square().sum()
        squares[key] = squares[key] + square if key in squares else square
    for key, square in squares.items():
        if key is not None:
            module, (mesh, placements) = sys.modules[_MODULE], key
            kinds = [module.Replicate() if each.is_replicate() else module.Partial() for each in placements]
            squares[key] = module.DTensor.from_local(square, mesh, kinds).full_tensor()
    return reduce(torch.add, squares.values()).sqrt()
