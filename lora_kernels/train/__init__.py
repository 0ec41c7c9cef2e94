"""Fine-tuning: `run_sft(SFTConfig(...))` from files, `train_sft` for a model and data already built."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line needs SFTConfig's fields for --help, but not torch.
    if name not in _HOME:
        raise AttributeError(f"module 'lora_kernels.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_kernels.train.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
