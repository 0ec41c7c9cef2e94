"""Which implementation runs lora_linear on a GPU: each candidate is timed once for a shape, the choice kept on disk.

Candidates: the Triton kernels; the CUDA C++ kernels (16-bit activations, where they are built); `vendor`, the Triton
kernels with the large products by cuBLAS in float32 (`lora_kernels.backends.triton.vendor`). All give the same result
up to rounding. Nothing is measured for CPU tensors, nor for a backend that was named, nor while a CUDA graph is
captured: that takes what is known already, else Triton's. (`for_graphs` is for the passes before it.)

The environment variable LORA_KERNELS_STRATEGY: "auto" (default) measures; "fused" takes Triton's and "vendor" the
vendor's product everywhere, and neither measures nor reads the cache. Choices are in `strategy.json` in the cache
directory (`lora_kernels.io.models.cache_dir`), by op, GPU, dtypes, kind of weight, M rounded up to a power of two, N, K
and R. A file of other versions of torch, Triton or this package, or one that can't be read, is made anew.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lora_kernels import backends
from lora_kernels.backends.triton import vendor
from lora_kernels.files import replacing
from lora_kernels.types import NF4

ENVIRONMENT_VARIABLE = "LORA_KERNELS_STRATEGY"
MODES = ("auto", "fused", "vendor")

# Autograd's threads measure too: one at a time, or they would slow each other.
_lock = threading.Lock()


def mode() -> str:
    """The value of LORA_KERNELS_STRATEGY, "auto" where it is not set. Raises ValueError for another than `MODES`."""
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name not in MODES:
        raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE} is {name!r}; allowed: {', '.join(MODES)}")
    return name


def _versions() -> str:
    import triton

    from lora_kernels import __version__

    return f"lora-kernels {__version__}, torch {torch.__version__}, triton {triton.__version__}"


class Choices:
    """Key -> {"choice": candidate, "ms": {candidate: milliseconds}}, kept in the JSON file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._read()
        # What `resolve` found already in this process: the text of a key takes as long as a small kernel.
        self.resolved: dict[tuple, Any] = {}

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.path.read_text())
            if content["made_by"] != _versions():
                return {}
            found = content["choices"].items()
            return {key: {"choice": str(value["choice"]), "ms": dict(value["ms"])} for key, value in found}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def get(self, key: str) -> str | None:
        return self._known[key]["choice"] if key in self._known else None

    def put(self, key: str, milliseconds: dict[str, float]) -> None:
        """Remember the fastest, here and in the file, beside what other processes have written there meanwhile."""
        best = min(milliseconds, key=milliseconds.__getitem__)
        self._known = self._read() | self._known | {key: {"choice": best, "ms": milliseconds}}
        try:
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"made_by": _versions(), "choices": self._known}, indent=1) + "\n")
        except OSError as error:
            warnings.warn(f"choices of {ENVIRONMENT_VARIABLE}=auto last for this process only: {error}", stacklevel=2)


def time_ms(step: Callable[[], object], queued_by_graph: bool = False) -> float:
    """The median of the time that `step` takes on the GPU, plus the least time that the CPU takes to queue it,
    compilation excluded; the first alone where a graph will queue it.

    Either may be what a model waits for, and which it is depends on what else is in the model. The larger of the two
    alone would be a toss-up wherever all candidates are queued more slowly than they run. Other work on the CPU only
    ever makes queueing longer, and the choice outlasts it: hence the least.
    """
    for _ in range(3):
        step()
    running, queueing = [], []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU is kept busy meanwhile, or the time between the events would be the CPU's.
        torch.cuda._sleep(2_000_000)
        start.record()
        before = time.perf_counter()
        step()
        queueing.append(1e3 * (time.perf_counter() - before))
        end.record()
        end.synchronize()
        running.append(start.elapsed_time(end))
    return statistics.median(running) + (0.0 if queued_by_graph else min(queueing))


