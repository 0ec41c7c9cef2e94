"""Several processes: what launchers and the environment may ask for, waiting for one another, sharing work."""

import atexit
import itertools
import os
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend
from torch import Tensor

_waits = itertools.count()
_POLL_SECONDS = 0.02
_OFF = ("", "0", "f", "false", "n", "no", "none", "off")
# Variables of accelerate that change what is computed -> what to do instead. All other ACCELERATE_USE_* are ways to
# share a model over processes, and FSDP_*, MEGATRON_LM_* and the like mean nothing without their ACCELERATE_USE_*.
_REFUSED = {
    "ACCELERATE_MIXED_PRECISION": "set dtype",
    "ACCELERATE_DOWNCAST_BF16": "set dtype",
    "ACCELERATE_DYNAMO_BACKEND": "launch without --dynamo_backend",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "launch with torchrun",
}
_ALLOWED_USE = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_XPU", "ACCELERATE_USE_MPS_DEVICE", "ACCELERATE_USE_SAGEMAKER")
# Variables that mean the same as a setting of the run, which decides.
_SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
}


def make_accelerator() -> Accelerator:
    """One process, or as many as `accelerate launch` or `torchrun` started. No autocast: the layers choose dtypes.

    Raises ValueError where the environment asks for another way to train; see `check_launcher`.
    """
    check_launcher()
    kwargs = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    cpu = not torch.accelerator.is_available()
    grouped = torch.distributed.is_initialized()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[kwargs])
    if torch.distributed.is_initialized() and not grouped:
        atexit.register(_end_threads_of_gloo)
    check_launcher(accelerator)
    return accelerator


def _end_threads_of_gloo() -> None:
    """gloo's threads free tensors, which the interpreter's end would turn into an abort of a process that is done."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def wait_for_everyone(accelerator: Accelerator) -> None:
    """Returns when every process has called it, however long one of them works before.

    A collective gives up after 10 minutes (NCCL) or 30 (gloo), so the processes first count themselves in their store.
    """
    if accelerator.num_processes == 1:
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"lora_kernels/wait_for_everyone/{next(_waits)}"
    store.add(key, 1)
    while store.add(key, 0) < accelerator.num_processes:
        time.sleep(_POLL_SECONDS)
    # The process that keeps the store may end only after the others have read it.
    accelerator.wait_for_everyone()


def computed_together(
    found: Tensor,
    batches: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], Tensor],
    accelerator: Accelerator,
) -> Tensor:
    """`found`, zeros, with found[rows] = compute(rows) for each of `batches`: on all processes, which share them."""
    found = found.to(accelerator.device)
    for rows in batches[accelerator.process_index :: accelerator.num_processes]:
        found[torch.as_tensor(rows, device=found.device)] = compute(rows).to(found)
    wait_for_everyone(accelerator)
    return accelerator.reduce(found, "sum").cpu()


def check_launcher(accelerator: Accelerator | None = None) -> None:
    """ValueError where the environment, or an accelerator, asks for a training that is not one of the trainers'.

    They train in one process, or in several that each hold the whole model and share the rows of a step (DDP), in the
    dtype of the settings, without torch.compile. What else accelerate's launcher offers is refused by name.
    """
    for name, value in os.environ.items():
        other_way = name.startswith("ACCELERATE_USE_") and name not in _ALLOWED_USE
        if (other_way or name in _REFUSED) and value.strip().lower() not in _OFF:
            flag = f"launch without --{name.removeprefix('ACCELERATE_').lower()}"
            raise ValueError(
                f"environment variable {name} is {value!r}, which the trainers can't do; allowed: no or unset; "
                f"{_REFUSED.get(name, flag)}"
            )
        if name in _SETTINGS and accelerator is None and value.strip().lower() not in (*_OFF, "1"):
            warnings.warn(f"{name}={value} is not used: {_SETTINGS[name]} of the settings decides", stacklevel=2)
    if accelerator is None:
        return
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"accelerator has distributed_type {kind}; allowed: NO and MULTI_..., which is DDP")
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"accelerator has mixed_precision {accelerator.mixed_precision!r}; allowed: 'no'; set dtype instead"
        )
    if (backend := accelerator.state.dynamo_plugin.backend) != DynamoBackend.NO:
        raise ValueError(f"accelerator has the dynamo backend {backend.value}; allowed: NO")
