"""Supervised fine-tuning of a causal language model on the answers of instructions and chats."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_kernels.backends import backend_option
from lora_kernels.data.dataset import TokenDataset, load_dataset
from lora_kernels.train.causal_lm import AnswerLoss, check_context
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.graphs import DecoderGraphs, check_graphs
from lora_kernels.train.launch import make_accelerator
from lora_kernels.train.metrics import Callback
from lora_kernels.train.run import TrainResult, start, train


def run_sft(config: SFTConfig, callbacks: Sequence[Callback] = (), progress: bool = True) -> TrainResult:
    """Load `config.model`, inject the method, train it on `config.data`, and write everything to `config.output_dir`.

    Runs in one process, or in each of those that `accelerate launch` or `torchrun` started. `callbacks` get every
    record of metrics.jsonl, in the main process. Raises FileExistsError where output_dir holds another run, and
    ValueError for bad settings or data. A chat template that is not the model's own is saved beside the adapter, the
    whole tokenizer beside a fully fine-tuned model.
    """
    if config.cuda_graphs:
        # Here too, before a model is loaded.
        check_graphs(make_accelerator())
    run = start(config, progress)
    train_set, eval_set = run.load(load_dataset)
    run.adapt()
    return train_sft(run.model, train_set, eval_set, config, callbacks=callbacks, **run.options())


def train_sft(
    model: nn.Module,
    train_set: TokenDataset,
    eval_set: TokenDataset | None,
    config: SFTConfig,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> TrainResult:
    """Train the parameters of `model` that require gradients, on the answer tokens of `train_set`.

    model: a causal LM with its adapters in place. `config.model`, `config.data` and the adapter settings are only
    recorded. options: those of `lora_kernels.train.run.train`. Files and errors as for `run_sft`.
    """
    check_context(model, (train_set, eval_set), config)
    accelerator = accelerator or make_accelerator()
    module = AnswerLoss(model)
    if config.cuda_graphs:
        check_graphs(accelerator)
        module.graphs = DecoderGraphs(module.parts[0], train_set.longest)
    with backend_option(config.backend):
        module.to(accelerator.device).check(torch.from_numpy(train_set.input_ids[0]).long())
    return train(module, model, train_set, eval_set, config, accelerator=accelerator, **options)