def choose(
    choices: Choices, key: str, steps: Mapping[str, Callable[[], object]], timer: Callable[[Callable], float]
) -> str:
    """The candidate that `choices` has for `key`; else all `steps` are timed and the fastest is put there.

    One that runs out of memory is no candidate, unless all do: then that is raised, as any other error is.
    """
    if (known := choices.get(key)) in steps:
        return known
    times, failure = {}, None
    for name, step in steps.items():
        try:
            times[name] = timer(step)
        except torch.OutOfMemoryError as error:
            failure = error
    if not times:
        raise failure
    choices.put(key, times)
    return choices.get(key)


# For the process, since autograd's threads must see it.
_for_graphs = False


@contextmanager
def for_graphs() -> Iterator[None]:
    """In the `with` block the time on the GPU alone decides: for passes that warm up a CUDA graph, and its capture."""
    global _for_graphs
    before, _for_graphs = _for_graphs, True
    try:
        yield
    finally:
        _for_graphs = before


@functools.cache
def _choices() -> Choices:
    from lora_kernels.files import cache_dir

    return Choices(cache_dir() / "strategy.json")


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def vendor_backend() -> SimpleNamespace:
    """lora_linear's functions with the large products by the vendor's library."""
    from lora_kernels.backends import triton

    names = ("lora_linear_fwd", "lora_linear_bwd", "lora_linear_group_fwd", "lora_linear_group_bwd")
    functions = {name: functools.partial(getattr(triton, name), by_vendor=True) for name in names}
    return SimpleNamespace(**functions, column_scale_bwd=triton.column_scale_bwd)


def _candidates(x: Tensor) -> dict[str, ModuleType | SimpleNamespace]:
    from lora_kernels.backends import cuda, triton

    found = {"triton": triton}
    if cuda.unavailable is None and x.dtype in cuda.ACTIVATION_DTYPES:
        found["cuda"] = cuda
    if vendor.unsupported(x.dtype) is None:
        found["vendor"] = vendor_backend()
    return found


def _kind(weight: Tensor | NF4) -> str:
    if isinstance(weight, NF4):
        return f"nf4/{weight.block_size}"
    return "dense" if weight.stride(1) == 1 else "transposed"


def resolve(op: str, x: Tensor, layers: Sequence[tuple[Tensor | NF4, Tensor]], variant: tuple, args: tuple) -> Any:
    """The module, or what has its functions, to run `op` of lora_linear, or of its group, with `args`.

    layers: (weight, lora_a) of each layer; variant: what of the arguments, besides the sizes and the kind of weight,
    changes the work. Raises ValueError for an unknown LORA_KERNELS_STRATEGY, RuntimeError where it says "vendor" and
    that can't be used here.
    """
    backend = backends.resolve(x, activations=True)
    if not _is_on_gpu(x) or backends.selected() != "auto" or backend.__name__ != "lora_kernels.backends.triton":
        return backend
    asked = mode()
    if asked == "fused":
        return backend
    if asked == "vendor":
        if reason := vendor.unsupported(x.dtype):
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=vendor can't be used with x of {x.dtype}: {reason}")
        return _candidates(x)["vendor"]
    M, K = x.shape
    rows = 1 << (M - 1).bit_length()
    choices = _choices()
    sizes = tuple((_kind(weight), weight.shape[0], lora_a.shape[0], lora_a.dtype) for weight, lora_a in layers)
    case = (op, variant, x.get_device(), x.dtype, rows, K, sizes, _for_graphs)
    if (backend := choices.resolved.get(case)) is not None:
        return backend
    flags = "".join(str(int(flag)) for flag in variant)
    each = ", ".join(f"{kind} N={N} R={R} {dtype}" for kind, N, R, dtype in sizes)
    key = f"{op} {flags}, {_gpu_name(x.get_device())}, {x.dtype}, M<={rows} K={K}, {each}".replace("torch.", "")
    key += ", in a graph" * _for_graphs
    candidates = _candidates(x)
    chosen = choices.get(key)
    if chosen not in candidates:
        if _is_capturing():
            return candidates["triton"]
        with _lock, torch.cuda.device_of(x):
            steps = {name: functools.partial(getattr(module, op), *args) for name, module in candidates.items()}
            chosen = choose(choices, key, steps, functools.partial(time_ms, queued_by_graph=_for_graphs))
    choices.resolved[case] = candidates[chosen]
    return candidates[chosen]
