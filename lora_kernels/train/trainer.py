"""What every trainer has, whatever a step of it is: a plan of its steps, learning rates, records, checkpoints."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_kernels.files import append
from lora_kernels.train.checkpoint import save_checkpoint, saved_run
from lora_kernels.train.config import TrainConfig
from lora_kernels.train.metrics import METRICS, Callback
from lora_kernels.train.progress import Progress
from lora_kernels.train.steps import StepPlan, lr_factor, prolonged
from lora_kernels.train.stopping import SAVE_SECONDS, Stopper


class Trainer:
    """The steps of `plan`, and what is due between them.

    What a subclass has to have: `parameters`, those that are trained by name; `optimizer`, whose groups have their
    "peak_lr"; `run_identity`, what a resumed run must have in common with this one; `state`, a dataclass with `step`
    and `short`.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    run_identity: dict[str, Any]
    state: Any

    def __init__(
        self,
        plan: StepPlan,
        config: TrainConfig,
        accelerator: Accelerator,
        callbacks: Sequence[Callback],
        show_progress: bool,
    ) -> None:
        self.config, self.accelerator, self.callbacks = config, accelerator, list(callbacks)
        self.main = accelerator.is_main_process
        self.show_progress = show_progress and self.main
        self.output_dir = Path(config.output_dir)
        self._follow(plan)
        per_epoch = max(1, round(plan.rows / plan.sequences_per_step))
        self.eval_steps, self.save_steps = config.eval_steps or per_epoch, config.save_steps or per_epoch
        self.stopper = Stopper(accelerator, math.inf if config.save_steps else SAVE_SECONDS)

    def _follow(self, plan: StepPlan) -> None:
        self.plan = plan
        self.warmup_steps = math.ceil(self.config.warmup_ratio * plan.total_steps)
        self.progress = Progress(plan.total_steps, enabled=self.show_progress)

    def _prolong(self) -> None:
        """Follow the plan from the state of a checkpoint, whose run may have had another one."""
        plan, changed = prolonged(self.plan, self.state, saved_run(self.output_dir), self.config)
        self._follow(plan)
        self.progress.say(changed)

    def _set_lr(self) -> float:
        """Gives the optimizer the learning rates of the next step; returns that of the settings' lr."""
        factor = lr_factor(self.state.step, self.plan.total_steps, self.warmup_steps, self.config.lr_scheduler)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.config.peak_lr * factor

    def _save_state(
        self, save_adapter: Callable[[Path], None], method_state: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Writes checkpoint-last/; see `save_checkpoint`."""
        run = {**self.run_identity, **self.plan.identity}
        arguments = (self.state, run, self.accelerator, save_adapter, method_state)
        save_checkpoint(self.output_dir, self.parameters, self.optimizer, *arguments)
        self.stopper.saved()

    def _log(self, record: dict[str, Any]) -> None:
        """Writes a record to metrics.jsonl, and hands it to whoever asked for it."""
        if not self.main:
            return
        append(self.output_dir / METRICS, json.dumps(record) + "\n")
        self.progress.log(record)
        for callback in self.callbacks:
            callback(record)
