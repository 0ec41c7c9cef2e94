"""How often a forward and backward pass over a tensor of M x K and of M x N, dropout on; ours is counted.

The Triton kernels run under Triton's interpreter and the CUDA C++ ones under the emulator, which note every load and
store; what is counted are the distinct bytes of each launch. The frozen linear alone makes 2 + 2 passes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lora_kernels import backends
from lora_kernels.backends.contract import Backend
from lora_kernels.bench.cases import DROPOUT_P, SCALING, Settings, name_of
from lora_kernels.testing import lora_inputs
from lora_kernels.types import AdapterNeeds, Dropout, Layers, Needs, Projection

# (kernel, distinct bytes loaded, distinct bytes stored)
Launch = tuple[str, int, int]
# By analysis of their code, not measured: passes over M x K and over M x N.
OTHERS = {
    "LoRAFusion": {"MK": 7, "MN": 3, "remark": "and r/32 of one in atomic additions"},
    "Axolotl": {"MK": 16, "MN": 6, "remark": ""},
    "PEFT": {"MK": 13, "MN": 12, "remark": ""},
}


@contextmanager
def triton_launches() -> Iterator[list[Launch]]:
    """Yields a list that gets every launch of a Triton kernel under the interpreter (TRITON_INTERPRET=1).

    Raises AssertionError at an atomic access: its order, and with it the sum, would change from run to run.
    """
    from triton.runtime import interpreter

    done: list[Launch] = []
    accesses: dict[str, list[np.ndarray]] = {"load": [], "store": []}
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    patched = {
        (builder, name): getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    } | {(executor, "__call__"): executor.__call__}
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first = pointers.data[mask.data.astype(bool)].astype(np.int64)
        accesses[kind].append((first[:, None] + np.arange(size)).reshape(-1))

    def noted_load(self, pointers, mask, *rest):
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noted_launch(self, *args, **kwargs):
        for noted in accesses.values():
            noted.clear()
        patched[executor, "__call__"](self, *args, **kwargs)
        distinct = [len(np.unique(np.concatenate(noted))) if noted else 0 for noted in accesses.values()]
        done.append((self.fn.__name__, *distinct))

    def refused(*_: Any) -> None:
        raise AssertionError("an atomic access")

    replacements = (noted_load, noted_store, refused, refused, noted_launch)
    for (owner, name), replacement in zip(patched, replacements, strict=True):
        setattr(owner, name, replacement)
    try:
        yield done
    finally:
        for (owner, name), original in patched.items():
            setattr(owner, name, original)


@contextmanager
def emulated_launches() -> Iterator[list[Launch]]:
    """Yields a list that holds every launch of a CUDA kernel under the emulator, once the block has ended."""
    from lora_kernels import _simt

    done: list[Launch] = []
    _simt.take_traffic(record=True)
    try:
        yield done
    finally:
        done += _simt.take_traffic(record=False)


def run_once(backend: Backend, M: int, N: int, K: int, R: int) -> None:
    """One forward and backward of lora_linear in bfloat16, dropout on, by a backend's functions."""
    inputs = lora_inputs(M, N, K, R, torch.bfloat16)
    x, weight, lora_a, lora_b = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
    layers, dropout = Layers([Projection(weight, lora_a, lora_b, SCALING)]), Dropout(DROPOUT_P, torch.tensor([1, 2]))
    outputs = backend.lora_linear_fwd(x, layers, dropout)
    needs = Needs(True, (AdapterNeeds(True, True),))
    backend.lora_linear_bwd([torch.ones_like(outputs.ys[0])], x, outputs.hs, layers, dropout, needs)


def passes(launches: list[Launch], M: int, N: int, K: int) -> dict[str, int]:
    """{"MK", "MN"}: how often launches in bfloat16 go over each, by the bytes that each loads and stores.

    What is left over beside them and the weight is the adapter's share, so the rank must be small.
    """
    counts = {"MK": 0, "MN": 0}
    sizes = {"MK": 2 * M * K, "MN": 2 * M * N, "NK": 2 * N * K}
    for _, *moved in launches:
        for left in moved:
            for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
                times, left = divmod(left, size)
                if name in counts:
                    counts[name] += times
    return counts


def count() -> dict[str, dict[str, Any]]:
    """{implementation: {"MK", "MN", "launches"}}, or {"skipped": why} where a backend can't run here."""
    # Sizes that a launch's bytes can be taken apart into in one way only.
    M, N, K, R = 128, 256, 192, 1
    found: dict[str, dict[str, Any]] = {}
    for name, watch in (("triton", triton_launches), ("cuda-emulated", emulated_launches)):
        if (reason := backends.available()[name]) is not None:
            found[name] = {"skipped": reason}
            continue
        with backends.use_backend(name), watch() as launches:
            run_once(backends.resolve(torch.empty(0, dtype=torch.bfloat16)), M, N, K, R)
        found[name] = {**passes(launches, M, N, K), "launches": launches}
    return found


class Passes:
    """The one case of this suite: a row as `Case.run` gives, with the passes of an implementation in "contenders"."""

    work = "traffic"
    what = {"dropout_p": DROPOUT_P, "ours": "counted", "others": "by analysis"}
    name = name_of(work, what)

    def run(self, settings: Settings) -> dict[str, Any]:
        # Triton decides when it is imported whether it interprets.
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        result = subprocess.run(
            [sys.executable, "-m", __name__], env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        counted = json.loads(result.stdout.splitlines()[-1])
        contenders = {f"ours, {name}": row for name, row in counted.items() if "skipped" not in row}
        skipped = {f"ours, {name}": row["skipped"] for name, row in counted.items() if "skipped" in row}
        return {"work": self.work, "what": self.what, "contenders": contenders | OTHERS, "skipped": skipped}


def cases(settings: Settings) -> Iterator[Passes]:
    yield Passes()


if __name__ == "__main__":
    print(json.dumps(count()))
