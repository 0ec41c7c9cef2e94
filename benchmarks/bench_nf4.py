"""NF4's codec and frozen linear layer under pytest-benchmark; see bench_lora_linear.py."""

import pytest
import torch

from lora_kernels.bench import nf4
from lora_kernels.bench.cases import Settings

SETTINGS = Settings(torch.float32, quick=True)


def run(benchmark, case, contender: str) -> None:
    if contender in case.skipped:
        pytest.skip(case.skipped[contender])
    benchmark(case.steps[contender]())


@pytest.mark.parametrize("contender", ["ours", "bnb"])
@pytest.mark.parametrize("work", ["quantize", "dequantize", "dequantize-into"])
def test_codec(benchmark, work: str, contender: str) -> None:
    run(benchmark, nf4.codec_case(work, 192, 192, SETTINGS), contender)


@pytest.mark.parametrize("contender", ["dense", "ours", "ours-dense", "bnb", "grouped"])
@pytest.mark.parametrize("M", [1, 64])
def test_linear(benchmark, contender: str, M: int) -> None:
    run(benchmark, nf4.linear_case(M, 192, 192, SETTINGS), contender)
