"""Supervised runs of a tiny model that take a second."""

import json
from pathlib import Path

import torch
from tiny_chat import tiny_llama, tiny_records, tiny_tokenizer

from lora_kernels.data.dataset import build_dataset
from lora_kernels.methods.lora import LoRAConfig, inject
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.sft import train_sft


def tiny_dataset(count=22, seed=0):
    records = [(record, f"data:{i}") for i, record in enumerate(tiny_records(count, seed))]
    return build_dataset(records, tiny_tokenizer(), 128, "data")


def settings(output_dir, **changes):
    defaults = {"model": "tiny", "data": "tiny", "r": 4, "lora_alpha": 8, "lr": 5e-3, "epochs": 1.0, "dtype": "float32"}
    return SFTConfig(**{**defaults, "output_dir": str(output_dir), **changes})


def read_metrics(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir):
    return [record["loss"] for record in read_metrics(output_dir) if "loss" in record]


def train_tiny(output_dir, dataset=None, eval_set=None, model=None, callbacks=(), **changes):
    options = {name: changes.pop(name, default) for name, default in (("accelerator", None), ("progress", False))}
    config = settings(output_dir, **changes)
    if model is None:
        model = tiny_llama()
        torch.manual_seed(1)
        inject(model, LoRAConfig(r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout))
    result = train_sft(model, dataset or tiny_dataset(), eval_set, config, callbacks=callbacks, **options)
    return model, result


def train_stoppable(output_dir, **changes):
    """Six steps of 4 rows; steps 3 and 6 are evaluated and steps 2, 4 and 6 logged."""
    plan = {"batch_size": 4, "logging_steps": 2, "eval_steps": 3, "save_steps": 100, "lora_dropout": 0.1}
    return train_tiny(output_dir, eval_set=tiny_dataset(5, seed=9), **{**plan, **changes})
