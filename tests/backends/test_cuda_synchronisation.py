"""Each barrier, __syncwarp, commit and wait of the CUDA kernels is needed: left out, the emulator reports it."""

import re
from types import SimpleNamespace

import pytest
import torch
from lora_cases import LoraCase, OneLayer
from places import ROOT

from lora_kernels import reference
from lora_kernels.backends.cuda.emulated import backend as cuda_emulated

pytestmark = pytest.mark.skipif(cuda_emulated.unavailable is not None, reason=str(cuda_emulated.unavailable))

SOURCES = ROOT / "csrc/cuda"
SYNCHRONISATION = re.compile(
    r"\b(__syncthreads\w*|__syncwarp|cp_async_commit|cp_async_wait<.*>|wait_for_previous_kernel)\("
)


def lora_linear():
    # The last one has many steps over M.
    for M, N, K, R in [(136, 200, 264, 17), (200, 136, 136, 64), (1100, 24, 40, 4)]:
        case = LoraCase(M, N, K, R, dtype=torch.bfloat16, dropout_p=0.2, bias=True, lora_e=True, column_scale=True)
        case.backend = cuda_emulated
        case.check()


def nf4():
    weight = torch.randn(64, 512)
    expected, actual = reference.quantize_nf4(weight, 64, True), cuda_emulated.quantize_nf4(weight, 64, True)
    dense = [torch.empty_like(weight), torch.empty_like(weight)]
    reference.dequantize_nf4(expected, dense[0])
    cuda_emulated.dequantize_nf4(actual, dense[1])
    assert torch.equal(*dense)
    x, lora_a, lora_b = torch.randn(3, 512).bfloat16(), torch.randn(8, 512), torch.randn(64, 8)
    y, _ = OneLayer(cuda_emulated).lora_linear_fwd(x, actual, lora_a, lora_b, 1.0)
    assert (y.float() - x.float() @ (dense[0] + lora_b @ lora_a).T).abs().max() < 4


def few_rows():
    # More ranks than the kernel takes at once.
    case = LoraCase(3, 20, 300, 70, dtype=torch.bfloat16)
    case.backend = cuda_emulated
    case.check()


def adamw():
    generator = torch.Generator().manual_seed(0)
    params, grads, exp_avgs, exp_avg_sqs = (
        [torch.randn(size, generator=generator).abs() for size in (5000, 300)] for _ in range(4)
    )
    squares = sum(grad.double().square().sum() for grad in grads)
    group = SimpleNamespace(
        params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=[torch.zeros(()) for _ in params],
        masters=[None, None], beta1=0.9, beta2=0.99, eps=1e-8, lr=1e-2, weight_decay=0.0,
    )  # fmt: skip
    norm = cuda_emulated.adamw_step([group], 1.0, {})
    assert abs(norm.item() - squares.sqrt()) < 1e-4 * norm.item()


# By the beginning of the file's name.
WORK = {"lora_linear": lora_linear, "few_rows": few_rows, "nf4": nf4, "adamw": adamw}


def sites():
    for path in sorted(SOURCES.glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if path.name != "ptx.cuh" and (found := SYNCHRONISATION.search(line)):
                yield pytest.param(path.name, number, id=f"{path.name}:{number}-{found[1]}")


@pytest.fixture
def simt():
    from lora_kernels import _simt

    yield _simt
    _simt.set_skipped("", 0)


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_nothing_is_reported_when_nothing_is_left_out(work):
    work()


@pytest.mark.parametrize(("file", "line"), sites())
def test_what_is_left_out_is_reported(simt, file, line):
    work = next(work for name, work in WORK.items() if file.startswith(name))
    simt.set_skipped(file, line)
    # A kernel's error, or a result that is wrong.
    with pytest.raises((RuntimeError, AssertionError)):
        work()
