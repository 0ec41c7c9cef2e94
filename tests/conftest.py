import os
import signal
from contextlib import nullcontext
from importlib import metadata

# Triton's kernels run on CPU tensors in these tests; triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The suite runs several workers on few cores; more threads than cores make every one of them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from cpu_isa import ISAS, instruction_set
from packaging.version import Version

from lora_kernels import backends


def _interpreter_fails():
    """Whether Triton's interpreter makes integers of arrays (triton-lang/triton#9171), which numpy no longer does."""
    try:
        triton = Version(metadata.version("triton"))
    except metadata.PackageNotFoundError:
        return False
    return triton < Version("3.7") and Version(metadata.version("numpy")) >= Version("2.4")


INTERPRETER_FAILS = os.environ["TRITON_INTERPRET"] == "1" and _interpreter_fails()


def pytest_runtest_setup(item):
    if INTERPRETER_FAILS and "triton" in item.nodeid and "triton_aot" not in item.nodeid:
        pytest.skip("the interpreter of Triton before 3.7 doesn't work with numpy 2.4 and newer")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals_are_heeded():
    """A shell's background jobs ignore SIGINT, and jobs under nohup SIGHUP; so would the processes that tests start."""
    heeded = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in heeded if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, heeded[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in ISAS), "triton", "cuda-emulated"])
def backend(request):
    """The name of every backend that can run on CPU tensors here, in turn and in force; cpu with every instruction set.

    What a backend gives is compared with a definition or an independent implementation in one test for all of them.
    """
    name = "cpu" if request.param.startswith("cpu-") else request.param
    if (reason := backends.available()[name]) is not None:
        pytest.skip(reason)
    if name == "triton" and os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    isa = instruction_set(request.param.removeprefix("cpu-")) if name == "cpu" else nullcontext()
    with isa, backends.use_backend(name):
        yield name


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set in turn."""
    with instruction_set(request.param):
        yield request.param
