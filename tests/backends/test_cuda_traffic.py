"""The bytes that the CUDA kernels of lora_linear load and store, counted by the emulator."""

import pytest
import torch
from lora_cases import LoraCase, OneLayer

from lora_kernels.backends.cuda.emulated import backend as cuda_emulated
from lora_kernels.bench.traffic import emulated_launches

pytestmark = pytest.mark.skipif(cuda_emulated.unavailable is not None, reason=str(cuda_emulated.unavailable))


@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_backward_pass_four_times_over_MK_and_three_over_MN(bias, column_scale):
    """A column scale takes three passes over MN more, all of them backward: it reads dy and y and writes dz."""
    M, N, K, R = 128, 256, 192, 1
    case = LoraCase(M, N, K, R, dtype=torch.bfloat16, dropout_p=0.2, bias=bias, column_scale=column_scale)
    functions = OneLayer(cuda_emulated).lora_linear_fwd, OneLayer(cuda_emulated).lora_linear_bwd
    with emulated_launches() as launches:
        case.run(*functions, scale_bwd=cuda_emulated.column_scale_bwd)
    assert len(launches) <= 6 + column_scale
    total = sum(loaded + stored for _, loaded, stored in launches)
    large = 2 * (4 * M * K + (6 if column_scale else 3) * M * N + 2 * N * K)
    # What is left is proportional to the rank: less than any one pass over a large tensor.
    assert large <= total < large + 2 * min(M * K, M * N, N * K)
