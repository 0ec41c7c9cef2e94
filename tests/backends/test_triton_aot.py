"""Every Triton kernel and configuration, compiled for GPUs that aren't here, and what the binaries say."""

import kernel_report
import pytest

pytest.importorskip("triton")

from triton_tools import applies, table, variants

from lora_kernels.backends.triton import configs


def compile_and_check(*options):
    rows = kernel_report.triton_rows(*options)
    print("\n" + table(rows))
    expected = [applies(chip, variant) for chip in configs.families() for variant in variants("--full" in options)]
    assert len(rows) == sum(expected)
    problems = kernel_report.triton_problems(rows)
    assert not problems, "\n".join(problems)


def test_bf16_training_with_dropout_on_every_chip():
    compile_and_check()


@pytest.mark.slow
def test_every_dtype_rank_block_and_flag_on_every_chip():
    compile_and_check("--full")
