"""The CUDA C++ AdamW step under the emulator, against torch.optim.AdamW in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from lora_kernels.backends.cuda import emulated as cuda_emulated
from lora_kernels.testing import assert_close_to_reference

pytestmark = pytest.mark.skipif(cuda_emulated.unavailable is not None, reason=str(cuda_emulated.unavailable))

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Odd sizes, empty, a scalar, exactly one chunk, more than one, and views that are not 16 bytes aligned.
SHAPES = [(1,), (63,), (0, 4), (), (129, 65), (2, 4096), (16, 1100)]
SETTINGS = ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 0.16, "weight_decay": 0.0})
STEPS = 3


def unaligned(t):
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def problem(dtype, state_dtype, place=lambda t: t):
    """Two groups of tensors in the form that adamw_step takes, all columns by name."""
    generator = torch.Generator().manual_seed(0)
    params = [place(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    groups = []
    for index, settings in enumerate(SETTINGS):
        own = params[index::2]
        zeros = [[place(torch.zeros(p.shape, dtype=state_dtype)) for p in own] for _ in range(2)]
        masters = [place(p.to(state_dtype)) if dtype.itemsize < 4 else None for p in own]
        steps = [torch.zeros(()) for _ in own]
        groups.append(SimpleNamespace(params=own, grads=[], exp_avgs=zeros[0], exp_avg_sqs=zeros[1], steps=steps,
                                      masters=masters, beta1=0.9, beta2=0.99, eps=1e-8, **settings))  # fmt: skip
    return groups


def set_gradients(groups, step, dtype, place=lambda t: t):
    generator = torch.Generator().manual_seed(1 + step)
    for group in groups:
        group.grads = [place(torch.randn(p.shape, generator=generator).to(dtype)) for p in group.params]


def torch_run(dtype, grad_dtype, steps, max_grad_norm):
    """Parameters, first and second moments as flat tensors, and the last norm, from torch alone."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(grad_dtype[0]).to(dtype) for shape in SHAPES]
    params = [torch.nn.Parameter(p) for p in params]
    optimizer = torch.optim.AdamW(
        [{"params": params[index::2], "betas": (0.9, 0.99), **settings} for index, settings in enumerate(SETTINGS)]
    )
    norm = None
    for step in range(steps):
        generator = torch.Generator().manual_seed(1 + step)
        for p in params[::2] + params[1::2]:
            p.grad = torch.randn(p.shape, generator=generator).to(grad_dtype[1]).to(dtype)
        norm = None if max_grad_norm is None else clip_grad_norm_(params, max_grad_norm)
        optimizer.step()
    ordered = params[::2] + params[1::2]
    state = [flat([optimizer.state[p][name] for p in ordered]) for name in ("exp_avg", "exp_avg_sq")]
    return [flat(p.detach() for p in ordered), *state, norm]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("place", [lambda t: t, unaligned], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0, math.inf])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP16)])
def test_steps_equal_torch_adamw(dtypes, max_grad_norm, place):
    dtype, grad_dtype = dtypes
    groups, cache = problem(dtype, FP32, place), {}
    for step in range(STEPS):
        set_gradients(groups, step, grad_dtype, place)
        norm = cuda_emulated.adamw_step(groups, max_grad_norm, cache)
    exact, eager = (torch_run(d, dtypes, STEPS, max_grad_norm) for d in (FP64, FP32))
    masters = [t for group in groups for t in (group.params if dtype == FP32 else group.masters)]
    moments = [flat([t for group in groups for t in getattr(group, name)]) for name in ("exp_avgs", "exp_avg_sqs")]
    for name, *three in zip(("params", "exp_avg", "exp_avg_sq"), [flat(masters), *moments], eager, exact, strict=False):
        assert_close_to_reference(*three, name)
    if max_grad_norm is not None:
        assert_close_to_reference(norm, eager[3], exact[3], "grad_norm")
    for group in groups:
        assert all(step == STEPS for step in group.steps)
        for param, master in zip(group.params, group.masters, strict=True):
            assert master is None or torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_changes_nothing(poison):
    groups, cache = problem(FP32, FP32), {}
    set_gradients(groups, 0, FP32)
    cuda_emulated.adamw_step(groups, 1.0, cache)

    def everything():
        columns = ("params", "exp_avgs", "exp_avg_sqs", "steps")
        return flat([t for group in groups for name in columns for t in getattr(group, name)])

    before = everything()
    groups[1].grads[-1].view(-1)[-1] = poison
    norm = cuda_emulated.adamw_step(groups, 1.0, cache)
    assert not torch.isfinite(norm) and torch.equal(everything(), before)


def test_a_value_written_to_a_low_precision_parameter_replaces_the_master():
    groups = problem(BF16, FP32)
    set_gradients(groups, 0, BF16)
    groups[0].params[0].fill_(5.0)
    cuda_emulated.adamw_step(groups, None, {})
    assert 4.9 < groups[0].masters[0].item() < 5.0


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
