"""Layers: drop-in replacements for linear layers that carry a LoRA adapter."""

from lora_kernels.nn.lora_linear import INITS, FusedLoRALinear
from lora_kernels.nn.nf4_linear import NF4Linear

__all__ = ["INITS", "FusedLoRALinear", "NF4Linear"]
