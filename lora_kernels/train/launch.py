"""What `accelerate launch`, `torchrun` and the environment ask for: what the trainers do, and what they refuse."""

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend

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
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[kwargs])
    check_launcher(accelerator)
    return accelerator


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
