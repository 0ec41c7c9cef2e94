"""Measuring: interleaved timing, a contender in a process of its own, memory of a step, what the machine can do."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_kernels.backends import cpu
from lora_kernels.files import write_json

Step = Callable[[], Any]


def interleave(
    steps: Mapping[str, Any],
    rounds: int,
    base: str,
    timer: Callable[[Any], float] | None = None,
    budget_s: float = float("inf"),
) -> dict[str, dict[str, float]]:
    """Run all steps once a round, in a new random order every round; `timer` gives the seconds that a step takes.

    By step: median_ms, min_ms; low_ms and high_ms, the quartiles; ratio, the median of its time over that of `base` in
    the same round, so that a busy machine slows both; ratio_of_min. Without a timer the clock of the CPU is used, each
    step, which must have run before, runs once more first, and one that takes less than a millisecond is run several
    times in a row. Once budget_s seconds have gone by, no round begins after the third.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    repeats = {}
    if timer is None:
        for name, step in steps.items():
            repeats[name] = max(1, min(20, int(1e-3 / _seconds(step))))
    order = list(steps)
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > budget_s:
            break
        random.shuffle(order)
        for name in order:
            seconds[name].append(timer(steps[name]) if timer else _seconds(steps[name], repeats[name]))
    return {name: _summary(times, seconds[base]) for name, times in seconds.items()}


def _summary(times: list[float], base: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(times),
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "ratio": statistics.median(t / b for t, b in zip(times, base, strict=True)),
        "ratio_of_min": min(times) / min(base),
    }


def _seconds(step: Step, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


class Worker:
    """A step in a process of its own: `function`, "module:name", is called there with `arguments` and returns it.

    The process waits between its turns, so that workers can be interleaved like steps in one process, and several may
    get `ready` at a time. After a turn it gives freed memory back, so that only one of them is large at a time; it runs
    the step once before it times it, since the first one faults that memory in again. Every method raises RuntimeError
    with what the process wrote, where it fails.
    """

    def __init__(self, function: str, threads: int, **arguments: Any) -> None:
        command = [sys.executable, "-m", __name__, function, str(threads), json.dumps(arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # torch.set_num_threads speaks for the thread that calls it, and a backward pass has one of its own.
        environment["OMP_NUM_THREADS"] = str(threads)
        # A pipe that nobody reads would fill up and stop the process. Closed with the worker.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )

    def ready(self) -> None:
        """Wait until the step is made."""
        self._ask("ready")

    def _ask(self, command: str) -> Any:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError("\n".join(self._errors.read().strip().splitlines()[-4:]))
        return json.loads(answer)

    def seconds(self) -> float:
        """Run the step twice; the seconds that the second one took."""
        return self._ask("seconds")

    def memory(self) -> dict[str, float]:
        """Run the step; "peak_mib", the largest resident memory of the process in it, and "above_mib", that less what
        it had before."""
        return self._ask("memory")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (self._process.stdin, self._process.stdout, self._errors):
            # What was asked of a process that has ended is still in its buffer, and can't leave it.
            with contextlib.suppress(BrokenPipeError):
                file.close()
        self._process.wait()


def _serve(function: str, threads: str, arguments: str) -> None:
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    module, _, name = function.partition(":")
    make: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    step = make(**json.loads(arguments))

    def seconds() -> float:
        step()
        return _seconds(step)

    actions = {"ready": lambda: True, "seconds": seconds, "memory": lambda: peak_memory(step)}
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    for line in sys.stdin:
        answer = actions[line.strip()]()
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_memory(step: Step) -> dict[str, float]:
    """See `Worker.memory`; of this process. Linux only."""
    # ru_maxrss is no use here: a process starts with its parent's. Linux resets its own peak on this write.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_kib("VmRSS:")
    step()
    peak = _memory_kib("VmHWM:")
    return {"peak_mib": peak / 1024, "above_mib": (peak - before) / 1024}


@functools.cache
def read_bandwidth() -> float:
    """GB/s at which this machine reads memory, the best of several sums over 256 MiB."""
    data = torch.ones(1 << 26)
    best = min(_seconds(data.sum) for _ in range(25))
    return data.nbytes / best / 1e9


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of this machine's matrix products of `dtype`, the best of several; in float32 where that is faster."""
    n = 1024
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    # A second at most: without instructions for it, a product in bfloat16 takes as long.
    times = [_seconds(lambda: a @ b)]
    while len(times) < 25 and sum(times) < 1:
        times.append(_seconds(lambda: a @ b))
    rate = 2e-9 * n**3 / min(times)
    return rate if dtype == torch.float32 else max(rate, product_rate(torch.float32))


def _cpu_model() -> str:
    """Name, family, model and stepping as Linux has them: virtual machines name several generations alike."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    found = [fields.get(key) for key in ("model name", "cpu family", "model", "stepping")]
    return "{} family {} model {} stepping {}".format(*found) if all(found) else ""


def machine() -> dict[str, str | int]:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "cpu": _cpu_model() or capabilities.get("cpu_name", platform.processor()),
        "cores": os.cpu_count() or 0,
        "isa": "none" if cpu.unavailable else cpu.isa(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "platform": "-".join(filter(None, (platform.system(), platform.machine(), "".join(platform.libc_ver())))),
        "torch": torch.__version__,
    }


def write_report(path: Path, results: Any, **settings: Any) -> None:
    """The results with the command, the machine and the settings, as JSON."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    write_json(path, {"command": command, "machine": machine(), **settings, "results": results})


if __name__ == "__main__":
    _serve(*sys.argv[1:])
