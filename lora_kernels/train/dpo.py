"""Direct preference optimisation: learning from pairs without a reward model (Rafailov et al. 2023)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_kernels.backends import backend_option
from lora_kernels.data.dataset import batches_by_length
from lora_kernels.data.pairs import PairDataset, load_pairs
from lora_kernels.io.peft import add_saved_adapter
from lora_kernels.methods.modes import eval_mode, train_adapters
from lora_kernels.methods.named import REFERENCE, reference
from lora_kernels.methods.registry import METHODS
from lora_kernels.ops.cross_entropy import IGNORE_INDEX
from lora_kernels.train.causal_lm import AnswerLoss, check_context
from lora_kernels.train.config import DPOConfig
from lora_kernels.train.launch import computed_together, make_accelerator
from lora_kernels.train.loop import to_device
from lora_kernels.train.metrics import Callback
from lora_kernels.train.rl import dpo_loss, pair_sums
from lora_kernels.train.run import TrainResult, start, train


class DPOLoss(AnswerLoss):
    """A causal LM whose forward is the summed `dpo_loss` of the pairs of a batch, in one forward; the reference, where
    its log-probabilities do not come with the batch, is the same model with its adapters off, or with the one called
    "reference" in their place.

    Training mode is for the adapters alone, see `train_adapters`: with dropout of the base model the policy would
    differ from the reference before it has learned anything.
    """

    def __init__(
        self, model: nn.Module, beta: float = 0.1, loss_type: str = "sigmoid", label_smoothing: float = 0.0
    ) -> None:
        super().__init__(model)
        self.beta, self.loss_type, self.label_smoothing = beta, loss_type, label_smoothing

    def train(self, mode: bool = True) -> "DPOLoss":
        super().train(mode)
        train_adapters(self.model, mode)
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        ref_logprobs: Tensor | None = None,
        **_: Tensor,
    ) -> dict[str, Tensor]:
        """Sums over the pairs of a `PairDataset` batch, chosen rows first; lengths and margins are not used."""
        if ref_logprobs is None:
            ref_logprobs = self.reference(input_ids, labels)
        logprobs = self.logprobs(input_ids, labels).sum(1)
        tokens = labels[:, 1:].ne(IGNORE_INDEX).sum(1)
        (chosen, rejected), (ref_chosen, ref_rejected) = logprobs.chunk(2), ref_logprobs.chunk(2)
        settings = (self.beta, self.loss_type, self.label_smoothing)
        return pair_sums(*dpo_loss(chosen, rejected, ref_chosen, ref_rejected, *settings, *tokens.chunk(2)))

    @torch.no_grad()
    def reference(self, input_ids: Tensor, labels: Tensor, adapters_on: bool = False) -> Tensor:
        """Summed log-probabilities [B] of the labels, adapters and dropout off (`adapters_on`: dropout only)."""
        with eval_mode(self), nullcontext() if adapters_on else reference(self.model):
            return self.logprobs(input_ids, labels).sum(1)


def reference_logprobs(
    module: DPOLoss, pairs: PairDataset, batch_size: int, accelerator: Accelerator, adapters_on: bool = False
) -> np.ndarray:
    """float32 [n, 2]: `module.reference` of the two answers of each pair, on all processes."""

    def of_rows(rows: Sequence[int]) -> Tensor:
        batch = to_device(pairs.batch(rows), accelerator)
        return module.reference(batch["input_ids"], batch["labels"], adapters_on).view(2, -1).t()

    batches = batches_by_length(pairs.lengths, batch_size)
    return computed_together(torch.zeros(len(pairs), 2), batches, of_rows, accelerator).numpy()


def run_dpo(config: DPOConfig, callbacks: Sequence[Callback] = (), progress: bool = True) -> TrainResult:
    """Train a policy on the pairs of `config.data`, and write everything to `config.output_dir`.

    Files, processes, callbacks and errors as for `run_sft`. The rewards in metrics.jsonl are those of `dpo_loss`.
    """
    run = start(config, progress)
    train_set, eval_set = run.load(load_pairs)
    run.adapt()
    if config.adapter is not None and not config.precompute_ref:
        add_saved_adapter(run.model, REFERENCE, config.adapter, trainable=False)
    if config.precompute_ref:
        run.say("computing the reference model's log-probabilities of all pairs")
    return train_dpo(run.model, train_set, eval_set, config, callbacks=callbacks, **run.options())


def train_dpo(
    model: nn.Module,
    train_set: PairDataset,
    eval_set: PairDataset | None,
    config: DPOConfig,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> TrainResult:
    """Train what requires gradients in `model`, which `inject` prepared, on pairs; see `train_sft`.

    With `config.precompute_ref`, the datasets without `ref_logprobs` get them: from the model without adapters, with
    `config.adapter` or method "full" from the model as it is.
    """
    check_context(model, (train_set, eval_set), config)
    accelerator = accelerator or make_accelerator()
    module = DPOLoss(model, config.beta, config.loss, config.label_smoothing)
    with backend_option(config.backend):
        module.to(accelerator.device).check(torch.from_numpy(train_set.chosen[0][0]).long())
        for pairs in (train_set, eval_set) if config.precompute_ref else ():
            if pairs is not None and pairs.ref_logprobs is None:
                start = not METHODS[config.method].keeps_base or config.adapter is not None
                pairs.ref_logprobs = reference_logprobs(module, pairs, config.batch_size, accelerator, start)
    return train(module, model, train_set, eval_set, config, accelerator=accelerator, **options)
