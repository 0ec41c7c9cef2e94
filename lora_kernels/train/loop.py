"""The training loop: steps, learning rate, accumulation, evaluation, metrics, checkpoints; one or many processes."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from lora_kernels.data.dataset import batches_by_length
from lora_kernels.methods.apply import training_hook
from lora_kernels.methods.lora import shorten
from lora_kernels.methods.modes import eval_mode
from lora_kernels.optim import LoRAPlusAdamW
from lora_kernels.train.checkpoint import (
    METHOD_STATE,
    LoopState,
    all_or_none,
    find_checkpoint,
    load_checkpoint,
    load_state,
    reading_checkpoint,
    saying_what_is_left,
    state_before,
    weights_digest,
)
from lora_kernels.train.config import TrainConfig
from lora_kernels.train.launch import check_launcher, wait_for_everyone
from lora_kernels.train.metrics import METRICS, Callback, truncate_metrics
from lora_kernels.train.steps import StepPlan
from lora_kernels.train.stopping import end_run
from lora_kernels.train.trainer import Trainer


class Dataset(Protocol):
    """Rows to train on. `lengths[i]`: tokens of row i; `loss_counts[i]`: what it adds to the divisor of the loss."""

    lengths: np.ndarray
    loss_counts: np.ndarray

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The keyword arguments of the trained module's forward for these rows."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model sees."""
        ...

    def digest(self) -> str:
        """Something that differs where the data differ."""
        ...


