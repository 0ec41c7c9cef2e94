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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels import backends
from lora_kernels.backends.contract import Backend
from lora_kernels.files import replacing
from lora_kernels.types import NF4, Dropout, Layers, Needs

ENVIRONMENT_VARIABLE = "LORA_KERNELS_STRATEGY"
MODES = ("auto", "fused", "vendor")

_Step = Callable[[], object]
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

    def put(self, key: str, milliseconds: dict[str, float]) -> str:
        """The fastest; remembered here and in the file, beside what other processes have written there meanwhile."""
        best = min(milliseconds, key=milliseconds.__getitem__)
        self._known = self._read() | self._known | {key: {"choice": best, "ms": milliseconds}}
        try:
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"made_by": _versions(), "choices": self._known}, indent=1) + "\n")
        except OSError as error:
            warnings.warn(f"choices of {ENVIRONMENT_VARIABLE}=auto last for this process only: {error}", stacklevel=2)
        return best


def time_ms(step: _Step, queued_by_graph: bool = False) -> float:
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


def choose(choices: Choices, key: str, steps: Mapping[str, _Step], timer: Callable[[_Step], float]) -> str:
    """The candidate that `choices` has for `key`; else all `steps` are timed and the fastest is put there.

    One that runs out of memory is no candidate, unless all do: then that is raised, as any other error is.
    """
    known = choices.get(key)
    if known is not None and known in steps:
        return known
    times, failures = {}, []
    for name, step in steps.items():
        try:
            times[name] = timer(step)
        except torch.OutOfMemoryError as error:
            failures.append(error)
    if not times:
        raise failures[-1]
    return choices.put(key, times)


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


def _candidates(x: Tensor) -> dict[str, Backend]:
    from lora_kernels.backends import triton
    from lora_kernels.backends.cuda import backend as cuda
    from lora_kernels.backends.triton import vendor

    found: dict[str, Backend] = {"triton": triton}
    if cuda.unavailable is None and cuda.takes(x):
        found["cuda"] = cuda
    if vendor.unsupported(x.dtype) is None:
        found["vendor"] = triton.by_vendor
    return found


def _kind(weight: Tensor | NF4) -> str:
    if isinstance(weight, NF4):
        return f"nf4/{weight.block_size}"
    return "dense" if weight.stride(1) == 1 else "transposed"


@dataclass(frozen=True)
class _Case:
    """What a choice depends on, besides the layers; needs: None for a forward pass."""

    rows: int
    dropout: bool
    needs: tuple[tuple[bool, ...], ...] | None
    in_graph: bool

    def key(self, x: Tensor, layers: Layers) -> str:
        """The name of the choice in the file."""
        parts = self.needs or [(layer.bias is not None, layer.column_scale is not None) for layer in layers]
        flags = [self.dropout, *chain(*parts)]
        each = ", ".join(
            f"{_kind(layer.weight)} N={layer.weight.shape[0]} R={layer.lora_a.shape[0]} {layer.lora_a.dtype}"
            for layer in layers
        )
        op = f"lora_linear_{'fwd' if self.needs is None else 'bwd'} {''.join(str(int(flag)) for flag in flags)}"
        key = f"{op}, {_gpu_name(x.get_device())}, {x.dtype}, M<={self.rows} K={x.shape[1]}, {each}"
        return key.replace("torch.", "") + ", in a graph" * self.in_graph


def is_open(backend: Backend, x: Tensor) -> bool:
    """Whether `resolve` has a choice, where `backends.resolve` took this one for x."""
    return backend.name == "triton" and _is_on_gpu(x) and backends.selected() == "auto" and mode() != "fused"


def resolve(
    x: Tensor, layers: Layers, dropout: Dropout | None, needs: Needs | None, run: Callable[[Backend], object]
) -> Backend:
    """The backend for a pass of lora_linear of which `is_open` is true: forward, or with `needs` backward. `run` makes
    that pass on a backend.

    Raises ValueError for an unknown LORA_KERNELS_STRATEGY, RuntimeError where it says "vendor" and that can't be used
    here.
    """
    asked = mode()
    if asked == "vendor":
        from lora_kernels.backends.triton import vendor

        if reason := vendor.unsupported(x.dtype):
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=vendor can't be used with x of {x.dtype}: {reason}")
        return _candidates(x)["vendor"]
    asked_for = None
    if needs is not None:
        asked_for = ((needs.x,), *((need.lora_a, need.lora_b, need.lora_e) for need in needs.layers))
    case = _Case(1 << (x.shape[0] - 1).bit_length(), dropout is not None, asked_for, _for_graphs)
    if (kept := layers.prepared.get(case)) is not None:
        return kept
    key, choices, candidates = case.key(x, layers), _choices(), _candidates(x)
    chosen = choices.get(key)
    if chosen not in candidates:
        if _is_capturing():
            return candidates["triton"]
        with _lock, torch.cuda.device_of(x):
            steps = {name: functools.partial(run, candidate) for name, candidate in candidates.items()}
            chosen = choose(choices, key, steps, functools.partial(time_ms, queued_by_graph=_for_graphs))
    layers.prepared[case] = candidates[chosen]
    return candidates[chosen]
