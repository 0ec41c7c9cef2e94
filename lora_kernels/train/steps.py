"""The steps of a run: how many there are, which rows each sees, its learning rate."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_kernels.train.config import TrainConfig


def lr_factor(step: int, total_steps: int, warmup_steps: int, scheduler: str) -> float:
    """The learning rate of step `step` (from 0) as a fraction of the peak.

    (step + 1) / warmup_steps in the warm-up, whose last step is at the peak; then, with
    t = (step - warmup_steps) / (total_steps - warmup_steps): (1 + cos(pi t)) / 2, 1 - t, or 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "constant": 1.0}[scheduler]


@dataclass(frozen=True)
class StepPlan:
    """Which rows each optimizer step, micro-batch and process sees: a pure function of the step, so resuming is exact.

    Step s takes rows [s G, (s + 1) G) of the epochs' permutations laid end to end, G = batch_size * accumulation *
    processes; the last step takes what is left. The rows of a step do not depend on how G is made up. Where a run goes
    on after a last step that was `short` by some rows, each later step starts so much earlier.
    """

    rows: int
    batch_size: int
    accumulation: int
    processes: int
    epochs: float
    max_steps: int | None
    seed: int
    short: int = 0

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    @property
    def sequences(self) -> int:
        if self.max_steps:
            return self.max_steps * self.sequences_per_step - self.short
        # 2.2 · 50 is a little more than 110.
        return math.ceil(round(self.epochs * self.rows, 6))

    @property
    def total_steps(self) -> int:
        return math.ceil((self.sequences + self.short) / self.sequences_per_step)

    @property
    def identity(self) -> dict[str, int]:
        """What `prolonged` has to know of the plan of the run that it goes on with."""
        return {"total_steps": self.total_steps, "sequences": self.sequences}

    def step_rows(self, step: int) -> list[int]:
        """Row indices of one optimizer step over all processes."""
        start = step * self.sequences_per_step - self.short
        end = min(start + self.sequences_per_step, self.sequences)
        rows = []
        while start < end:
            epoch, offset = divmod(start, self.rows)
            taken = min(end - start, self.rows - offset)
            rows += _permutation(self.rows, self.seed, epoch)[offset : offset + taken].tolist()
            start += taken
        return rows

    def seen(self, step: int) -> int:
        """Rows in the steps before `step`."""
        return min(step * self.sequences_per_step - self.short, self.sequences)

    def micro_batches(self, rows: Sequence[int], lengths: np.ndarray, process: int) -> list[list[int]]:
        """This process's share of a step's rows; equally many micro-batches on each process, some maybe empty.

        Rows of like length go together: the step's gradient is the same, with less padding.
        """
        rows = sorted(rows, key=lambda row: -lengths[row])
        stride = self.batch_size * self.processes
        first = range(0, len(rows), stride)
        return [rows[at : at + stride][process :: self.processes] for at in first]


def prolonged(plan: StepPlan, state: Any, saved: dict[str, Any], config: TrainConfig) -> tuple[StepPlan, str]:
    """The plan of a run that goes on from `state`, and what to say where the run was `saved` with another plan.

    Sets state.short by how much the last step of that plan was short. Raises ValueError where more steps are done than
    the new plan has.
    """
    plan = dataclasses.replace(plan, short=state.short)
    if plan.total_steps < state.step:
        asked = f"max_steps {config.max_steps}" if config.max_steps else f"epochs {config.epochs:g}"
        raise ValueError(
            f"can't resume {config.output_dir}: {asked} is {plan.total_steps} steps, and {state.step} are done; "
            f"allowed: {state.step} steps or more"
        )
    before = saved.get("sequences", plan.sequences)
    if before == plan.sequences or state.step == plan.total_steps:
        return plan, ""
    state.short += max(0, state.step * plan.sequences_per_step - plan.short - before)
    plan = dataclasses.replace(plan, short=state.short)
    return plan, (
        f"the run has {plan.total_steps} steps now, {saved['total_steps']} when its checkpoint was written; "
        f"the learning rate follows the new number from step {state.step + 1} on"
    )


_cached_permutation: tuple[tuple[int, int, int], np.ndarray] | None = None


def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    global _cached_permutation
    key = (rows, seed, epoch)
    if _cached_permutation is None or _cached_permutation[0] != key:
        _cached_permutation = (key, np.random.default_rng([seed, epoch]).permutation(rows))
    return _cached_permutation[1]
