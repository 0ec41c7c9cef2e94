"""The Triton backend: NVIDIA and AMD GPUs, or CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

`unavailable` is None when this machine can run it, else the reason why not. Importing this package never needs a GPU.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

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

name = "triton"

if unavailable is None:
    from .adamw import adamw_step
    from .configs import unsupported_gpu
    from .lora_linear import (
        INTERPRETED,
        MAX_LAYERS,
        beats_torch,
        column_scale_bwd,
        lora_linear_bwd,
        lora_linear_fwd,
        takes,
    )
    from .nf4 import dequantize_nf4, quantize_nf4

    # The same with the large products by the vendor's library.
    by_vendor = SimpleNamespace(
        name="vendor",
        unavailable=None,
        MAX_LAYERS=MAX_LAYERS,
        takes=takes,
        beats_torch=beats_torch,
        lora_linear_fwd=partial(lora_linear_fwd, by_vendor=True),
        lora_linear_bwd=partial(lora_linear_bwd, by_vendor=True),
        column_scale_bwd=column_scale_bwd,
        quantize_nf4=quantize_nf4,
        dequantize_nf4=dequantize_nf4,
        adamw_step=adamw_step,
    )

    if isinstance(triton.language.zeros, triton.runtime.JITFunction) == INTERPRETED:
        unavailable = "TRITON_INTERPRET changed after triton was imported; set it before"
    elif not INTERPRETED and not torch.cuda.is_available():
        unavailable = "torch sees no CUDA or ROCm GPU, and TRITON_INTERPRET=1 was not set before triton was imported"
    elif not INTERPRETED:
        unavailable = unsupported_gpu()

__all__ = [
    "MAX_LAYERS",
    "adamw_step",
    "beats_torch",
    "by_vendor",
    "column_scale_bwd",
    "dequantize_nf4",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "name",
    "quantize_nf4",
    "takes",
    "unavailable",
]
