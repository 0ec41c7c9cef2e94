"""The CUDA C++ kernels of NF4 weights under the emulator, against float64; the codec is in tests/ops/test_nf4.py."""

import pytest
import torch
from lora_cases import LoraCase, OneLayer, strided

from lora_kernels import reference
from lora_kernels.backends.cuda.emulated import backend as cuda_emulated

pytestmark = pytest.mark.skipif(cuda_emulated.unavailable is not None, reason=str(cuda_emulated.unavailable))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(LoraCase):
    """LoraCase with the weight in NF4, and its dequantised values for those that it is compared with."""

    backend = cuda_emulated

    def __init__(self, *args, block_size=64, double_quant=True, **options):
        super().__init__(*args, **options)
        self.nf4 = reference.quantize_nf4(self.inputs["weight"], block_size, double_quant)
        reference.dequantize_nf4(self.nf4, self.inputs["weight"])

    def run(self, fwd, bwd, place=lambda name, t: t, dtype=None, **options):
        if dtype is None:
            fwd = self._with_nf4(fwd, 1)
            bwd = self._with_nf4(bwd, 3)
        return super().run(fwd, bwd, place, dtype, **options)

    def _with_nf4(self, function, position):
        return lambda *args: function(*args[:position], self.nf4, *args[position + 1 :])


@pytest.mark.parametrize(
    "case",
    [
        dict(M=1, N=1, K=1, R=1),
        dict(M=1, N=72, K=1056, R=16, adapter_dtype=FP32, bias=True),
        dict(M=3, N=65, K=129, R=17, bias=True, lora_e=True, dropout_p=0.2),
        dict(M=8, N=33, K=64, R=4, dtype=FP16, adapter_dtype=FP32, double_quant=False),
        dict(M=9, N=48, K=96, R=64, lora_e=True, block_size=128),
        dict(M=16, N=40, K=160, R=8, dtype=FP16, bias=True, block_size=32),
        dict(M=17, N=40, K=72, R=8, dropout_p=0.3, bias=True),
        dict(M=5, N=33, K=96, R=8, bias=True, column_scale=True),
        dict(M=17, N=40, K=72, R=8, dropout_p=0.3, bias=True, column_scale=True),
    ],
    ids=lambda c: f"{c['M']}x{c['N']}x{c['K']}r{c['R']}",
)
def test_forward_and_backward_against_float64(case):
    Case(**{"dtype": BF16, **case}).check()


def test_strided_tokens():
    Case(5, 24, 64, 4, dtype=BF16, bias=True).check(lambda name, t: t if name == "weight" else strided(name, t))


def test_the_frozen_linear_has_no_rank():
    """lora_a [0, K]: what a quantised layer without an adapter asks for."""
    for M in (2, 20):
        weight = reference.quantize_nf4(torch.randn(24, 64), 64, True)
        x, dy = torch.randn(M, 64).bfloat16(), torch.randn(M, 24).bfloat16()
        lora_a, lora_b = x.new_empty(0, 64), x.new_empty(24, 0)
        y, h = OneLayer(cuda_emulated).lora_linear_fwd(x, weight, lora_a, lora_b, 1.0)
        needs = (True, False, False, False)
        dx, *rest = OneLayer(cuda_emulated).lora_linear_bwd(
            dy, x, h, weight, lora_a, lora_b, 1.0, None, 0.0, None, needs
        )
        dense = torch.empty(24, 64, dtype=BF16)
        reference.dequantize_nf4(weight, dense)
        assert h.shape == (M, 0) and rest == [None] * 3
        torch.testing.assert_close(y, (x.double() @ dense.double().T).bfloat16(), atol=0.02, rtol=0.01)
        torch.testing.assert_close(dx, (dy.double() @ dense.double()).bfloat16(), atol=0.02, rtol=0.01)


def test_decoding_reads_little_but_the_four_bits():
    from lora_kernels import _simt

    case = Case(1, 256, 1024, 8, dtype=BF16, adapter_dtype=FP32)
    _simt.take_traffic(record=True)
    case.run(OneLayer(cuda_emulated).lora_linear_fwd, lambda *args: (None,) * 4)
    traffic = {kernel: loaded for kernel, loaded, _ in _simt.take_traffic(record=False)}
    loaded = next(loaded for kernel, loaded in traffic.items() if "Nf4Weight" in kernel)
    packed = 256 * 1024 // 2
    # Scales (a byte for 64 elements), x, h and lora_b make up the rest.
    assert packed <= loaded <= 1.2 * packed
