"""lora_linear under pytest-benchmark: `pytest benchmarks/ --benchmark-only`. `lora-kernels bench` interleaves the same
contenders on real sizes, and states floors and ratios."""

import pytest
import torch

from lora_kernels.bench.cases import Settings
from lora_kernels.bench.lora_linear import CONTENDERS, DORA, make_step, why_not


@pytest.mark.parametrize("contender", [*CONTENDERS, *DORA[1:]])
@pytest.mark.parametrize("M", [1, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lora_linear(benchmark, contender: str, M: int, dtype: torch.dtype) -> None:
    if reason := why_not(contender, 192, Settings(dtype, quick=True)):
        pytest.skip(reason)
    benchmark(make_step(contender, M, 192, 192, 16, 0.1, dtype))
