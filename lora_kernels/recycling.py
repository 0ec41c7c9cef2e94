"""Memory of large results that is used again: faulting fresh pages in costs more than what is written to them.

Where glibc gives a large tensor's memory back as soon as it is freed, as the trainers have it (`return_freed_memory` in
`lora_kernels.train.run`), each activation would come from fresh pages. With `enable`, those that our own ops make come
from blocks of earlier ones that nothing refers to any more. A block is made only where no free one fits, and free ones
are given up for it: blocks take about as much as was in use at one time, and do so until the process ends.
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

# Bytes from which a result is worth a block.
LARGE = 1 << 20
# Bytes of which sizes of blocks are multiples, and to which their addresses are aligned, as torch's are.
_UNIT = 1 << 16
_ALIGNMENT = 64
# How much larger than the result a block may be.
_SLACK = 1.25


class Pool:
    def __init__(self) -> None:
        # By size. `_take_back` runs whenever a tensor dies, in any thread and between any two steps of `_fitting`.
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """torch.empty(shape) on the CPU."""
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // _UNIT) * _UNIT
        with self._lock:
            block = self._fitting(size)
        if block is None:
            block = np.empty(size + _ALIGNMENT, dtype=np.uint8)
        start = -block.ctypes.data % _ALIGNMENT
        # What the tensor's storage keeps alive.
        loan = block[start : start + size]
        weakref.finalize(loan, self._take_back, block).atexit = False
        # Not view: autograd forbids work in place on a view that comes out of a Function.
        return torch.frombuffer(loan, dtype=dtype, count=count).resize_(shape)

    def _fitting(self, size: int) -> np.ndarray | None:
        """The smallest free block that fits; None if there is none, with as much of the others given up."""
        sizes = [other for other in sorted(self._free) if self._free[other]]
        for other in sizes:
            if size <= other <= _SLACK * size:
                return self._free[other].pop()
        given_up = 0
        while sizes and given_up < size:
            if blocks := self._free[sizes[-1]]:
                given_up += blocks.pop().nbytes
            else:
                sizes.pop()
        return None

    def _take_back(self, block: np.ndarray) -> None:
        self._free.setdefault(block.nbytes - _ALIGNMENT, []).append(block)

    def free_bytes(self) -> int:
        return sum(size * len(self._free[size]) for size in list(self._free))


_pool: Pool | None = None


def enable() -> None:
    global _pool
    _pool = _pool or Pool()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """torch.empty(shape) on the CPU, from a block where they are enabled and it is large."""
    if _pool is None or math.prod(shape) * dtype.itemsize < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return _pool.empty(*shape, dtype=dtype)
