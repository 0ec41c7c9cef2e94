"""What a run writes to its directory beside checkpoints and metrics, and whether it may write there."""

import os
from pathlib import Path

from lora_kernels.train.checkpoint import find_checkpoint
from lora_kernels.train.config import TrainConfig
from lora_kernels.train.metrics import METRICS

CONFIG, PLOT, RANKS, TEMPLATE = "config.yaml", "loss.png", "ranks.png", "chat_template.jinja"


def check_output_dir(config: TrainConfig) -> None:
    """FileExistsError where `output_dir` holds a run and the configuration does not say to resume it, PermissionError
    where it can't be written."""
    directory = Path(config.output_dir)
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise FileExistsError(f"output_dir {directory}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {directory}: {there} can't be written to")
    found = [
        name for name in (METRICS, "adapter_model.safetensors", "model.safetensors") if (directory / name).exists()
    ]
    if find_checkpoint(directory):
        found.append("a checkpoint")
    if found and not config.resume:
        raise FileExistsError(
            f"output_dir {directory} holds another run ({', '.join(found)}); choose another one, "
            "or set resume to continue"
        )
