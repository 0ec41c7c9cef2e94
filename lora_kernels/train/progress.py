"""What a user sees while training: a bar on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich import progress
from rich.console import Console


class Progress:
    """Steps done, last loss, tokens per second, time left. Use as a context manager."""

    def __init__(self, total_steps: int, enabled: bool = True) -> None:
        self.total_steps, self.enabled = total_steps, enabled
        self.console = Console(stderr=True)
        self.started = time.perf_counter()
        self.first_step: int | None = None
        self.fields = {"loss": "-", "eval_loss": "-", "speed": "-", "extra": ""}
        self.bar = None
        if enabled and self.console.is_terminal:
            self.bar = progress.Progress(
                progress.TextColumn("step"),
                progress.MofNCompleteColumn(),
                progress.BarColumn(),
                progress.TextColumn(
                    "loss {task.fields[loss]} | eval {task.fields[eval_loss]}{task.fields[extra]} | "
                    "{task.fields[speed]} tok/s"
                ),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("train", total=total_steps, **self.fields)

    def __enter__(self) -> "Progress":
        self.started = time.perf_counter()
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        """Show a line, if there is any text."""
        if self.enabled and text:
            self.console.print(text, highlight=False, soft_wrap=True)

    def update(self, step: int) -> None:
        if self.first_step is None:
            self.first_step = step
        if self.bar:
            self.bar.update(self.task, completed=step)

    def log(self, record: dict[str, Any]) -> None:
        """Show a metrics record."""
        if not self.enabled:
            return
        if "loss" in record:
            self.fields |= {"loss": f"{record['loss']:.4f}", "speed": f"{record['tokens_per_second']:.0f}"}
        if "average_rank" in record:
            self.fields["extra"] = f" | rank {record['average_rank']:.2f}"
        if "objective/scores" in record:
            self.fields["extra"] = f" | score {record['objective/scores']:.3f} | KL {record['objective/kl']:.3f}"
        if "eval_loss" in record:
            self.fields["eval_loss"] = f"{record['eval_loss']:.4f}"
        if self.bar:
            self.bar.update(self.task, **self.fields)
            return
        if "eval_loss" in record:
            text = f"eval loss {record['eval_loss']:.4f}"
        elif "eval_score" in record:
            text = f"eval score {record['eval_score']:.4f}"
        else:
            done = record["step"] - (self.first_step or 0)
            left = (time.perf_counter() - self.started) / max(1, done) * (self.total_steps - record["step"])
            text = (
                f"loss {self.fields['loss']}{self.fields['extra']} | lr {record['lr']:.2e} | "
                f"{self.fields['speed']} tok/s | {left:.0f} s left"
            )
        self.console.print(f"step {record['step']}/{self.total_steps} | {text}", highlight=False, soft_wrap=True)
