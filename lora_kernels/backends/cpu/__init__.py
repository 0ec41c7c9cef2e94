"""The CPU backend: C++ kernels, for every instruction set in one extension and chosen when it is loaded.

`unavailable` is None where they can run, else the reason why not.
"""

from lora_kernels.backends.cpu.adamw import adamw_step
from lora_kernels.backends.cpu.extension import isa, native_bfloat16, unavailable
from lora_kernels.backends.cpu.lora_linear import (
    MAX_LAYERS,
    beats_torch,
    column_scale_bwd,
    lora_linear_bwd,
    lora_linear_fwd,
    takes,
)
from lora_kernels.backends.cpu.nf4 import dequantize_nf4, quantize_nf4

name = "cpu"

__all__ = [
    "MAX_LAYERS",
    "adamw_step",
    "beats_torch",
    "column_scale_bwd",
    "dequantize_nf4",
    "isa",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "name",
    "native_bfloat16",
    "quantize_nf4",
    "takes",
    "unavailable",
]
