"""The Triton backend: NVIDIA and AMD GPUs, or CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

`unavailable` is None when this machine can run it, else the reason why not. Importing this package never needs a GPU.
"""

from __future__ import annotations

import torch

unavailable: str | None = None
# What torch 2.8 comes with. Older ones don't compile all of the kernels.
OLDEST = (3, 4)

try:
    import triton
except ImportError as error:
    unavailable = f"triton can't be imported: {error}"
else:
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        unavailable = (
            f"triton is {triton.__version__}; {'.'.join(map(str, OLDEST))} (of torch 2.8) and newer are supported"
        )

if unavailable is None:
    from .adamw import adamw_step
    from .configs import unsupported_gpu
    from .lora_linear import (
        INTERPRETED,
        MAX_GROUP,
        column_scale_bwd,
        lora_linear_bwd,
        lora_linear_fwd,
        lora_linear_group_bwd,
        lora_linear_group_fwd,
    )
    from .nf4 import dequantize_nf4, quantize_nf4

    if isinstance(triton.language.zeros, triton.runtime.JITFunction) == INTERPRETED:
        unavailable = "TRITON_INTERPRET changed after triton was imported; set it before"
    elif not INTERPRETED and not torch.cuda.is_available():
        unavailable = "torch sees no CUDA or ROCm GPU, and TRITON_INTERPRET=1 was not set before triton was imported"
    elif not INTERPRETED:
        unavailable = unsupported_gpu()

__all__ = [
    "MAX_GROUP",
    "adamw_step",
    "column_scale_bwd",
    "dequantize_nf4",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "lora_linear_group_bwd",
    "lora_linear_group_fwd",
    "quantize_nf4",
    "unavailable",
]
