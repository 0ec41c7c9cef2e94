"""Which backends this machine has, why one is missing, and how one is chosen."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.backends.contract import Backend
from lora_kernels.lazy import exports
from lora_kernels.sharded import is_sharded

ENVIRONMENT_VARIABLE = "LORA_KERNELS_BACKEND"

# name -> module, a `contract.Backend` or with one as `backend`
_MODULES = {
    "reference": "lora_kernels.reference",
    "cpu": "lora_kernels.backends.cpu",
    "triton": "lora_kernels.backends.triton",
    "cuda": "lora_kernels.backends.cuda",
    "cuda-emulated": "lora_kernels.backends.cuda.emulated",
}
# What `auto` tries before the reference, in this order, on each type of device.
_AUTO = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

# A plain global, not a context variable: autograd runs backward in threads of its own, which must see the same choice.
_selected: str | None = None


def backend_names() -> tuple[str, ...]:
    """The names that `use_backend` and the environment variable LORA_KERNELS_BACKEND accept."""
    return ("auto", *_MODULES)


@cache
def _load(name: str) -> Backend:
    module = importlib.import_module(_MODULES[name])
    return getattr(module, "backend", module)


def available() -> dict[str, str | None]:
    """Every backend by name: None where it can run on this machine, else the reason why not."""
    return {name: _load(name).unavailable for name in _MODULES}


def check(name: str, source: str) -> None:
    """ValueError for an unknown backend, RuntimeError for one that can't run here; `source` is who asked for it."""
    if name not in backend_names():
        raise ValueError(f"{source} is {name!r}; allowed: {', '.join(backend_names())}")
    if name != "auto" and (reason := _load(name).unavailable) is not None:
        raise RuntimeError(f"{source} asks for the {name} backend, which can't run here: {reason}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on the backend ``name``: "auto", "reference", "cpu", "triton", "cuda" or
    "cuda-emulated" (the CUDA C++ kernels on CPU tensors, for tests).

    "auto" (the default outside) picks the fastest that can run; a backend named explicitly never falls back, except in
    the transforms of torch.func and on tensors without memory of their own, such as a DTensor, which no kernel can
    read: torch's own operations compute these. The
    choice holds for the process, since autograd's threads must see it; the environment variable LORA_KERNELS_BACKEND
    sets it from outside.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that can't run here.
    """
    global _selected
    check(name, "use_backend(name)")
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


def backend_option(name: str) -> AbstractContextManager[None]:
    """`use_backend` for a setting whose default is "auto": that leaves the choice to what is in force already."""
    return nullcontext() if name == "auto" else use_backend(name)


def selected() -> str:
    """The name in force: that of `use_backend`, else of the environment variable, else "auto". Raises as `check`."""
    if _selected is not None:
        return _selected
    return from_environment()


@cache
def from_environment() -> str:
    """What the environment variable says when it is first asked for: reading it takes as long as a small kernel."""
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    check(name, f"environment variable {ENVIRONMENT_VARIABLE}")
    return name


_PLAIN = (Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
# What autograd makes of several gradients at once (is_grads_batched), which is no transform of torch.func.
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether an implementation may be called past torch's dispatcher, which takes longer than a small layer, and read
    the tensors where they are.

    Not where something else than autograd sees ops: a compiler or tracer, a mode (FakeTensorMode, a profiler of FLOPs,
    selective checkpointing), or what `by_formula` is about.
    """
    return not (_sees_ops() or _transforms_ops()) and is_memory(*tensors)


def by_formula(*tensors: Tensor | None) -> bool:
    """Whether an op on these is computed in torch's own operations, whatever the backend, since no kernel can read it:

    inside a transform of torch.func, under forward-mode differentiation, and of tensors that are not what lies in their
    memory (a DTensor, another subclass, a view with a pending negation).
    """
    return _transforms_ops() or not (_sees_ops() or is_memory(*tensors))


def _sees_ops() -> bool:
    # What torch.compiler.is_compiling tells besides, where dispatch modes are at work, is slower to ask.
    if torch.compiler.is_dynamo_compiling() or torch._C._is_tracing():
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def _transforms_ops() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_memory(*tensors: Tensor | None) -> bool:
    """Whether each tensor is what lies in its memory."""
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or t.layout is not _STRIDED or t.is_neg():
            return False
        if t.is_nested or t.is_quantized or _is_batched(t):
            return False
    return True


def kind_of(t: Tensor) -> str:
    """What t is, in words."""
    if t.is_nested:
        return "a nested tensor"
    if t.is_quantized:
        return f"a quantised tensor, {t.dtype}"
    if t.layout is not _STRIDED:
        return f"a tensor of layout {t.layout}"
    return f"a {type(t).__name__}" + (" inside a transform" if _transforms_ops() or _is_batched(t) else "")


def check_dense(**tensors: Tensor | None) -> None:
    """TypeError naming the argument that is sparse, nested, quantised or of another layout without strides, or that is
    a DTensor where another one is none; ValueError naming the one whose memory has been freed."""
    given = {name: t for name, t in tensors.items() if t is not None}
    for name, t in given.items():
        if t.layout is not _STRIDED or t.is_nested or t.is_quantized:
            # In evaluation torch's encoder makes them for its layers, unless inject knows the encoder.
            hint = "; inject into the whole nn.TransformerEncoder, not into a part of it" if t.is_nested else ""
            raise TypeError(f"{name} is {kind_of(t)}; allowed: dense tensors, torch.strided{hint}")
        if not t.is_meta:
            _check_values(name, t)
    spread = [name for name, t in given.items() if is_sharded(t)]
    if spread and len(spread) < len(given):
        other = next(name for name in given if name not in spread)
        raise TypeError(f"{spread[0]} is a DTensor and {other} {kind_of(given[other])}; allowed: all DTensors, or none")


def direct(**tensors: Tensor | None) -> bool:
    """Whether the arguments of these names are `unwatched`. Raises as `check_dense`."""
    found = unwatched(*tensors.values())
    if not found:
        check_dense(**tensors)
    return found


def check_memory(**tensors: Tensor | None) -> None:
    """For what has no formula and needs the values: TypeError naming the argument that `by_formula` is about,
    ValueError naming the one that has elements, but no memory (on meta, or freed)."""
    for name, t in tensors.items():
        if t is not None and by_formula(t):
            raise TypeError(f"{name} is {kind_of(t)}; allowed: dense tensors in memory, outside of transforms")
        if t is not None:
            _check_values(name, t)


def _check_values(name: str, t: Tensor) -> None:
    if unwatched(t) and t.numel() and not t.data_ptr():
        raise ValueError(f"{name}, {list(t.shape)} on {t.device}, has no memory; allowed: tensors with values")


def in_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x, which it can't be for some, such as meta."""
    if not _is_any_autocast_enabled():
        return False
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def resolve(x: Tensor, activations: bool = False) -> Backend:
    """The backend that will run an op on ``x``; `activations`: that op is lora_linear.

    One that was named is not asked whether it takes x: it raises if it doesn't.
    """
    name = selected()
    if name != "auto":
        return _load(name)
    if x.dtype != torch.float64:
        for candidate in _AUTO.get(x.device.type, ()):
            backend = _load(candidate)
            if backend.unavailable is None and (not activations or backend.takes(x)):
                return backend
    return _load("reference")


# What others ask of single backends, without knowing them.
__getattr__, __dir__ = exports(__name__, {"for_graphs": "choice", "return_freed_memory": "cpu.memory"})
