"""The optimizer step under pytest-benchmark; see bench_lora_linear.py."""

import pytest

from lora_kernels.bench.adamw import CONTENDERS, make_step


@pytest.mark.parametrize("contender", CONTENDERS)
def test_adamw(benchmark, contender: str) -> None:
    benchmark(make_step(contender, 1, 16))
