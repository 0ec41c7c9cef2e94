"""A case of a suite, and the row that running it gives."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
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


@dataclass
class Case:
    """Contenders for one piece of work.

    work: its name; what: its sizes and options, which together with `work` name the row; steps: makes {contender:
    step}, or {contender: Worker} with processes=True; base: the contender that ratios divide by; flops: operations that
    the work takes at least, and nbytes: bytes that it must move at least, 0 for not stated; skipped: {contender: why it
    does not run}; count: what is counted per second, besides, and how many of it a step does; timed: False where only
    the memory of processes is looked at.
    """

    work: str
    what: dict[str, Any]
    steps: Callable[[], Mapping[str, Any]]
    base: str
    flops: float = 0.0
    nbytes: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    count: tuple[str, float] | None = None
    processes: bool = False
    timed: bool = True

    @property
    def name(self) -> str:
        return name_of(self.work, self.what)


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


def floor_ms(case: Case, dtype: torch.dtype) -> float | None:
    """The least time for the work: its operations or bytes at this machine's measured rates, whichever takes longer."""
    if not case.flops and not case.nbytes:
        return None
    return 1e3 * max(case.flops / product_rate(dtype), case.nbytes / read_bandwidth()) / 1e9


def run(case: Case, settings: Settings) -> dict[str, Any]:
    """The row of a case: {"work", "what", "base", "floor_ms", "contenders": {name: times and rates}, "skipped"}.

    A contender has what `interleave` gives, and, where the case states them, gflop_per_s, gb_per_s, percent_of_floor
    (floor over median: 100 is as fast as this machine can), and the count per second; one in a process of its own also
    `peak_mib` and `above_mib` of a step.
    """
    steps = dict(case.steps())
    try:
        if case.processes:
            # All at once; the first to run must not share the cores with one that still imports.
            for worker in steps.values():
                worker.ready()
        memory = {name: worker.memory() for name, worker in steps.items()} if case.processes else {}
        timer = Worker.seconds if case.processes else None
        times = {name: {} for name in steps}
        if case.timed:
            times = interleave(steps, settings.rounds, case.base, timer, settings.budget_s)
    finally:
        if case.processes:
            for worker in steps.values():
                worker.__exit__()
    floor = floor_ms(case, settings.dtype)
    for name, row in times.items():
        row |= memory.get(name, {})
        if not case.timed:
            continue
        seconds = row["median_ms"] / 1e3
        if case.flops:
            row["gflop_per_s"] = case.flops / seconds / 1e9
        if case.nbytes:
            row["gb_per_s"] = case.nbytes / seconds / 1e9
        if floor is not None:
            row["percent_of_floor"] = 100 * floor / row["median_ms"]
        if case.count is not None:
            row[f"{case.count[0]}_per_s"] = case.count[1] / seconds
    return {
        "work": case.work,
        "what": case.what,
        "base": case.base,
        "floor_ms": floor,
        "contenders": times,
        "skipped": case.skipped,
    }


Suite = Callable[[Settings], Iterator[Case]]
