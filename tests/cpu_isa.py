"""The builds of the CPU kernels, one for each instruction set, and the threads that they run on."""

from contextlib import contextmanager

import pytest
import torch

from lora_kernels.backends import cpu
from lora_kernels.backends.cpu import lora_linear
from lora_kernels.backends.cpu.extension import kernels

ISAS = ("generic", "avx2", "avx2_wide", "avx512", "avx512_bf16", "avx512_amx")


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
    if name not in kernels.isa_supported():
        pytest.skip(f"this processor does not have {name}")
    with _setting(kernels.get_isa, kernels.set_isa, name):
        yield


def multiply_bf16(monkeypatch, how):
    """Have bfloat16 products taken in bfloat16 ("own"), or "converted" to float32, whatever this processor has."""
    monkeypatch.setattr(lora_linear, "own_bfloat16", lambda: how == "own")


@contextmanager
def threads(count, at_least=None):
    """Have kernels run on `count` threads inside the block, however little work they have; fails unless one of them ran
    on `at_least` (default: `count`)."""
    at_least = count if at_least is None else at_least
    kernels.spare_threads(False)
    kernels.take_most_threads()
    try:
        with _setting(torch.get_num_threads, torch.set_num_threads, count):
            yield
        ran = kernels.take_most_threads()
    finally:
        kernels.spare_threads(True)
    assert ran >= at_least, f"the kernels ran on {ran} threads; expected: {at_least}"
