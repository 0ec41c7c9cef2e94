"""Fused LoRA kernels: y = x W0ᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ, forward and backward, on GPUs and CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kernels.lazy import exports

if TYPE_CHECKING:
    from lora_kernels.backends import available, use_backend
    from lora_kernels.integrations.peft import FuseReport, fuse_peft, unfuse_peft
    from lora_kernels.io.adapters import load_adapter, save_adapter
    from lora_kernels.methods.adalora import AdaLoRAConfig
    from lora_kernels.methods.apply import adapters_disabled, inject, merge
    from lora_kernels.methods.full import FullConfig
    from lora_kernels.methods.lora import LoRAConfig, trainable_summary
    from lora_kernels.methods.named import add_adapter, use_adapter
    from lora_kernels.methods.prefix import PrefixConfig
    from lora_kernels.methods.prompt import PromptConfig
    from lora_kernels.models.fuse import fuse_decoder
    from lora_kernels.nn.lora_linear import FusedLoRALinear
    from lora_kernels.nn.nf4_linear import NF4Linear
    from lora_kernels.ops.lora_linear import lora_linear, lora_linear_group
    from lora_kernels.ops.nf4 import NF4Weight, quantize_nf4
    from lora_kernels.optim.loraplus import LoRAPlusAdamW
    from lora_kernels.types import Projection

__version__ = "0.1.0"

_HOME = {
    "AdaLoRAConfig": "methods.adalora",
    "FullConfig": "methods.full",
    "FuseReport": "integrations.peft",
    "FusedLoRALinear": "nn.lora_linear",
    "LoRAConfig": "methods.lora",
    "LoRAPlusAdamW": "optim.loraplus",
    "NF4Linear": "nn.nf4_linear",
    "NF4Weight": "ops.nf4",
    "PrefixConfig": "methods.prefix",
    "Projection": "types",
    "PromptConfig": "methods.prompt",
    "adapters_disabled": "methods.apply",
    "add_adapter": "methods.named",
    "available": "backends",
    "fuse_decoder": "models.fuse",
    "fuse_peft": "integrations.peft",
    "inject": "methods.apply",
    "load_adapter": "io.adapters",
    "lora_linear": "ops.lora_linear",
    "lora_linear_group": "ops.lora_linear",
    "merge": "methods.apply",
    "quantize_nf4": "ops.nf4",
    "save_adapter": "io.adapters",
    "trainable_summary": "methods.lora",
    "unfuse_peft": "integrations.peft",
    "use_adapter": "methods.named",
    "use_backend": "backends",
}
__all__ = [
    "AdaLoRAConfig",
    "FullConfig",
    "FuseReport",
    "FusedLoRALinear",
    "LoRAConfig",
    "LoRAPlusAdamW",
    "NF4Linear",
    "NF4Weight",
    "PrefixConfig",
    "Projection",
    "PromptConfig",
    "adapters_disabled",
    "add_adapter",
    "available",
    "fuse_decoder",
    "fuse_peft",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linear_group",
    "merge",
    "quantize_nf4",
    "save_adapter",
    "trainable_summary",
    "unfuse_peft",
    "use_adapter",
    "use_backend",
]
__getattr__, __dir__ = exports(__name__, _HOME)
