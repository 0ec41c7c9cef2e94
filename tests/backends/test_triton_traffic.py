"""The bytes that the Triton kernels of lora_linear load and store, counted under the interpreter."""

import pytest
import torch
from lora_cases import LoraCase, OneLayer

pytest.importorskip("triton")
from lora_kernels.backends import triton
from lora_kernels.backends.triton import lora_linear
from lora_kernels.bench.traffic import triton_launches

pytestmark = pytest.mark.skipif(not lora_linear.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("column_scale", [False, True])
def test_forward_and_backward_pass_four_times_over_MK_and_three_over_MN(column_scale):
    """A column scale takes three passes over MN more, all of them backward: it reads dy and y and writes dz."""
    M, N, K, R = 128, 256, 192, 1
    case = LoraCase(M, N, K, R, dtype=torch.bfloat16, dropout_p=0.2, column_scale=column_scale)
    one = OneLayer(triton)
    functions = one.lora_linear_fwd, one.lora_linear_bwd
    with triton_launches() as launches:
        case.run(*functions, scale_bwd=lora_linear.column_scale_bwd)
    print("\n".join(map(str, launches)))
    assert len(launches) <= 6 + column_scale
    total = sum(loaded + stored for _, loaded, stored in launches)
    large = 2 * (4 * M * K + (6 if column_scale else 3) * M * N + 2 * N * K)
    # What is left is proportional to the rank: less than any one pass over a large tensor.
    assert large <= total < large + 2 * min(M * K, M * N, N * K)
