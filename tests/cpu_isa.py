"""The builds of the CPU kernels, one for each instruction set."""

from contextlib import contextmanager

import pytest

from lora_kernels import cpu

ISAS = ("generic", "avx2", "avx2_wide", "avx512")


@contextmanager
def _setting(get, change, value):
    previous = get()
    change(value)
    try:
        yield
    finally:
        change(previous)


@contextmanager
def instruction_set(name):
    """Run the CPU kernels of this build inside the block; skips the test where this processor can't."""
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    if name not in cpu._C.isa_supported():
        pytest.skip(f"this processor does not have {name}")
    with _setting(cpu._C.get_isa, cpu._C.set_isa, name):
        yield


@contextmanager
def amx(enabled):
    """Use AMX inside the block, or don't; skips the test where it should be used and can't."""
    if enabled and (cpu._C.get_isa() != "avx512" or not cpu._C.amx_supported()):
        pytest.skip("this processor, or this build of the kernels, does not have AMX")
    with _setting(cpu._C.amx_enabled, cpu._C.enable_amx, enabled):
        yield


def multiply_bf16(monkeypatch, how):
    """Have bfloat16 products taken "converted" to float32, or in bfloat16 by "torch" or by our "own" kernel, whatever
    this processor has."""
    monkeypatch.setattr(cpu, "native_bfloat16", lambda: how != "converted")
    monkeypatch.setattr(cpu, "own_bfloat16", lambda: how == "own")
