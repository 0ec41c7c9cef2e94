"""Optimizers."""

from lora_kernels.optim.loraplus import LoRAPlusAdamW, loraplus_groups

__all__ = ["LoRAPlusAdamW", "loraplus_groups"]
