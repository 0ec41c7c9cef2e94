"""`lora-kernels doctor`: what works on this machine. It needs only the core's packages."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version


def doctor() -> None:
    """Show which backends can run on this machine, and why the others can't."""
    for title, rows in (("Backends", _backends()), ("Machine", _machine())):
        print(title)
        for name, value in rows:
            print(f"  {name:<17} {value}")


def _backends() -> Iterator[tuple[str, str]]:
    from lora_kernels.backends import available

    for name, reason in available().items():
        yield name, "yes" if reason is None else f"no   {reason}"


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from lora_kernels.backends import available
    from lora_kernels.files import cache_dir
    from lora_kernels.io.models import resolve_dtype

    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in ("lora-kernels", "torch", "triton", "transformers", "peft"):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if available()["cpu"] is None:
        from lora_kernels import _C

        yield "CPU kernels", f"{_C.get_isa()}, of {', '.join(_C.isa_supported())}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            capability = f"capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"
            yield f"GPU {index}", f"{gpu.name}, {capability}"
    else:
        built = torch.version.cuda or torch.version.hip
        yield "GPU", "none found" if built else "none: this torch is built for the CPU only"
    yield "dtype auto means", str(resolve_dtype("auto")).removeprefix("torch.")
    yield "cache directory", str(cache_dir())
