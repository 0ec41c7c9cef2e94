"""Signals end a run between two steps, and a checkpoint is due after some minutes: all processes agree on both."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from lora_kernels.train.checkpoint import find_checkpoint

SAVE_SECONDS = 600.0  # longest time without a checkpoint, where save_steps is left out
# `timeout`, and a terminal that is closed, send the same signal twice at almost the same time.
_SAME_REQUEST_SECONDS = 0.25
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP call handler(number, frame), but for those that are ignored, as SIGHUP under nohup.

    Changes nothing outside of the main thread, where Python allows no handlers.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        kept = (signal.SIG_IGN, None)
        before = {number: old for number in _SIGNALS if (old := signal.getsignal(number)) not in kept}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stopper:
    """Around a run's steps: a first signal is noted for `agreed`, a second one does what signals did before.

    save_seconds: time without a checkpoint after which one is overdue. `saved` starts it anew.
    """

    def __init__(self, accelerator: Any, save_seconds: float) -> None:
        self.accelerator, self.save_seconds = accelerator, save_seconds
        self.signal, self.noted_at = 0, 0.0
        self.group = None
        self.handlers: AbstractContextManager = nullcontext()

    def __enter__(self) -> "Stopper":
        if self.accelerator.num_processes > 1:
            import torch

            # Flags on the CPU don't wait for what a GPU has still to do.
            self.group = torch.distributed.new_group(backend="gloo")
        self.saved()
        self.handlers = handling(self._note)
        self.handlers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end_handling()
        if self.group is not None:
            import torch

            torch.distributed.destroy_process_group(self.group)
            self.group = None

    def _end_handling(self) -> None:
        handlers, self.handlers = self.handlers, nullcontext()
        handlers.__exit__(None, None, None)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self.noted_at = number, now
            if self.accelerator.is_main_process:
                text = f"{signal.Signals(number).name}: stopping after this step; a second signal stops at once\n"
                # Not print(), which may be at work when the signal comes.
                os.write(2, text.encode())
        elif now - self.noted_at > _SAME_REQUEST_SECONDS:
            self._end_handling()
            signal.raise_signal(number)

    def saved(self) -> None:
        """A checkpoint was just written."""
        self.saved_at = time.monotonic()

    def agreed(self) -> tuple[int, bool]:
        """The signal that ends the run here, or 0, and whether a checkpoint is overdue. All processes must ask."""
        flags = [self.signal, int(time.monotonic() - self.saved_at >= self.save_seconds)]
        if self.group is not None:
            import torch

            largest = torch.tensor(flags)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.group)
            flags = largest.tolist()
        return flags[0], bool(flags[1])


def end_run(number: int, output_dir: str | os.PathLike, say: bool = True) -> NoReturn:
    """Say how to go on after a signal. Raises KeyboardInterrupt for SIGINT, SystemExit(128 + number) for others."""
    checkpoint = find_checkpoint(Path(output_dir))
    how = f"the same run with resume (--resume) goes on from {checkpoint}" if checkpoint else "nothing is saved yet"
    text = f"stopped by {signal.Signals(number).name}; {how}"
    if say:
        # Not print(), which may be at work when the signal comes.
        os.write(2, f"{text}\n".encode())
    if number == signal.SIGINT:
        raise KeyboardInterrupt(text)
    raise SystemExit(128 + number)


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM when the launcher dies: accelerate's passes on no signal that ends it."""
    launched = "ACCELERATE_DYNAMO_MODE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def ended_by_signals(output_dir: str | os.PathLike, say: bool = True) -> Iterator[None]:
    """For a program that is one run: it ends with 128 + the signal's number, before its first step and after too.

    say: whether to say so on stderr then, as the first of several processes should.
    """

    def end(number: int, _: Any) -> None:
        end_run(number, output_dir, say)

    try:
        with handling(end):
            _end_with_launcher()
            yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
