"""Fused LoRA kernels: y = x W0ᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ, forward and backward, on GPUs and CPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_kernels.backends import available, use_backend
    from lora_kernels.io.peft import load_adapter, save_adapter
    from lora_kernels.methods.lora import LoRAConfig, adapters_disabled, inject, merge
    from lora_kernels.nn.lora_linear import FusedLoRALinear
    from lora_kernels.nn.nf4_linear import NF4Linear
    from lora_kernels.ops.lora_linear import lora_linear
    from lora_kernels.ops.nf4 import NF4Weight, quantize_nf4
    from lora_kernels.optim.loraplus import LoRAPlusAdamW

__version__ = "0.1.0"

_HOME = {
    "FusedLoRALinear": "nn.lora_linear",
    "LoRAConfig": "methods.lora",
    "LoRAPlusAdamW": "optim.loraplus",
    "NF4Linear": "nn.nf4_linear",
    "NF4Weight": "ops.nf4",
    "adapters_disabled": "methods.lora",
    "available": "backends",
    "inject": "methods.lora",
    "load_adapter": "io.peft",
    "lora_linear": "ops.lora_linear",
    "merge": "methods.lora",
    "quantize_nf4": "ops.nf4",
    "save_adapter": "io.peft",
    "use_backend": "backends",
}
__all__ = [
    "FusedLoRALinear",
    "LoRAConfig",
    "LoRAPlusAdamW",
    "NF4Linear",
    "NF4Weight",
    "adapters_disabled",
    "available",
    "inject",
    "load_adapter",
    "lora_linear",
    "merge",
    "quantize_nf4",
    "save_adapter",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `lora-kernels --help` need not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'lora_kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_kernels.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
