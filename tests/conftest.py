import os

# Triton's kernels run on CPU tensors in these tests; triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The suite runs several workers on few cores; more threads than cores make every one of them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from cpu_isa import ISAS, instruction_set  # noqa: E402


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set in turn."""
    with instruction_set(request.param):
        yield request.param
