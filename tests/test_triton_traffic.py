"""The bytes that the Triton kernels of lora_linear load and store, counted under the interpreter."""

import numpy as np
import pytest
import torch
from lora_cases import LoraCase

pytest.importorskip("triton")
from triton.runtime import interpreter  # noqa: E402

from lora_kernels.triton import lora_linear  # noqa: E402

pytestmark = pytest.mark.skipif(not lora_linear.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def launches(monkeypatch):
    """[(kernel, distinct bytes loaded, distinct bytes stored)] of every launch; an atomic access fails the test."""
    done, accesses = [], {"load": [], "store": []}
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def note(kind, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first = pointers.data[mask.data.astype(bool)].astype(np.int64)
        accesses[kind].append((first[:, None] + np.arange(size)).reshape(-1))

    def noted_load(self, pointers, mask, *rest):
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noted_launch(self, *args, **kwargs):
        for noted in accesses.values():
            noted.clear()
        launch(self, *args, **kwargs)
        distinct = [len(np.unique(np.concatenate(noted))) if noted else 0 for noted in accesses.values()]
        done.append((self.fn.__name__, *distinct))

    def refused(*args):
        raise AssertionError("an atomic access")

    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    monkeypatch.setattr(builder, "create_masked_store", noted_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", refused)
    monkeypatch.setattr(builder, "create_atomic_cas", refused)
    monkeypatch.setattr(executor, "__call__", noted_launch)
    return done


@pytest.mark.parametrize("column_scale", [False, True])
def test_forward_and_backward_pass_four_times_over_MK_and_three_over_MN(launches, column_scale):
    """A column scale takes three passes over MN more, all of them backward: it reads dy and y and writes dz."""
    M, N, K, R = 128, 256, 192, 1
    case = LoraCase(M, N, K, R, dtype=torch.bfloat16, dropout_p=0.2, column_scale=column_scale)
    functions = lora_linear.lora_linear_fwd, lora_linear.lora_linear_bwd
    case.run(*functions, scale_bwd=lora_linear.column_scale_bwd)
    print("\n".join(map(str, launches)))
    assert len(launches) <= 6 + column_scale
    total = sum(loaded + stored for _, loaded, stored in launches)
    large = 2 * (4 * M * K + (6 if column_scale else 3) * M * N + 2 * N * K)
    # What is left is proportional to the rank: less than any one pass over a large tensor.
    assert large <= total < large + 2 * min(M * K, M * N, N * K)
