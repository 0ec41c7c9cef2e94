"""One command for a machine with a GPU: build, test, look for races, time against the peers. Under 8 minutes.

    python benchmarks/gpu_check.py                  # writes outputs/gpu_check/result.json and result.png
    python benchmarks/gpu_check.py --dry            # on any machine: tiny shapes, the CPU backend, a timer made up

Each stage runs in its own process with a time limit, so that whatever fails, the rest is done and all of it reported:

  environment  the GPU, its driver, versions, which backends can run
  build        the extension with its CUDA C++ kernels for this GPU, in place
  tests        tests/backends/test_gpu.py, the kernels on the device against float64, a process for each implementation
  memcheck     a few of them under compute-sanitizer, where it is installed: accesses out of bounds
  racecheck    the same, but for cuBLAS: races in shared memory
  dense, nf4   times of one layer, as a ratio over the bare frozen linear (the dense one, also for NF4)
  groups       the same of layers that read one x (q/k/v; gate and up): together, and apart
  kernels      the time of each kernel of a few layers, for docs/speed_model.md to be compared with
  rounding     how much of a small update arrives in y, by each contender
  steps        whole training steps of two models with random weights, and their peak of memory
  plot         the PNG

The tests and the sanitizer run side by side, what is timed alone. Times are medians of CUDA events around one step,
with the L2 cache overwritten before, launches queued ahead of the GPU, and all contenders interleaved. M of 1 and 16
is a forward without dropout, 512 and 4096 forward and backward with dropout 0.1 (but for addmm, which has none).
Contenders, skipped with the reason where they can't run:

  bare     F.linear with the frozen weight: cuBLAS alone
  ours     lora_kernels.lora_linear as users get it, its strategy measured before
  triton, cuda, vendor    the same, each implementation by itself
  addmm    cuBLAS and beta=1 addmm of the low-rank term into a rounded y (fast, and it loses small updates)
  peft     PEFT's LoRA layer, on bitsandbytes' Linear4bit for NF4
  unsloth  Unsloth's fused LoRA layer, on bitsandbytes' format for NF4
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
# The package of this checkout, which is what the build stage builds, whether it is installed or not.
sys.path.insert(0, str(ROOT))

from lora_kernels import backends, lora_linear, quantize_nf4  # noqa: E402
from lora_kernels.backends import choice as strategy  # noqa: E402
from lora_kernels.backends.triton import vendor  # noqa: E402
from lora_kernels.bench.cases import DROPOUT_P, LAYERS, SCALING, missing, split  # noqa: E402
from lora_kernels.bench.measure import interleave, machine, write_report  # noqa: E402
from lora_kernels.bench.peers import AddmmLoRA, peft_layer, peft_nf4_layer  # noqa: E402
from lora_kernels.files import replacing  # noqa: E402

TOTAL_SECONDS = 465
# {stage: its limit in seconds}, in their order, those that run at the same time together; what is left of the total may
# be less.
GROUPS = [{"environment": 90}, {"build": 150}, {"tests": 120, "memcheck": 120, "racecheck": 120}, {"dense": 75},
          {"nf4": 75}, {"groups": 50}, {"kernels": 40}, {"rounding": 30}, {"steps": 85}, {"plot": 60}]  # fmt: skip
STAGES = {stage: limit for group in GROUPS for stage, limit in group.items()}
# What needs no GPU: to say that there is none, and to draw what there is.
ANYWHERE = ("environment", "plot")
IMPLEMENTATIONS = ("triton", "cuda", "vendor")
CONTENDERS = ("bare", "ours", *IMPLEMENTATIONS, "addmm", "peft", "unsloth")

DRY_LAYERS = {"tiny": [(48, 64), (64, 32)]}
# (M, r), the most telling ones first, should time run out
SIZES = [(4096, 16), (1, 16), (512, 16), (16, 16), (4096, 64), (1, 64), (512, 64), (16, 64)]
DRY_SIZES = [(33, 4), (1, 4)]
FEW_ROWS = 16
# (N, K, R) and M of the layers whose kernels are timed one by one
KERNELS_OF, KERNELS_OF_ROWS = (4096, 4096, 16), (4096, 16, 1)
GROUP_CONTENDERS = ("bare", "ours", "ours-apart", "peft", "ours-nf4", "ours-nf4-apart")
GROUP_ROWS, GROUP_RANK = (4096, 512, 1), 16


def gpu_timer() -> Callable[[Callable[[], Any]], float]:
    """A function that gives the seconds that a step takes on the GPU."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    # step -> clocks for which the GPU is kept busy while the CPU queues the step, so that what is timed is not Python
    clocks: WeakKeyDictionary[Callable[[], Any], int] = WeakKeyDictionary()

    def timer(step: Callable[[], Any]) -> float:
        while True:
            busy = clocks.setdefault(step, 500_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(busy)
            start.record()
            step()
            end.record()
            was_late = start.query()
            end.synchronize()
            # A step that waits for the GPU itself is late however long that is.
            if not was_late or busy > 8_000_000:
                return start.elapsed_time(end) / 1e3
            clocks[step] = 2 * busy

    return timer


def dry_timer(step: Callable[[], Any]) -> float:
    step()
    return 1e-3


@contextmanager
def _vendor_strategy() -> Iterator[None]:
    previous = os.environ.get(strategy.ENVIRONMENT_VARIABLE)
    os.environ[strategy.ENVIRONMENT_VARIABLE] = "vendor"
    try:
        yield
    finally:
        del os.environ[strategy.ENVIRONMENT_VARIABLE]
        if previous is not None:
            os.environ[strategy.ENVIRONMENT_VARIABLE] = previous


def why_not(contender: str, kind: str, dry: bool) -> str | None:
    """Why a contender can't run here, or None."""
    if contender in ("triton", "cuda"):
        return "a dry run times the CPU backend only" if dry else backends.available()[contender]
    if contender == "vendor":
        return "a dry run has no vendor's product" if dry else vendor.unsupported(torch.bfloat16)
    if contender == "addmm" and kind == "nf4":
        return "addmm takes no NF4 weight"
    modules = {"peft": ["peft"], "unsloth": ["unsloth", "unsloth_zoo"]}.get(contender, [])
    if dry and contender == "unsloth":
        return "it needs a GPU"
    if contender == "unsloth" or (contender == "peft" and kind == "nf4"):
        modules.append("bitsandbytes")
    return missing(*modules)


def make_step(contender: str, kind: str, inputs: dict[str, torch.Tensor], frozen: Any) -> Callable[[], Any]:
    """One forward, and backward where there are many rows; `inputs` has float32 adapters, `frozen` is the weight."""
    x, weight = inputs["x"], inputs["weight"]
    (M, _), R = x.shape, inputs["lora_a"].shape[0]
    train = M > FEW_ROWS
    x = x.clone().requires_grad_(train)
    adapters = [inputs[name].clone().requires_grad_(train) for name in ("lora_a", "lora_b")]
    dropout_p = DROPOUT_P if train else 0.0
    context: Callable[[], AbstractContextManager] = nullcontext
    if contender == "bare":
        forward, adapters = lambda: F.linear(x, weight), []
    elif contender == "addmm":
        adapters = [adapter.detach().to(x.dtype).requires_grad_(train) for adapter in adapters]
        forward = lambda: AddmmLoRA.apply(x, weight, *adapters)  # noqa: E731
    elif contender == "peft":
        layer = (peft_nf4_layer if kind == "nf4" else peft_layer)(weight, R).train(train)
        forward, adapters = lambda: layer(x), [p for p in layer.parameters() if p.requires_grad]
    elif contender == "unsloth":
        from lora_kernels.bench.unsloth_peer import unsloth_decode_layer, unsloth_layer

        options = {"dropout_p": dropout_p} if train else {}
        layer = (unsloth_layer if train else unsloth_decode_layer)(weight, *adapters, nf4=kind == "nf4", **options)
        forward = lambda: layer(x)  # noqa: E731
    else:
        forward = lambda: lora_linear(x, frozen, *adapters, SCALING, dropout_p=dropout_p)  # noqa: E731
        if contender == "vendor":
            context = _vendor_strategy
        elif contender != "ours":
            context = functools.partial(backends.use_backend, contender)
    dy = torch.ones(M, weight.shape[0], dtype=x.dtype, device=x.device) if train else None

    def step() -> None:
        with context():
            if train:
                torch.autograd.grad(forward(), [x, *adapters], dy)
            else:
                with torch.no_grad():
                    forward()

    return step


def make_inputs(M: int, N: int, K: int, R: int, device: str) -> dict[str, torch.Tensor]:
    """bfloat16 x and weight, float32 adapters, made on the device: the CPU's generator would take longer than all that
    is timed."""
    shapes = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
    inputs = {name: torch.randn(shape, device=device) * shape[1] ** -0.5 for name, shape in shapes.items()}
    return inputs | {name: inputs[name].bfloat16() for name in ("x", "weight")}


def run_timings(kind: str, work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    torch.manual_seed(0)
    device = "cpu" if dry else "cuda"
    timer = dry_timer if dry else gpu_timer()
    reasons = {contender: why_not(contender, kind, dry) for contender in CONTENDERS}
    report: dict[str, Any] = {"skipped": {name: reason for name, reason in reasons.items() if reason}, "rows": []}
    layers, sizes = (DRY_LAYERS, DRY_SIZES) if dry else (LAYERS, SIZES)
    rows = [(M, R, model, N, K) for M, R in sizes for model, shapes in layers.items() for N, K in shapes]
    for done, (M, R, model, N, K) in enumerate(rows):
        if time.time() > deadline:
            report["left_out"] = f"time ran out: the last {len(rows) - done} of {len(rows)} rows"
            break
        row: dict[str, Any] = {"model": model, "M": M, "N": N, "K": K, "R": R, "failed": {}}
        inputs = make_inputs(M, N, K, R, device)
        frozen = quantize_nf4(inputs["weight"]) if kind == "nf4" else inputs["weight"]
        steps = {}
        for contender in (name for name in CONTENDERS if reasons[name] is None):
            try:
                step = make_step(contender, kind, inputs, frozen)
                step()
                if not dry:
                    torch.cuda.synchronize()
                steps[contender] = step
            except Exception as error:
                row["failed"][contender] = f"{type(error).__name__}: {str(error)[:300]}"
        row["contenders"] = interleave(steps, 2 if dry else 11, "bare", timer) if "bare" in steps else {}
        report["rows"].append(row)
        # Kept after each row, for a process that is killed.
        save(work / f"{kind}.json", report)
    return report


def run_groups(work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    from lora_kernels.bench.lora_linear import GROUPS, group_step

    timer, device = (dry_timer, "cpu") if dry else (gpu_timer(), "cuda")
    names, skipped = split(
        {name: why_not("peft", "dense", dry) if name == "peft" else None for name in GROUP_CONTENDERS}
    )
    models = (
        {"tiny": [((48, 16, 16), 64)]} if dry else {name: GROUPS[name] for name in ("Llama-3.2-1B", "Llama-3.1-8B")}
    )
    report: dict[str, Any] = {"skipped": skipped, "R": GROUP_RANK, "rows": []}
    cases = [(model, M, N, K) for M in GROUP_ROWS for model, groups in models.items() for N, K in groups]
    for model, M, N, K in cases:
        if time.time() > deadline:
            report["left_out"] = "time ran out"
            break
        options = {"M": M, "N": N, "K": K, "R": GROUP_RANK, "dropout_p": DROPOUT_P if M > FEW_ROWS else 0.0}
        steps = {name: group_step(name, **options, dtype=torch.bfloat16, device=device) for name in names}
        for step in steps.values():
            step()
        contenders = interleave(steps, 2 if dry else 11, "bare", timer)
        report["rows"].append({"model": model, **options, "contenders": contenders})
        save(work / "groups.json", report)
    return report


def run_environment(work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": machine(), "backends": backends.available()}
    for package in ("triton", "peft", "bitsandbytes", "unsloth"):
        # Not by importing them, which takes longer than all the rest of this stage.
        found[package] = importlib.metadata.version(package) if importlib.util.find_spec(package) else None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "capability": f"{properties.major}{properties.minor}"}
        found |= {"gpus": torch.cuda.device_count(), "cuda_of_torch": torch.version.cuda}
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    if (smi := shutil.which("nvidia-smi")) is not None:
        query = [smi, "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    if not dry and "gpu" not in found:
        raise SystemExit("torch sees no GPU here; `--dry` runs without one")
    return found


def call(command: list[str], deadline: float, **environment: str) -> str:
    """What the command prints, its last lines; SystemExit with them where it fails."""
    print("$", *command, flush=True)
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=max(1.0, deadline - time.time()),
    )  # fmt: skip
    tail = "\n".join(result.stdout.strip().splitlines()[-25:])
    if result.returncode:
        raise SystemExit(f"{tail}\nexit status {result.returncode}")
    return tail


def run_build(work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    archs = "none"
    if not dry:
        major, minor = torch.cuda.get_device_capability()
        archs = f"{major}{minor}" + ("a" if major == 9 else "")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    output = call(command, deadline, LORA_KERNELS_CUDA_ARCHS=archs)
    return {"archs": archs, "without_cuda": next((line for line in output.splitlines() if "without" in line), None)}


def pytest_command(*options: str) -> list[str]:
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/test_gpu.py", *options]


def run_tests(work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    """A process for each implementation, or some: after an error on the device nothing more runs in one that had it.

    Most of their time goes to compiling.
    """
    summaries, failures = {}, []
    workers = (os.cpu_count() or 1) // (2 * len(IMPLEMENTATIONS))
    parallel = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    with ThreadPoolExecutor(len(IMPLEMENTATIONS)) as pool:
        chosen = {name: name for name in IMPLEMENTATIONS} | {"triton": "triton or decoder"}
        commands = {name: pytest_command("-rfE", *parallel, "-k", which) for name, which in chosen.items()}
        runs = {name: pool.submit(call, command, deadline, TRITON_INTERPRET="0") for name, command in commands.items()}
        for name, run in runs.items():
            try:
                summaries[name] = run.result().splitlines()[-1]
            except (SystemExit, subprocess.TimeoutExpired) as failure:
                summaries[name] = "failed"
                failures.append(f"{name}: {failure}")
    save(work / "tests.json", summaries)
    if failures:
        raise SystemExit("\n\n".join(failures))
    return summaries


def run_sanitizer(tool: str, work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        raise Skipped("compute-sanitizer is not installed")
    if dry:
        raise Skipped("a dry run has no device to watch")
    options = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    chosen = (
        "(63x65x129 or x63x129 or 16x65x4104 or 300x40x8200 or 1030x72 or transposed or mask or (adamw and not graph))"
    )
    if tool == "racecheck":
        # It reports hazards inside cuBLAS's own kernels (nvjet_*), which the vendor's implementation runs.
        chosen += " and not vendor"
    command = [*options, *pytest_command("-k", chosen)]
    # Torch's caching allocator would hide what lies between two tensors.
    return {"tail": call(command, deadline, TRITON_INTERPRET="0", PYTORCH_NO_CUDA_MEMORY_CACHING="1")}


def kernels_of(step: Callable[[], Any], flush: torch.Tensor) -> list[list[Any]]:
    """[[kernel, µs], ...] of a step in their order, medians of several steps; `flush` is overwritten before each."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        step()
    steps = []
    for _ in range(7):
        flush.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda event: event.time_range.start)
        steps.append([(event.name[:100], event.time_range.elapsed_us()) for event in events])
    steps = [step for step in steps if len(step) == len(steps[-1])]
    return [
        [name, round(statistics.median(step[at][1] for step in steps), 2)] for at, (name, _) in enumerate(steps[-1])
    ]


def run_kernels(work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    """{kind, M: {contender: what `kernels_of` gives, or why it failed}}"""
    if dry:
        raise Skipped("a dry run has no device to watch")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    N, K, R = KERNELS_OF
    inputs = make_inputs(max(KERNELS_OF_ROWS), N, K, R, "cuda")
    frozen = {"dense": inputs["weight"], "nf4": quantize_nf4(inputs["weight"])}
    report: dict[str, Any] = {"N": N, "K": K, "R": R}
    for M in KERNELS_OF_ROWS:
        for kind, weight in frozen.items():
            report[f"{kind}, M={M}"] = found = {}
            for contender in ("bare", *IMPLEMENTATIONS, "peft", "unsloth"):
                if why_not(contender, kind, dry) is not None or (contender == "bare" and kind == "nf4"):
                    continue
                try:
                    step = make_step(contender, kind, {**inputs, "x": inputs["x"][:M]}, weight)
                    found[contender] = kernels_of(step, flush)
                except Exception as error:
                    found[contender] = f"{type(error).__name__}: {str(error)[:300]}"
                save(work / "kernels.json", report)
    return report


def run_rounding(work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    """{"M x N x K": {contender: the projection}, "skipped"}"""
    from lora_kernels.bench import gpu

    contenders = {"ours": None, "addmm": None, "addmm, the term first": None}
    contenders |= {name: why_not(name, "dense", dry) for name in ("peft", "unsloth")}
    names, skipped = split(contenders)
    sizes = [(32, 48, 64)] if dry else [(512, 4096, 4096), (2048, 4096, 2048), (4096, 4096, 4096), (4096, 14336, 4096)]
    device = "cpu" if dry else "cuda"
    return {"skipped": skipped} | {
        " x ".join(map(str, size)): gpu.small_updates(*size, device, names) for size in sizes
    }


def run_steps(work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    from lora_kernels.bench import gpu

    needs = {"peft-lora": "dense", "peft-qlora": "nf4"}
    skipped = {name: reason for name, kind in needs.items() if (reason := why_not("peft", kind, dry)) is not None}
    if dry:
        skipped |= {name: "it needs a GPU" for name in gpu.STEPS if name.endswith("-graphs")}
    if reason := missing("transformers", "accelerate"):
        raise Skipped(reason)
    models, device = (gpu.TINY_MODELS, "cpu") if dry else (gpu.MODELS, "cuda")
    keep = functools.partial(save, work / "steps.json")
    return {"skipped": skipped} | gpu.training_steps(device, models, skipped, 2 if dry else 7, keep)


def run_plot(work: Path, dry: bool, deadline: float) -> dict[str, Any]:
    if importlib.util.find_spec("matplotlib") is None:
        raise Skipped("matplotlib is not installed")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(kind, load(work / f"{kind}.json")) for kind in ("dense", "nf4") if (work / f"{kind}.json").exists()]
    if not panels:
        raise Skipped("there are no times")
    figure = Figure(figsize=(6 * len(panels), 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (kind, report) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for contender in CONTENDERS[1:]:
            ratios = {
                M: mean_ratio(report["rows"], contender, M=M) for M in sorted({row["M"] for row in report["rows"]})
            }
            points = [(M, ratio) for M, ratio in ratios.items() if ratio is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=contender)
        axes.axhline(1.0, color="grey", linewidth=1, linestyle="--")
        axes.set(title=f"{kind}, bfloat16", xlabel="rows M", ylabel="time over the bare dense linear", xscale="log")
        axes.legend(frameon=False)
    with replacing(work / "result.png") as temporary:
        figure.savefig(temporary, format="png")
    return {"file": str(work / "result.png")}


RUN = {
    "environment": run_environment,
    "build": run_build,
    "tests": run_tests,
    "dense": functools.partial(run_timings, "dense"),
    "nf4": functools.partial(run_timings, "nf4"),
    "groups": run_groups,
    "memcheck": functools.partial(run_sanitizer, "memcheck"),
    "racecheck": functools.partial(run_sanitizer, "racecheck"),
    "kernels": run_kernels,
    "rounding": run_rounding,
    "steps": run_steps,
    "plot": run_plot,
}


class Skipped(Exception):
    """A stage that has nothing to do here."""


def save(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content))


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def mean_ratio(rows: list[dict[str, Any]], contender: str, **where: Any) -> float | None:
    """The geometric mean of a contender's ratio over `bare` in the rows that are as `where` says."""
    chosen = [row for row in rows if all(row[name] == value for name, value in where.items())]
    logs = [math.log(row["contenders"][contender]["ratio"]) for row in chosen if contender in row["contenders"]]
    return math.exp(sum(logs) / len(logs)) if logs else None


def run_in_process(stage: str, work: Path, dry: bool, limit: float) -> dict[str, Any]:
    """{"status", "seconds", "result"} of a stage: what it left in its file, however it ended."""
    start, path = time.time(), work / f"{stage}.json"
    # A little less inside, so that the stage can report by itself.
    command = [sys.executable, __file__, "--stage", stage, "--output-dir", str(work), "--limit", str(0.9 * limit)]
    environment = {**os.environ, "LORA_KERNELS_CACHE": str(work / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if not dry:
        environment["TRITON_INTERPRET"] = "0"
    with open(work / f"{stage}.log", "w") as log:
        process = subprocess.Popen(
            command + ["--dry"] * dry, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            # Its children too: a compiler or a sanitizer would keep the GPU and the cores.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    tail = (work / f"{stage}.log").read_text(errors="replace").strip().splitlines()[-40:] if code != 0 else []
    status = {0: "ok", None: f"killed after {limit:.0f} s"}.get(code, f"failed with status {code}")
    result = load(path) if path.exists() else {}
    if "skipped_because" in result:
        status = f"skipped: {result['skipped_because']}"
    return {"status": status, "seconds": round(time.time() - start, 1), "result": result, "tail": tail}


def print_times(kind: str, result: dict[str, Any]) -> None:
    rows = result.get("rows", [])
    print(f"\n{kind}, bfloat16: time over the bare dense linear, geometric mean over the layers and ranks")
    print(f"{'model':>14} {'M':>5} {'bare ms':>8} " + " ".join(f"{name:>7}" for name in CONTENDERS[1:]))
    for model, M in dict.fromkeys((row["model"], row["M"]) for row in rows):
        here = [row for row in rows if (row["model"], row["M"]) == (model, M) and row["contenders"]]
        if here:
            bare = sum(row["contenders"]["bare"]["median_ms"] for row in here) / len(here)
            ratios = [mean_ratio(here, name) for name in CONTENDERS[1:]]
            columns = " ".join("      -" if ratio is None else f"{ratio:7.2f}" for ratio in ratios)
            print(f"{model:>14} {M:>5} {bare:8.3f} {columns}")
    for name, reason in result.get("skipped", {}).items():
        print(f"  {name} was skipped: {reason}")
    for name, text in {name: text for row in rows for name, text in row["failed"].items()}.items():
        count = sum(name in row["failed"] for row in rows)
        print(f"  {name} failed in {count} of {len(rows)} rows, the last time: {text}")
    if "left_out" in result:
        print(f"  {result['left_out']}")


def print_summary(report: dict[str, Any]) -> None:
    for kind in ("dense", "nf4"):
        print_times(kind, report[kind]["result"])
    for row in report["groups"]["result"].get("rows", []):
        times = ", ".join(f"{name} {values['ratio']:.2f}" for name, values in row["contenders"].items())
        print(f"group {row['model']} M={row['M']} N={'+'.join(map(str, row['N']))}: {times}")
    for size, found in report["rounding"]["result"].items():
        if size != "skipped" and isinstance(found, dict):
            print(f"\nof a small update arrives at {size}:", ", ".join(f"{n} {v:.3f}" for n, v in found.items()))
    for model, found in report["steps"]["result"].items():
        for name, step in found.items() if isinstance(found, dict) else ():
            if isinstance(step, dict):
                known = {key: round(value, 1) for key, value in step.items() if key != "failed"}
                print(f"a training step of {model}, {name}: {known or step}")
    print("\nstage        seconds  status")
    for stage, outcome in report.items():
        print(f"{stage:<12} {outcome['seconds']:>7}  {outcome['status']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="without a GPU: all that doesn't need one, on tiny shapes")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/gpu_check"))
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="these stages")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.output_dir.resolve()
    if arguments.stage:
        try:
            result = RUN[arguments.stage](work, arguments.dry, time.time() + arguments.limit)
        except Skipped as reason:
            result = {"skipped_because": str(reason)}
        save(work / f"{arguments.stage}.json", result)
        return 0

    work.mkdir(parents=True, exist_ok=True)
    for stale in [*work.glob("*.json"), *work.glob("*.log")]:
        stale.unlink()
    end, report = time.time() + TOTAL_SECONDS, {}

    def run(stage: str) -> dict[str, Any]:
        limit = min(STAGES[stage], end - time.time())
        reason = None
        if stage not in arguments.only:
            reason = "not asked for"
        elif limit < 5:
            reason = "no time is left"
        elif not arguments.dry and stage not in ANYWHERE and not torch.cuda.is_available():
            reason = "torch sees no GPU here"
        if reason is not None:
            return {"status": f"skipped: {reason}", "seconds": 0.0, "result": {}, "tail": []}
        return run_in_process(stage, work, arguments.dry, limit)

    for stages in GROUPS:
        print(f"{', '.join(stages)} ...", flush=True)
        with ThreadPoolExecutor(len(stages)) as pool:
            report |= dict(zip(stages, pool.map(run, stages), strict=True))
        for stage in stages:
            for line in [f"  {stage}: {report[stage]['status']}", *report[stage]["tail"]]:
                print(line, flush=True)
        write_report(work / "result.json", report, dry=arguments.dry)
    print_summary(report)
    print(f"\nwritten: {work / 'result.json'}")
    return int(any(not outcome["status"].startswith(("ok", "skipped")) for outcome in report.values()))


if __name__ == "__main__":
    sys.exit(main())
