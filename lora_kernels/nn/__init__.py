"""Layers: drop-in replacements for linear layers that carry a LoRA adapter."""

from lora_kernels.nn.lora_linear import INITS, FusedLoRALinear

__all__ = ["INITS", "FusedLoRALinear"]
