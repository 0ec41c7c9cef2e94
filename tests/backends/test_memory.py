"""Blocks of memory for large results: used again when nothing refers to them, and never before."""

import gc
import os
import random
import signal
import threading
import weakref

import pytest
import torch

from lora_kernels import lora_linear
from lora_kernels.backends.cpu import memory as recycling
from lora_kernels.backends.cpu.memory import Pool

MIB = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_used_again_when_the_last_reference_is_gone(dtype):
    pool = Pool()
    t = pool.empty(512, 3, 512, dtype=dtype)
    assert t.shape == (512, 3, 512) and t.dtype == dtype and t.is_contiguous()
    t.fill_(1)
    address, view, parameter = t.data_ptr(), t[5:, 1], torch.nn.Parameter(t)
    for name in ("t", "view", "parameter"):
        other = pool.empty(512, 3, 512, dtype=dtype)
        assert other.data_ptr() != address, name
        del other
        if name == "t":
            del t
        elif name == "view":
            assert (view == 1).all()
            del view
    del parameter
    gc.collect()
    held = [pool.empty(512, 3, 512, dtype=dtype) for _ in range(2)]
    assert address in {t.data_ptr() for t in held}


@pytest.mark.parametrize("pool", [Pool(), None], ids=["blocks", "huge pages"])
def test_a_result_may_be_changed_in_place(monkeypatch, pool):
    """A view that comes out of an autograd Function may not."""
    monkeypatch.setattr(recycling, "_pool", pool)
    x, weight = torch.randn(2100, 512, requires_grad=True), torch.randn(640, 512)
    assert min(x.nbytes, 2100 * 640 * 4) >= recycling.HUGE
    y = lora_linear(x, weight, torch.randn(4, 512, requires_grad=True), torch.randn(640, 4), 2.0)
    torch.relu_(y.add_(1)).sum().backward()
    assert not recycling.empty(2100, 640, dtype=torch.float32)._is_view() and x.grad.data_ptr() % 64 == 0


def test_a_large_result_is_given_back(monkeypatch):
    monkeypatch.setattr(recycling, "_pool", None)
    made = []
    monkeypatch.setattr(
        recycling, "_new_block", lambda size, new=recycling._new_block: made.append(new(size)) or made[0]
    )
    t = recycling.empty(3, recycling.HUGE, dtype=torch.bfloat16).fill_(1)
    assert t.shape == (3, recycling.HUGE) and t.is_contiguous() and (made[0] != 0).any()
    block = weakref.ref(made.pop())
    assert block() is not None
    del t
    assert block() is None
    assert recycling.empty(2, 3, dtype=torch.float32, device="meta").is_meta


def test_what_autograd_keeps_is_not_used_again():
    pool = Pool()
    x = torch.ones(512, 1024, requires_grad=True)
    y = pool.empty(512, 1024, dtype=torch.float32).fill_(3)
    z = (x * y).sum()
    address = y.data_ptr()
    del y
    other = pool.empty(512, 1024, dtype=torch.float32).fill_(7)
    assert other.data_ptr() != address
    z.backward()
    assert (x.grad == 3).all()


def test_blocks_take_no_more_than_what_was_in_use_at_one_time():
    """As when the lengths of the batches change from step to step."""
    pool, choose, held, most = Pool(), random.Random(0), [], 0
    for _ in range(400):
        if held and choose.random() < 0.5:
            held.pop(choose.randrange(len(held)))
        elif len(held) < 12:
            held.append(pool.empty(choose.randrange(MIB, 4 * MIB), dtype=torch.uint8))
        used = sum(t.numel() for t in held)
        most = max(most, used)
        # A block may be 1.25 times its result, whose size is rounded up.
        assert used + pool.free_bytes() <= 1.25 * most + MIB
    held.clear()
    assert pool.free_bytes() > 0


def test_small_results_leave_large_blocks_for_the_next_step():
    pool = Pool()
    large = [pool.empty(12 * MIB, dtype=torch.uint8) for _ in range(2)]
    addresses = {t.data_ptr() for t in large}
    large.clear()
    small = [pool.empty(MIB, dtype=torch.uint8) for _ in range(8)]
    assert len({t.data_ptr() for t in small}) == 8
    assert pool.empty(12 * MIB, dtype=torch.uint8).data_ptr() in addresses


def test_threads_never_share_a_block():
    pool, wrong = Pool(), []

    def work(value):
        for index in range(300):
            t = pool.empty(MIB // 4 << index % 3, dtype=torch.float32).fill_(value)
            if not (t == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_our_ops_take_blocks_only_where_enabled(monkeypatch):
    def gradients():
        torch.manual_seed(0)
        x, weight = torch.randn(600, 512, requires_grad=True), torch.randn(640, 512)
        adapters = [torch.randn(4, 512, requires_grad=True), torch.randn(640, 4, requires_grad=True)]
        y = lora_linear(x, weight, *adapters, 2.0, dropout_p=0.1)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *adapters])]

    # A trainer that ran in this process may have enabled it.
    monkeypatch.setattr(recycling, "_pool", None)
    expected = gradients()
    monkeypatch.setattr(recycling, "_pool", Pool())
    for _ in range(3):
        for t, other in zip(gradients(), expected, strict=True):
            assert torch.equal(t, other)
    assert recycling._pool.free_bytes() > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_does_not_wait_for_a_thread_of_its_parent(monkeypatch):
    pool = recycling.Pool()
    monkeypatch.setattr(recycling, "_pool", pool)
    with pool._lock:
        child = os.fork()
        if child == 0:
            # Killed where it waits for the lock.
            signal.alarm(20)
            recycling.empty(recycling.LARGE, dtype=torch.float32)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
