"""Checkpoints that a killed run continues from exactly. Only safetensors and JSON: nothing is pickled."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels.files import (
    reading,
    replacing,
    write_json,
    writing,
)
from lora_kernels.train.launch import wait_for_everyone

LAST = "checkpoint-last"
_WRITING, _REPLACED = ".checkpoint-last.tmp", ".checkpoint-last.old"
_TENSORS, _STATE = "training_state.safetensors", "training_state.json"
METHOD_STATE = "method_state.safetensors"
_SAMPLED = 64
_State = TypeVar("_State")


@dataclass
class LoopState:
    """What the loop has done so far. `window`: sums since the last logged step, `window_count`: their divisor;
    `eval_data`: the digest of what `best_eval_loss` was measured on; `evaluation_due`: a signal came before the
    evaluation of this step; `short`: see `StepPlan`."""

    step: int = 0
    tokens: int = 0
    window: dict[str, float] = field(default_factory=dict)
    window_count: int = 0
    best_eval_loss: float | None = None
    eval_data: str | None = None
    evaluation_due: bool = False
    short: int = 0


def find_checkpoint(output_dir: Path) -> Path | None:
    """`checkpoint-last`, or its predecessor where the process died between the two renames that replace it."""
    return next((path for name in (LAST, _REPLACED) if (path := output_dir / name).is_dir()), None)


def saved_run(output_dir: Path) -> dict[str, Any]:
    """What the run that the directory has a checkpoint of must have in common with one that resumes it, if any."""
    checkpoint = find_checkpoint(output_dir)
    if checkpoint is None:
        return {}
    with reading_checkpoint(checkpoint / _STATE):
        return json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["run"]


def weights_digest(model: nn.Module) -> str:
    """A hash of samples of all weights that are not trained, in the model's order, wherever they come from.

    Of each tensor 64 values count, so that a model of any size is told from another one in less than a second.
    """
    digest = hashlib.sha256()
    # By identity: tied weights count once.
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    for tensor in tensors.values():
        if isinstance(tensor, torch.Tensor) and not tensor.requires_grad and tensor.numel():
            values = tensor.detach().reshape(-1)
            sample = values[:: max(1, len(values) // _SAMPLED)].cpu().contiguous()
            head = f"{list(tensor.shape)} {tensor.dtype}".encode()
            digest.update(head + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def state_before(output_dir: Path) -> str:
    """For the message of a run that failed: where its state before is, if there is one."""
    checkpoint = find_checkpoint(output_dir)
    return f"; {checkpoint} holds the state before" if checkpoint else ""


@contextmanager
def saying_what_is_left(output_dir: Path) -> Iterator[None]:
    """An OSError, as of a full disk, says in its message where the state before is."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{error}{state_before(output_dir)}") from error


def save_checkpoint(
    output_dir: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Any,
    run: dict[str, Any],
    accelerator: Accelerator,
    save_adapter: Callable[[Path], None],
    method_state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write `checkpoint-last/` beside the old one and swap them; every process must call this.

    Where a file can't be written, all processes raise, and the old one stays as it was.

    Holds the adapter as `save_adapter` writes it, the trainable parameters and optimizer state by name, the random
    state of each process, `state` (a dataclass), `run` (what a resumed run must have in common with this one), and
    `method_state`, if the method has any.
    """
    staged, last, replaced = (output_dir / name for name in (_WRITING, LAST, _REPLACED))
    with all_or_none(accelerator, staged):
        if accelerator.is_main_process:
            shutil.rmtree(staged, ignore_errors=True)
            with writing(staged):
                staged.mkdir(parents=True)
    with all_or_none(accelerator, staged):
        path = staged / _rng(accelerator)
        with writing(path):
            path.write_text(json.dumps(_rng_state()), encoding="utf-8")
        if accelerator.is_main_process:
            save_adapter(staged)
            tensors = {f"parameter/{name}": value.detach() for name, value in parameters.items()}
            for name, value in parameters.items():
                tensors |= {f"optimizer/{name}/{key}": item for key, item in optimizer.state[value].items()}
            _write_tensors(staged / _TENSORS, tensors)
            if method_state:
                _write_tensors(staged / METHOD_STATE, method_state)
            write_json(staged / _STATE, {**asdict(state), "run": run})
    with all_or_none(accelerator, staged):
        if accelerator.is_main_process:
            # A directory can't be replaced in one step; find_checkpoint covers a death between these two.
            if last.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(last, replaced)
            os.replace(staged, last)
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def all_or_none(accelerator: Accelerator, directory: Path | None = None) -> Iterator[None]:
    """All processes leave this block together. Where it failed in any, all raise, and `directory` is removed."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    # One process may write for longer than a collective waits.
    wait_for_everyone(accelerator)
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), "sum")
    if failed.item():
        if directory is not None and accelerator.is_main_process:
            shutil.rmtree(directory, ignore_errors=True)
        raise error or OSError("another process could not write its part")


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with replacing(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary)


def load_state(
    directory: Path,
    run: dict[str, Any],
    state_class: type[_State],
    with_method_state: bool = False,
) -> tuple[_State, dict[str, torch.Tensor]]:
    """What the loop had done, and the method's state; ValueError where the run is another one or a file is damaged."""
    with reading_checkpoint(directory / _STATE):
        values = json.loads((directory / _STATE).read_text(encoding="utf-8"))
        saved = dict(values.pop("run"))
        state = state_class(**values)
    for key, value in run.items():
        if key in saved and saved[key] != value:
            raise ValueError(
                f"can't resume {directory}: it was made with {key} = {saved.get(key)}, this run has {value}"
            )
    if not with_method_state:
        return state, {}
    with reading_checkpoint(directory / METHOD_STATE):
        return state, load_file(directory / METHOD_STATE)


def load_checkpoint(
    directory: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> None:
    """Restore parameters, optimizer and this process's random state; ValueError where the parameters are others or a
    file is damaged."""
    with reading_checkpoint(directory / _TENSORS):
        tensors = load_file(directory / _TENSORS)
    there = {name.removeprefix("parameter/"): value for name, value in tensors.items() if name.startswith("parameter/")}
    for name in sorted(parameters.keys() | there.keys()):
        shapes = [list(side[name].shape) if name in side else "missing" for side in (parameters, there)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"can't resume {directory}: parameter {name} is {shapes[0]} here, {shapes[1]} there")
        parameters[name].data.copy_(there[name])
    names = {id(parameter): name for name, parameter in parameters.items()}
    packed = optimizer.state_dict()
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    for index, name in enumerate(order):
        prefix = f"optimizer/{name}/"
        packed["state"][index] = {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
    optimizer.load_state_dict(packed)
    path = directory / _rng(accelerator)
    with reading_checkpoint(path):
        _set_rng_state(json.loads(path.read_text(encoding="utf-8")))


def reading_checkpoint(path: Path) -> AbstractContextManager[None]:
    """`reading` a file of a checkpoint."""
    return reading(path, f"; put a copy of {path.parent} in its place, or remove it to start anew")


def _rng(accelerator: Accelerator) -> str:
    return f"rng-{accelerator.process_index}.json"


def _rng_state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, gauss = numpy_state
    state = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