def make_optimizer(module: nn.Module, config: TrainConfig) -> LoRAPlusAdamW:
    """AdamW or LoRA+ over the trainable parameters of `module`, in one fused step that clips; it keeps grad_norm."""
    plain: dict[str, Any] = {"lr_ratio": 1.0, "lr_embedding": None}
    rates = {"lr_ratio": config.lr_ratio} if config.optimizer == "loraplus" else plain
    # math.inf only measures.
    rates |= {"weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm or math.inf}
    optimizer = LoRAPlusAdamW(module, config.peak_lr, **rates)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


class Loop(Trainer):
    """Trains a module whose forward returns sums over a batch: "loss", and what else is to be logged.

    The loss of an optimizer step is that sum over all micro-batches and processes divided by the `loss_counts` of their
    rows (answer tokens in SFT), so neither accumulation nor padding nor the number of processes changes it.
    """

    optimizer: LoRAPlusAdamW

    def __init__(
        self,
        module: nn.Module,
        train_set: Dataset,
        eval_set: Dataset | None,
        config: TrainConfig,
        save_adapter: Callable[[Path], None],
        accelerator: Accelerator,
        callbacks: Sequence[Callback] = (),
        show_progress: bool = True,
    ) -> None:
        check_launcher(accelerator)
        self.module, self.train_set, self.eval_set, self.save_adapter = module, train_set, eval_set, save_adapter
        plan = StepPlan(
            rows=len(train_set),
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            processes=accelerator.num_processes,
            epochs=config.epochs,
            max_steps=config.max_steps,
            seed=config.seed,
        )
        super().__init__(plan, config, accelerator, callbacks, show_progress)
        self.hook = training_hook(module, self.plan.total_steps)
        self._take_parameters()
        self.optimizer = make_optimizer(module, config)
        # Now, not at the first checkpoint: the files of `adapter` may move while it trains.
        self.run_identity = self._identity()
        self.state = LoopState()
        self.last_loss: float | None = None
        self.last_eval_loss: float | None = None

    def _take_parameters(self) -> None:
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("the model has no trainable parameters; inject adapters first")
        self.wrapped = self.accelerator.prepare(self.module)

    def _identity(self) -> dict[str, Any]:
        """What must agree for a resumed run to continue the same computation."""
        return {
            **self.config.identity,
            "dtype": str(next(self.module.parameters()).dtype).removeprefix("torch."),
            # The ranks of adalora follow the steps.
            **({"total_steps": self.plan.total_steps} if self.hook else {}),
            "batch_size": self.plan.batch_size,
            "gradient_accumulation_steps": self.plan.accumulation,
            "processes": self.plan.processes,
            "data rows": len(self.train_set),
            "data tokens": int(self.train_set.lengths.sum()),
            "data loss counts": int(self.train_set.loss_counts.sum()),
            "data digest": self.train_set.digest(),
            "digest of the frozen weights": weights_digest(self.module),
        }

    def restore(self) -> None:
        """Go back to the last checkpoint, if the configuration says to resume and there is one; else to the seed."""
        set_seed(self.config.seed, device_specific=True)
        checkpoint = find_checkpoint(self.output_dir) if self.config.resume else None
        if checkpoint:
            self.state, method_state = load_state(checkpoint, self.run_identity, LoopState, bool(self.hook))
            self._prolong()
            if self.hook:
                with reading_checkpoint(checkpoint / METHOD_STATE):
                    cut = self.hook.load_state_dict(method_state, self.optimizer, self.state.step)
                if cut:
                    self._take_parameters()
            load_checkpoint(checkpoint, self.parameters, self.optimizer, self.accelerator)
        eval_data = self.eval_set.digest() if self.eval_set is not None else None
        if self.state.eval_data != eval_data:
            # Losses of other data can't be compared.
            self.state.eval_data, self.state.best_eval_loss = eval_data, None
        if self.main:
            truncate_metrics(self.output_dir / METRICS, self.state.step)
        wait_for_everyone(self.accelerator)

    def run(self) -> None:
        """Train from where `restore` went to the end; leaves the module in eval mode.

        A signal ends it after a step and a checkpoint, see `end_run`.
        """
        self.module.train()
        self.window = Sums(self.accelerator, self.state.window if self.main else dict.fromkeys(self.state.window, 0.0))
        self.finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        self.window_seconds, self.window_tokens = 0.0, 0
        with saying_what_is_left(self.output_dir), self.progress, self.stopper:
            self.progress.update(self.state.step)
            # A signal came before the evaluation of the checkpoint's step.
            stop = self._evaluate_and_save() if self.state.evaluation_due else 0
            while not stop and self.state.step < self.plan.total_steps:
                self._step()
                stop = self._evaluate_and_save()
        if stop:
            end_run(stop, self.output_dir, say=self.main)
        self.module.eval()

    def _step(self) -> None:
        started = time.perf_counter()
        config, state = self.config, self.state
        rows = self.plan.step_rows(state.step)
        lr = self._set_lr()

        # Every process knows all rows of the step, so the divisor needs no communication. DDP averages gradients over
        # the processes; the factor makes that a sum.
        count = int(self.train_set.loss_counts[rows].sum())
        scale = self.accelerator.num_processes / count
        micro_batches = self.plan.micro_batches(rows, self.train_set.lengths, self.accelerator.process_index)
        for index, indices in enumerate(micro_batches):
            # A process without rows still has to take part in the reduction of the gradients.
            batch = self.train_set.batch(indices or rows[:1])
            share = 1.0 if indices else 0.0
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                sums = self.wrapped(**to_device(batch, self.accelerator))
                # Not accelerator.backward(), which divides once more where it was told of accumulation.
                (sums["loss"] * (scale * share)).backward()
            self.window.add(sums, share)
        if state.step == 0 and self.main:
            self._warn_of_unreached()
        extra_loss = self._add_extra_loss()
        self.optimizer.step()
        grad_norm: Any = self.optimizer.grad_norm  # a tensor, since the optimizer has a max_grad_norm
        self.finite &= torch.isfinite(grad_norm)
        state.step += 1
        if self.hook and self.hook.after_step(self.optimizer, state.step):
            self._take_parameters()
            # What was best until now is larger than what was asked for.
            state.best_eval_loss = None
        self.optimizer.zero_grad(set_to_none=True)

        tokens = int(self.train_set.lengths[rows].sum())
        state.tokens += tokens
        state.window_count += count
        self.window_tokens += tokens
        end = state.step == self.plan.total_steps
        logs = end or state.step % config.logging_steps == 0
        if logs:
            means = {name: total / state.window_count for name, total in self._window_sums().items()}
            self.last_loss = means["loss"]
        self.window_seconds += time.perf_counter() - started
        if logs:
            self._log(
                {
                    "step": state.step,
                    "epoch": self._epoch(),
                    **means,
                    "lr": lr,
                    "grad_norm": grad_norm.item(),
                    "tokens": state.tokens,
                    "tokens_per_second": round(self.window_tokens / self.window_seconds, 1),
                    **({} if extra_loss is None else {"extra_loss": extra_loss.item()}),
                    **(self.hook.metrics() if self.hook else {}),
                }
            )
            self.window = Sums(self.accelerator)
            state.window_count = 0
            self.window_seconds, self.window_tokens = 0.0, 0
        self.progress.update(state.step)

    def _warn_of_unreached(self) -> None:
        unreached = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if unreached:
            warnings.warn(
                f"no gradient in the first step: {shorten(unreached)}. An expert may have had no token; anything else "
                "is not used in training and stays as it is",
                stacklevel=2,
            )

    def _evaluate_and_save(self) -> int:
        """What is due after the state's step; returns the signal that ends the run here, or 0."""
        state, end = self.state, self.state.step == self.plan.total_steps
        stop, overdue = self.stopper.agreed()
        state.evaluation_due = self.eval_set is not None and (end or state.step % self.eval_steps == 0)
        best = False
        if self.eval_set is not None and state.evaluation_due and not stop:
            best = self._evaluate(self.eval_set)
            state.evaluation_due = False
            stop, overdue = self.stopper.agreed()
        if stop or end or overdue or state.step % self.save_steps == 0:
            self._checkpoint(best or self.eval_set is None)
            # A signal may have come while it was written, and after the last one nobody asks again.
            stop = stop or self.stopper.agreed()[0]
        elif best:
            self._save_adapter()
        return stop

    def _add_extra_loss(self) -> torch.Tensor | None:
        """Adds the gradient of the method's own loss, which is the same in every process; returns that loss."""
        if self.hook is None:
            return None
        extra_loss = self.hook.extra_loss()
        if extra_loss.requires_grad:
            # Not backward(): DistributedDataParallel has reduced the gradients already.
            parameters = list(self.parameters.values())
            grads = torch.autograd.grad(extra_loss, parameters, allow_unused=True)
            for parameter, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        return extra_loss

    def _window_sums(self) -> dict[str, float]:
        """The sums since the last log over all processes."""
        sums = self.window.over_all_processes()
        loss = sums.get("loss", 0.0)
        if not (math.isfinite(loss) and self.finite.item()):
            what = "gradient was not finite" if math.isfinite(loss) else f"loss became {loss}"
            raise FloatingPointError(
                f"the {what} in the {self.config.logging_steps} steps up to step {self.state.step}"
                f"{state_before(self.output_dir)}; a lower lr or dtype float32 may help"
            )
        return sums

    def _evaluate(self, eval_set: Dataset) -> bool:
        """Logs the means over the evaluation set; whether its loss is the best so far."""
        started = time.perf_counter()
        means = evaluate(self.module, eval_set, self.config.batch_size, self.accelerator)
        self.last_eval_loss = loss = means["loss"]
        best = loss < (math.inf if self.state.best_eval_loss is None else self.state.best_eval_loss)
        if best:
            self.state.best_eval_loss = loss
        seconds = round(time.perf_counter() - started, 3)
        means = {f"eval_{name}": mean for name, mean in means.items()}
        self._log({"step": self.state.step, "epoch": self._epoch(), **means, "eval_seconds": seconds})
        return best

    def _save_adapter(self) -> None:
        with all_or_none(self.accelerator):
            if self.main:
                self.save_adapter(self.output_dir)

    def _checkpoint(self, best: bool) -> None:
        self.state.window = self._window_sums()
        if best:
            self._save_adapter()
        self._save_state(self.save_adapter, self.hook.state_dict() if self.hook else None)

    def _epoch(self) -> float:
        return round(self.plan.seen(self.state.step) / self.plan.rows, 4)


class Sums:
    """Running sums of named scalars on the device; nothing waits for it until they are read."""

    def __init__(self, accelerator: Accelerator, start: dict[str, float] | None = None) -> None:
        self.accelerator = accelerator
        self.sums = {name: torch.tensor(value, device=accelerator.device) for name, value in (start or {}).items()}

    def add(self, values: dict[str, torch.Tensor], share: float = 1.0) -> None:
        for name, value in values.items():
            value = value.detach().float() * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def over_all_processes(self) -> dict[str, float]:
        if not self.sums:
            return {}
        total = self.accelerator.reduce(torch.stack(list(self.sums.values())), "sum")
        return dict(zip(self.sums, total.tolist(), strict=True))


def to_device(batch: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    return {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}


@torch.no_grad()
def evaluate(module: nn.Module, dataset: Dataset, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Means of what the module's forward sums in eval mode, over the dataset and all processes."""
    batches = batches_by_length(dataset.lengths, batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    sums = Sums(accelerator)
    # A process without rows still has to take part in the reduction of the sums.
    with eval_mode(module):
        for indices in mine or batches[:1]:
            sums.add(module(**to_device(dataset.batch(indices), accelerator)), 1.0 if mine else 0.0)
    count = int(dataset.loss_counts.sum())
    return {name: total / count for name, total in sums.over_all_processes().items()}
