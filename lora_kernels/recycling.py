"""Memory of large results that is used again: faulting fresh pages in costs more than what is written to them.

Where glibc gives a large tensor's memory back as soon as it is freed, as the trainers have it (`return_freed_memory` in
`lora_kernels.train.run`), each activation would come from fresh pages. With `enable`, those that our own ops make come
from blocks of earlier ones that nothing refers to any more. A block is made only where no free one fits, and free ones
are given up for it, so that blocks never take more than what was in use at one time.
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

# Bytes from which a result is worth a block, and of which sizes of blocks are multiples.
_LARGE = 1 << 20
_UNIT = 1 << 16
# How much larger than the result a block may be.
_SLACK = 1.25


class Pool:
    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        # By the id of a reference to what the tensor's storage keeps alive, an array, which has no hash.
        self._lent: dict[int, tuple[weakref.ref, np.ndarray]] = {}
        # For `empty`; `_take_back` runs whenever a tensor dies, here too, and needs none.
        self._lock = threading.Lock()

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """torch.empty(shape) on the CPU."""
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // _UNIT) * _UNIT
        with self._lock:
            block = self._fitting(size)
        if block is None:
            block = np.empty(size, dtype=np.uint8)
        loan = block[:]
        reference = weakref.ref(loan, self._take_back)
        self._lent[id(reference)] = (reference, block)
        return torch.frombuffer(loan, dtype=dtype, count=count).view(shape)

    def _fitting(self, size: int) -> np.ndarray | None:
        """The smallest free block that fits; None if there is none, with as much of the others given up."""
        sizes = sorted(other for other, blocks in self._free.items() if blocks)
        for other in sizes:
            if size <= other <= _SLACK * size:
                return self._free[other].pop()
        given_up = 0
        while sizes and given_up < size:
            if blocks := self._free[sizes[-1]]:
                given_up += blocks.pop().nbytes
            else:
                del self._free[sizes.pop()]
        return None

    def _take_back(self, reference: weakref.ref) -> None:
        _, block = self._lent.pop(id(reference))
        self._free.setdefault(block.nbytes, []).append(block)

    def free_bytes(self) -> int:
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))


_pool: Pool | None = None


def enable() -> None:
    global _pool
    _pool = _pool or Pool()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """torch.empty(shape) on the CPU, from a block where they are enabled and it is large."""
    if _pool is None or math.prod(shape) * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype)
    return _pool.empty(*shape, dtype=dtype)
