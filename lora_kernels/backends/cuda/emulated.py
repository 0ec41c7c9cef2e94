"""The CUDA C++ kernels on CPU tensors, under the emulator in csrc/simt: slow, for tests of what `cuda` will run.

A kernel that races, deadlocks, misaligns a vector or leaves its tensors is a RuntimeError that names kernel, block,
thread and line. The environment variable LORA_KERNELS_SIMT_SCHEDULE (forward, reversed, or shuffled:SEED) sets the
order in which threads run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_kernels.backends.contract import Backend
from lora_kernels.backends.cuda import Kernels, Memory


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _buffer(value: Any) -> tuple[int, int] | None:
    """(address, bytes) of a tensor or a part of one; None for any other argument of a kernel."""
    if isinstance(value, Tensor):
        return value.data_ptr(), _extent(value)
    if isinstance(value, tuple):
        memory, first, count = value
        return memory.data_ptr() + first, count
    return None


class EmulatedKernels(Kernels):
    """`Kernels` that may access the memory of their own tensors and nothing else."""

    name = "cuda-emulated"
    if TYPE_CHECKING:
        from lora_kernels import _simt as _extension

    def _queue(self, on: Tensor, *launches: tuple[str, dict[str, Any]], through: Sequence[Tensor] = ()) -> None:
        reached = {f"tensor {index}": tensor for index, tensor in enumerate(through)}
        for launch in launches:
            values = (launch[1] | reached).items()
            buffers = {name: buffer for name, value in values if (buffer := _buffer(value)) is not None}
            # What the kernel before may still be writing.
            late = "u_parts" if launch[1].get("just_queued") else ""
            self._extension.set_buffers(buffers, late)
            super()._queue(on, launch)

    def _workspace(self, device: torch.device, **lengths: int) -> dict[str, Memory]:
        """As `Kernels._workspace`; each from its own allocation, so that what leaves one doesn't enter the next."""
        return {
            name: torch.empty((length,), dtype=torch.float32, device=device) if length else None
            for name, length in lengths.items()
        }


backend: Backend = EmulatedKernels("_simt", "cpu", "it is part of a build in place, for tests")
