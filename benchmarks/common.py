"""What the benchmarks share: interleaved timing, what the machine can do, memory of a step, the report's file."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_kernels import cpu
from lora_kernels.io.files import replacing


def interleave(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    base: str,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, dict[str, float]]:
    """Run all steps once a round, in a new random order every round; `timer` gives the seconds that a step takes.

    By step: median_ms and min_ms; ratio, the median of its time over that of `base` in the same round, so that a busy
    machine slows both; ratio_of_min. Without a timer the clock of the CPU is used, and a step that takes less than a
    millisecond is run several times in a row.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    repeats = {}
    for name, step in steps.items():
        step()
        repeats[name] = 1 if timer else max(1, min(20, int(1e-3 / _seconds(step))))
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            if timer:
                seconds[name].append(timer(steps[name]))
                continue
            start = time.perf_counter()
            for _ in range(repeats[name]):
                steps[name]()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {
        name: {
            "median_ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times),
            "ratio": statistics.median(t / b for t, b in zip(times, seconds[base], strict=True)),
            "ratio_of_min": min(times) / min(seconds[base]),
        }
        for name, times in seconds.items()
    }


def read_bandwidth() -> float:
    """GB/s at which this machine reads memory, the best of several sums over 256 MiB."""
    data = torch.ones(1 << 26)
    best = min(_seconds(data.sum) for _ in range(7))
    return data.nbytes / best / 1e9


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of this machine's matrix products in `dtype`, the best of several."""
    n = 1024
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2e-9 * n**3 / min(_seconds(lambda: a @ b) for _ in range(7))


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_memory(step: Callable[[], Any]) -> float:
    """MiB by which `step` raises the resident memory of this process, at its peak. Linux only."""
    # ru_maxrss is no use here: a process starts with its parent's. Linux resets its own peak on this write.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_kib("VmRSS:")
    step()
    return (_memory_kib("VmHWM:") - before) / 1024


def in_fresh_process(script: str, *arguments: str) -> str:
    """What the script prints on its last line when run with the arguments."""
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def machine() -> dict[str, str | int]:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "cpu": capabilities.get("cpu_name", platform.processor()),
        "cores": os.cpu_count() or 0,
        "isa": "none" if cpu.unavailable else cpu._C.get_isa(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "platform": platform.platform(),
        "torch": torch.__version__,
    }


def write_report(path: Path | None, results: Any, **settings: Any) -> None:
    """The results with the command, the machine and the settings, as JSON. Nothing without a path."""
    if path is not None:
        report = {"command": " ".join(sys.argv), "machine": machine(), **settings, "results": results}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
