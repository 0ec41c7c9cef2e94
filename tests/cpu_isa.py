"""The builds of the CPU kernels, one for each instruction set."""

from contextlib import contextmanager

import pytest

from lora_kernels import cpu

ISAS = ("generic", "avx2", "avx2_wide", "avx512")


@contextmanager
def instruction_set(name):
    """Run the CPU kernels of this build inside the block; skips the test where this processor can't."""
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    if name not in cpu._C.isa_supported():
        pytest.skip(f"this processor does not have {name}")
    previous = cpu._C.get_isa()
    cpu._C.set_isa(name)
    try:
        yield
    finally:
        cpu._C.set_isa(previous)
