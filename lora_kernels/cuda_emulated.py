"""The CUDA C++ kernels on CPU tensors, under the emulator in csrc/simt: slow, for tests of what `cuda` will run.

A kernel that races, deadlocks, misaligns a vector or leaves its tensors is a RuntimeError that names kernel, block,
thread and line. The environment variable LORA_KERNELS_SIMT_SCHEDULE (forward, reversed, or shuffled:SEED) sets the
order in which threads run.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_kernels.cuda import Kernels


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class EmulatedKernels(Kernels):
    def _launch(self, kernel: str, on: Tensor, through: Sequence[Tensor] = (), **arguments) -> None:
        """As `Kernels._launch`; the kernel may access the memory of its own tensors and nothing else."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        tensors |= {f"tensor {index}": tensor for index, tensor in enumerate(through)}
        self._extension.set_buffers({name: (t.data_ptr(), _extent(t)) for name, t in tensors.items()})
        super()._launch(kernel, on, **arguments)


_kernels = EmulatedKernels("_simt", "cpu", "it is part of a build in place, for tests")
unavailable = _kernels.unavailable
lora_linear_fwd = _kernels.lora_linear_fwd
lora_linear_bwd = _kernels.lora_linear_bwd
column_scale_bwd = _kernels.column_scale_bwd
quantize_nf4 = _kernels.quantize_nf4
dequantize_nf4 = _kernels.dequantize_nf4
adamw_step = _kernels.adamw_step
