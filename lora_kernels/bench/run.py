"""`lora-kernels bench`: the suites, one case after the other, kept as they are done."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.bench import adamw, attention, lora_linear, memory, nf4, report, traffic, train
from lora_kernels.bench.cases import Settings, name_of
from lora_kernels.bench.measure import machine, product_rate, read_bandwidth, write_report

# Functions that yield what has a name and makes its row: cases, and traffic's own.
SUITES: dict[str, tuple[Callable[[Settings], Iterator[Any]], ...]] = {
    "ops": (lora_linear.cases, attention.cases, nf4.cases, adamw.cases),
    "train": (train.cases,),
    "memory": (memory.cases,),
    "traffic": (traffic.cases,),
}
RESULTS = "results.json"


def bench(
    suites: Sequence[str],
    settings: Settings,
    output_dir: Path,
    only: str | None = None,
    show: Callable[[str], None] = print,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Run the suites and write results.json, .csv, .md and .png, and growth.png, to output_dir.

    Returns the rows, and what failed: {case, or "case, contender": why}. The others go on. only: a regular expression;
    cases whose name it does not match are left out. Raises ValueError for an unknown suite, or where `only` is no
    regular expression or matches no case.
    """
    try:
        wanted = re.compile(only or "")
    except re.error as error:
        raise ValueError(f"only is {only!r}; it must be a regular expression: {error}") from None
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"suite is {suite!r}; allowed: {', '.join(SUITES)}")
    torch.set_num_threads(settings.threads)
    random.seed(0)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    said = {
        "dtype": settings.dtype_name,
        "threads": settings.threads,
        "rounds": settings.rounds,
        "quick": settings.quick,
    }
    said |= {"read_gb_per_s": read_bandwidth(), "product_gflop_per_s": product_rate(settings.dtype)}
    for suite in suites:
        for make in SUITES[suite]:
            for case in make(settings):
                if not wanted.search(case.name):
                    continue
                now: dict[str, str] = {}
                try:
                    rows.append(case.run(settings))
                    show(_line(rows[-1]))
                    now = {f"{case.name}, {name}": why for name, why in rows[-1].get("failed", {}).items()}
                except Exception as error:
                    now = {case.name: f"{type(error).__name__}: {error}"}
                for name, why in now.items():
                    show(f"{name}: failed: {why}")
                failed |= now
                # Kept after each case, for a run that is killed.
                write_report(output_dir / RESULTS, rows, **said, failed=failed)
    if not rows and not failed:
        raise ValueError(f"only is {only!r}; no case of {', '.join(suites)} has such a name")
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    rates = f"reads {said['read_gb_per_s']:.3g} GB/s, multiplies {said['product_gflop_per_s']:.3g} GFLOP/s"
    options = (
        f"{settings.dtype_name}, {settings.threads} threads, medians of up to {settings.rounds} interleaved rounds"
    )
    report.write(rows, output_dir, f"# Benchmark\n\n{options}. Machine: {about}; {rates}.")
    return rows, failed


def _line(row: dict[str, Any]) -> str:
    """A row in one line: the median of the base, and what the others take over it."""
    parts = []
    for name, values in row["contenders"].items():
        if "MK" in values:
            parts.append(f"{name} {values['MK']} MK + {values['MN']} MN")
            continue
        text = name
        if "median_ms" in values:
            text += f" {values['median_ms']:.3g} ms" if name == row["base"] else f" {values['ratio']:.3g}"
        if "tokens_per_s" in values:
            text += f" ({values['tokens_per_s']:.3g} tokens/s, peak {values['peak_mib']:.0f} MiB)"
        elif "above_mib" in values:
            text += f" {values['above_mib']:.0f} MiB"
        parts.append(text)
    return f"{name_of(row['work'], row['what'])}: {', '.join(parts)}"
