"""NVIDIA's driver without a GPU: a library that launches nothing (fake_cuda.cpp), and Triton over it.

A process that uses it must find it as libcuda.so.1: it is started with `variables` in its environment.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LIBRARY = "libcuda.so.1"


def build(folder: Path) -> None:
    """Compiles the library into the folder, by the C++ compiler of CXX and Triton's copy of NVIDIA's header."""
    import triton

    include = Path(triton.__file__).parent / "backends/nvidia/include"
    compiler = os.environ.get("CXX", "c++").split()
    source = Path(__file__).with_suffix(".cpp")
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{include}"]
    subprocess.run([*compiler, *flags, str(source), "-o", str(folder / LIBRARY)], check=True)


def variables(folder: Path) -> dict[str, str]:
    """The environment variables of a process whose driver is the library in the folder, and whose Triton compiles."""
    paths = filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))
    return {"LD_LIBRARY_PATH": ":".join(paths), "TRITON_LIBCUDA_PATH": str(folder), "TRITON_INTERPRET": "0"}


def is_there() -> bool:
    """Whether this process has the library as its driver."""
    try:
        return hasattr(ctypes.CDLL(LIBRARY), "fake_watch")
    except OSError:
        return False


class Launch(NamedTuple):
    """What cuLaunchKernelEx was given: `numbers` as in fake_cuda.cpp, and the bytes of each argument."""

    name: str
    function: int
    numbers: tuple[int, ...]
    arguments: tuple[bytes, ...]


class Device:
    """Makes Triton's own driver, with its own launcher, the active one of this process, over the fake library."""

    def __init__(self) -> None:
        import triton
        from triton.backends.nvidia.driver import CudaDriver

        self._library = ctypes.CDLL(LIBRARY)
        # function -> (name, bytes of each parameter)
        self._kernels: dict[int, tuple[str, list[int]]] = {}
        driver = CudaDriver()
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda device: 7
        driver.get_device_capability = lambda device: (9, 0)
        load = driver.utils.load_binary

        def load_binary(name: str, binary: bytes, *rest: Any) -> tuple:
            loaded = load(name, binary, *rest)
            self._kernels[loaded[1]] = name, parameter_sizes(binary)
            return loaded

        driver.utils.load_binary = load_binary
        triton.runtime.driver.set_active(driver)

    def watch(self, told: Callable[[Launch], object] | None) -> None:
        """From now on every launch is told; none with None."""
        address = ctypes.c_void_p
        watcher = ctypes.CFUNCTYPE(None, address, ctypes.POINTER(ctypes.c_ulonglong), ctypes.c_int,
                                   ctypes.POINTER(address))  # fmt: skip

        # It must live as long as the library may call it.
        self._watcher = watcher()
        if told is not None:

            def launched(function: int, numbers: Any, count: int, params: Any) -> None:
                name, sizes = self._kernels[function]
                arguments = tuple(ctypes.string_at(params[i], size) for i, size in enumerate(sizes))
                told(Launch(name, function, tuple(numbers[:count]), arguments))

            self._watcher = watcher(launched)
        self._library.fake_watch(self._watcher)

    def fail(self, result: int) -> None:
        """From now on every launch has this result, a CUresult."""
        self._library.fake_fail(result)


def parameter_sizes(binary: bytes) -> list[int]:
    """Bytes of each parameter of the one kernel of a cubin, by the entries EIATTR_KPARAM_INFO of its .nv.info."""
    # Format, attribute and size; index 0; ordinal, offset and, from bit 18 of flags on, the size.
    entries = re.findall(rb"\x04\x17\x0c\x00\x00\x00\x00\x00(..)(..)(....)", binary, re.DOTALL)
    sizes = {int.from_bytes(ordinal, "little"): int.from_bytes(flags, "little") >> 18 for ordinal, _, flags in entries}
    return [sizes[ordinal] for ordinal in range(len(sizes))]
