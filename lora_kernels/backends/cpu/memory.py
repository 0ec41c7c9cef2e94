"""Memory of large results: faulting fresh pages in costs more than what is written to them.

numpy's memory comes in huge pages where Linux has them for those who ask, with one fault for 512 pages: larger results
are from there. Where glibc gives a large tensor's memory back as soon as it is freed, as the trainers have it
(`return_freed_memory`), each activation would still come from fresh pages. With `enable`,
those that our own ops make come from blocks of earlier ones that nothing refers to any more. A block is made only where
no free one fits. All blocks together take the most that was in use at one time, and do so until the process ends.

Such results are ordinary tensors but for `resize_` to more elements, which torch refuses for memory that isn't its own.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

_M_MMAP_THRESHOLD = -3  # of malloc.h
# Bytes from which a result is worth a block.
LARGE = 1 << 20
# Bytes from which numpy asks for huge pages.
HUGE = 1 << 22
# Bytes of which sizes of blocks are multiples, and to which their addresses are aligned, as torch's are.
_UNIT = 1 << 16
_ALIGNMENT = 64
# How much larger than the result a block may be.
_SLACK = 1.25


_CPU = torch.device("cpu")


class Pool:
    """Blocks of memory by their size, in use and returned."""

    def __init__(self) -> None:
        # Blocks that nothing refers to any more: appended to whenever a tensor dies, in any thread and between any two
        # steps of what follows, which then takes them over.
        self._returned: deque[np.ndarray] = deque()
        # By size, the sizes that came back longest ago first.
        self._free: dict[int, list[np.ndarray]] = {}
        self._in_use = self._most_in_use = 0
        self._lock = threading.Lock()

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """torch.empty(shape) on the CPU."""
        count = math.prod(shape)
        with self._lock:
            block = self._take(-(-count * dtype.itemsize // _UNIT) * _UNIT)
        loan = _aligned(block)
        weakref.finalize(loan, self._returned.append, block).atexit = False
        return _tensor(loan, shape, dtype)

    def _take(self, size: int) -> np.ndarray:
        """The smallest free block that fits, or a new one. Of those that are free then, so many are given up that all
        blocks together take no more than the most that was in use at one time."""
        self._collect()
        fitting = [other for other in self._free if size <= other <= _SLACK * size]
        block = self._pop(min(fitting)) if fitting else _new_block(size)
        self._in_use += _size(block)
        self._most_in_use = max(self._most_in_use, self._in_use)
        excess = self._in_use + self._free_bytes() - self._most_in_use
        while excess > 0:
            excess -= _size(self._pop(next(iter(self._free))))
        return block

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            size = _size(block)
            self._in_use -= size
            self._free[size] = [*self._free.pop(size, ()), block]

    def _pop(self, size: int) -> np.ndarray:
        blocks = self._free[size]
        block = blocks.pop()
        if not blocks:
            del self._free[size]
        return block

    def _free_bytes(self) -> int:
        return sum(size * len(blocks) for size, blocks in self._free.items())

    def free_bytes(self) -> int:
        with self._lock:
            self._collect()
            return self._free_bytes()


def _new_block(size: int) -> np.ndarray:
    return np.empty(size + _ALIGNMENT, dtype=np.uint8)


def _size(block: np.ndarray) -> int:
    return block.nbytes - _ALIGNMENT


def _aligned(block: np.ndarray) -> np.ndarray:
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + _size(block)]


def _tensor(memory: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What keeps the memory alive. Not by view: autograd forbids work in place on one that comes out of a Function."""
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).resize_(shape)


_pool: Pool | None = None


def enable() -> None:
    global _pool
    _pool = _pool or Pool()


def return_freed_memory() -> None:
    """Have glibc return a large tensor's memory when it is freed, unless MALLOC_MMAP_THRESHOLD_ is set; else nothing.

    glibc raises the size from which it does so to that of the largest tensor freed so far, up to 32 MiB. Activations
    then come from one heap, whose gaps between small allocations stay with the process: as much again as it uses. The
    large results of our own ops are recycled instead, since fresh pages for each of them would take longer.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE)
        enable()


def _after_fork() -> None:
    # The thread that held the lock, if one did, does not exist in the child.
    if _pool is not None:
        _pool._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str = _CPU) -> Tensor:
    """torch.empty(shape); on the CPU from a block where they are enabled, and from huge pages where there are any."""
    size = math.prod(shape) * dtype.itemsize
    # A compiler or a mode that makes no real tensors reads none of this.
    if (
        size < (HUGE if _pool is None else LARGE)
        or torch.device(device).type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
    ):
        return torch.empty(shape, dtype=dtype, device=device)
    return _tensor(_aligned(_new_block(size)), shape, dtype) if _pool is None else _pool.empty(*shape, dtype=dtype)


def new(like: Tensor, *shape: int) -> Tensor:
    """`empty` in the dtype and on the device of another tensor."""
    if math.prod(shape) * like.itemsize < LARGE:
        return like.new_empty(*shape)
    return empty(*shape, dtype=like.dtype, device=like.device)
