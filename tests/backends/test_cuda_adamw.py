"""What is the CUDA C++ AdamW step's own, under the emulator; what it computes is in tests/ops/test_adamw.py."""

from types import SimpleNamespace

import pytest
import torch

from lora_kernels.backends.cuda.emulated import backend as cuda_emulated

pytestmark = pytest.mark.skipif(cuda_emulated.unavailable is not None, reason=str(cuda_emulated.unavailable))

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Odd sizes, empty, a scalar, exactly one chunk and more than one.
SHAPES = [(1,), (63,), (0, 4), (), (129, 65), (2, 4096), (16, 1100)]
SETTINGS = ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 0.16, "weight_decay": 0.0})


def problem(dtype, state_dtype):
    """Two groups of tensors in the form that adamw_step takes, all columns by name."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    groups = []
    for index, settings in enumerate(SETTINGS):
        own = params[index::2]
        zeros = [[torch.zeros(p.shape, dtype=state_dtype) for p in own] for _ in range(2)]
        masters = [p.to(state_dtype) if dtype.itemsize < 4 else None for p in own]
        steps = [torch.zeros(()) for _ in own]
        groups.append(SimpleNamespace(params=own, grads=[], exp_avgs=zeros[0], exp_avg_sqs=zeros[1], steps=steps,
                                      masters=masters, beta1=0.9, beta2=0.99, eps=1e-8, **settings))  # fmt: skip
    return groups


def set_gradients(groups, step, dtype):
    generator = torch.Generator().manual_seed(1 + step)
    for group in groups:
        group.grads = [torch.randn(p.shape, generator=generator).to(dtype) for p in group.params]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def test_tables_are_written_only_when_they_change():
    groups, cache = problem(FP32, FP32), {}
    set_gradients(groups, 0, FP32)
    cuda_emulated.adamw_step(groups, 1.0, cache)
    table, settings = cache["table"][1], cache["settings"][1]
    versions = table._version, settings._version
    cuda_emulated.adamw_step(groups, 1.0, cache)
    assert (cache["table"][1]._version, cache["settings"][1]._version) == versions
    groups[0].lr *= 0.5
    cuda_emulated.adamw_step(groups, 1.0, cache)
    assert cache["settings"][1] is settings and settings._version > versions[1] and table._version == versions[0]


def test_the_order_of_threads_and_blocks_does_not_matter():
    from lora_kernels import _simt

    results = []
    for schedule in (("forward", 0), ("reversed", 0), ("shuffled", 1)):
        groups, cache = problem(BF16, FP32), {}
        _simt.set_schedule(*schedule)
        try:
            for step in range(2):
                set_gradients(groups, step, BF16)
                norm = cuda_emulated.adamw_step(groups, 1.0, cache)
        finally:
            _simt.set_schedule("forward")
        results.append(flat([norm, *(t for group in groups for t in group.masters)]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_errors_name_the_tensor():
    groups = problem(FP64, FP64)
    set_gradients(groups, 0, FP64)
    with pytest.raises(ValueError, match="a parameter is torch.float64 on cpu"):
        cuda_emulated.adamw_step(groups, None, {})
