"""Every Triton kernel and configuration, compiled for GPUs that aren't here, and what the binaries say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_tools import table, variants  # noqa: E402

from lora_kernels.triton import configs  # noqa: E402

TOOL = Path(__file__).parent / "triton_tools.py"


def compile_and_check(*options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, TOOL, "--json", *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads(result.stdout)
    print("\n" + table(rows))
    assert len(rows) == len(configs.families()) * len(variants("--full" in options))
    bad = [
        row
        for row in rows
        if row["spills"]
        or row["shared"] > row["shared_limit"]
        or (row["matrix_kernel"] and not row["matrix"])
        or row.get("contracted")
    ]
    assert not bad, "spills, too much shared memory, no matrix instruction or a contracted scale:\n" + table(bad)


def test_bf16_training_with_dropout_on_every_chip():
    compile_and_check()


@pytest.mark.slow
def test_every_dtype_rank_block_and_flag_on_every_chip():
    compile_and_check("--full")
