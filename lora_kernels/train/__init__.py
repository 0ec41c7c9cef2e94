"""Fine-tuning: `run_sft(SFTConfig(...))` from files, `train_sft` for a model and data already built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kernels.lazy import exports

if TYPE_CHECKING:
    from lora_kernels.train.config import SFTConfig
    from lora_kernels.train.data import build_dataset, load_dataset
    from lora_kernels.train.losses import chunked_cross_entropy
    from lora_kernels.train.run import TrainResult
    from lora_kernels.train.sft import run_sft, train_sft

_HOME = {
    "SFTConfig": "config",
    "TrainResult": "run",
    "build_dataset": "data",
    "chunked_cross_entropy": "losses",
    "load_dataset": "data",
    "run_sft": "sft",
    "train_sft": "sft",
}
__all__ = [
    "SFTConfig",
    "TrainResult",
    "build_dataset",
    "chunked_cross_entropy",
    "load_dataset",
    "run_sft",
    "train_sft",
]
__getattr__, __dir__ = exports(__name__, _HOME)
