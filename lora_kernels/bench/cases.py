"""A case of a suite, and the row that running it gives."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_kernels.bench.measure import Worker, interleave, product_rate, read_bandwidth

# model -> (out, in) of its attention, grouped-query and MLP layers
LAYERS = {
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "Llama-3.2-1B": [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
    "Qwen2.5-7B": [(3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)],
    "Llama-3.1-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}
DROPOUT_P = 0.1
SCALING = 2.0


@dataclass(frozen=True)
class Settings:
    """What the user chose. rounds: times that each contender runs; budget_s: see `interleave`."""

    dtype: torch.dtype = torch.float32
    threads: int = 2
    rounds: int = 11
    budget_s: float = 20.0
    quick: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass
class Case:
    """Contenders for one piece of work.

    work: its name; what: its sizes and options, which together with `work` name the row; steps: {contender: a function
    that makes its step, or its Worker with processes=True}; base: the contender that ratios divide by; flops:
    operations that the work takes at least, and nbytes: bytes that it must move at least, 0 for not stated; skipped:
    {contender: why it does not run}; tokens: how many a step handles, 0 for not stated; timed: False where only the
    memory of processes is looked at.
    """

    work: str
    what: dict[str, Any]
    steps: Mapping[str, Callable[[], Any]]
    base: str
    flops: float = 0.0
    nbytes: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    processes: bool = False
    timed: bool = True

    @property
    def name(self) -> str:
        return name_of(self.work, self.what)

    def run(self, settings: Settings) -> dict[str, Any]:
        """The row: {"work", "what", "base", "floor_ms", "contenders": {name: times and rates}, "skipped", "failed"}.

        A contender has what `interleave` gives, and, where the case states them, gflop_per_s, gb_per_s,
        percent_of_floor (floor over median; see `floor_ms`) and tokens_per_s; one in a process of its own also
        `peak_mib` and `above_mib` of a step. One whose first step fails is in "failed", {name: why}, and the others go
        on. Raises RuntimeError where that is the base.
        """
        contenders: dict[str, dict[str, float]] = {name: {} for name in self.steps}
        failed: dict[str, str] = {}
        with ExitStack() as stack:

            def each(action: Callable[[str], Any]) -> dict[str, Any]:
                done = {}
                for name in (name for name in self.steps if name not in failed):
                    try:
                        done[name] = action(name)
                    except Exception as error:
                        failed[name] = f"{type(error).__name__}: {error}"
                return done

            steps = each(lambda name: self.steps[name]())
            if self.processes:
                for worker in steps.values():
                    stack.enter_context(worker)
                # All at once; the first to run must not share the cores with one that still imports.
                each(lambda name: steps[name].ready())
                contenders = each(lambda name: steps[name].memory())
            else:
                each(lambda name: steps[name]())
            if self.base in failed:
                raise RuntimeError(f"{self.base}: {failed[self.base]}")
            if self.timed:
                timer = Worker.seconds if self.processes else None
                left = {name: step for name, step in steps.items() if name not in failed}
                times = interleave(left, settings.rounds, self.base, timer, settings.budget_s)
                contenders = {name: contenders[name] | row for name, row in times.items()}
        floor = floor_ms(self, settings.dtype)
        if self.timed:
            for row in contenders.values():
                row |= self._rates(row["median_ms"], floor)
        return {
            "work": self.work,
            "what": self.what,
            "base": self.base,
            "floor_ms": floor,
            "contenders": contenders,
            "skipped": self.skipped,
            "failed": failed,
        }

    def _rates(self, median_ms: float, floor: float | None) -> dict[str, float]:
        seconds = median_ms / 1e3
        stated = {
            "gflop_per_s": self.flops / seconds / 1e9,
            "gb_per_s": self.nbytes / seconds / 1e9,
            "percent_of_floor": 100 * (floor or 0.0) / median_ms,
            "tokens_per_s": self.tokens / seconds,
        }
        return {name: rate for name, rate in stated.items() if rate}


def name_of(work: str, what: Mapping[str, Any]) -> str:
    """What a case is called: the same in each run."""
    return " ".join([work, *(f"{key}={value}" for key, value in what.items())])


def missing(*modules: str) -> str | None:
    """Why a contender that needs `modules` can't run, or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def split(reasons: Mapping[str, str | None]) -> tuple[list[str], dict[str, str]]:
    """The contenders without a reason not to run, and the reasons of the others."""
    return [name for name, why in reasons.items() if why is None], {name: why for name, why in reasons.items() if why}


def workers(
    function: str, names: Iterable[str], settings: Settings, arguments: Callable[[], Mapping[str, Any]]
) -> dict[str, Callable[[], Worker]]:
    """`steps` of a case with processes=True: `function` makes the step of each contender; see `Worker`. Its arguments
    are asked for when the case runs."""

    def worker(name: str) -> Worker:
        return Worker(function, settings.threads, contender=name, dtype=settings.dtype_name, **arguments())

    return {name: functools.partial(worker, name) for name in names}


def floor_ms(case: Case, dtype: torch.dtype) -> float | None:
    """The time for the work at this machine's measured rates: its operations by torch's product, or its bytes, of a
    dense weight, from memory, whichever takes longer. A better product, a weight in 4 bits or one that stays in a cache
    goes below."""
    if not case.flops and not case.nbytes:
        return None
    return 1e3 * max(case.flops / product_rate(dtype), case.nbytes / read_bandwidth()) / 1e9
