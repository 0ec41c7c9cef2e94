"""The Triton kernels of NF4 weights under the interpreter, against float64; the codec is in tests/ops/test_nf4.py."""

import random
from dataclasses import fields

import pytest
import torch
from lora_cases import SCALING

from lora_kernels import lora_linear, quantize_nf4, reference, use_backend
from lora_kernels.backends import triton as backend
from lora_kernels.ops.frozen_linear import frozen_linear
from lora_kernels.testing import assert_close_to_reference, lora_inputs
from lora_kernels.types import NF4

pytest.importorskip("triton")
from test_triton import (
    BF16,
    EXACT,
    FP16,
    FP32,
    ONE,
    Case,
    OperatorLog,
    patch_language_once_per_launch,  # noqa: F401 (an autouse fixture)
    shuffled_range,
    small_blocks,
)
from triton.runtime import interpreter

from lora_kernels.backends.triton import configs
from lora_kernels.backends.triton.common import INTERPRETED
from lora_kernels.backends.triton.lora_linear import planned

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def forget_configurations():
    """Some tests change what they are made of."""
    planned.cache_clear()
    yield
    planned.cache_clear()


def assert_same(actual, expected):
    names = [field.name for field in fields(NF4)]
    for name, a, b in ((name, getattr(actual, name), getattr(expected, name)) for name in names):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
        else:
            assert a == b, name


class Nf4Case(Case):
    """A Case whose kernels get an NF4 weight; float64 and eager versions get the dense weight that it stands for."""

    def __init__(self, M, N, K, R, block_size=64, double_quant=False, **options):
        super().__init__(M, N, K, R, **options)
        self.parts = reference.quantize_nf4(self.inputs["weight"], block_size, double_quant)
        self.inputs["weight"] = torch.empty(N, K)
        reference.dequantize_nf4(self.parts, self.inputs["weight"])

    def run(self, fwd, bwd, place=lambda name, t: t, dtype=None, **options):
        if dtype is not None:
            return super().run(fwd, bwd, place, dtype, **options)
        placed = (None if part is None else place("part", part) for part in self.parts.tensors)
        parts = NF4(*placed, self.parts.block_size, self.parts.shape)
        return super().run(
            lambda x, weight, *rest: fwd(x, parts, *rest),
            lambda dy, x, h, weight, *rest: bwd(dy, x, h, parts, *rest),
            place,
            **options,
        )


@pytest.mark.parametrize(
    "case",
    [
        dict(M=1, N=1, K=1, R=1, double_quant=True),
        dict(M=5, N=67, K=192, R=4, bias=True, lora_e=True),
        dict(M=19, N=67, K=192, R=4, bias=True, column_scale=True, dtype=BF16, adapter_dtype=FP32),
        dict(M=65, N=70, K=96, R=3, block_size=32, double_quant=True, dropout_p=0.3, bias=True),
        dict(M=17, N=65, K=128, R=17, block_size=128, dtype=BF16, adapter_dtype=FP32, dropout_p=0.1, lora_e=True),
        dict(M=66, N=63, K=64, R=8, dtype=BF16, double_quant=True, bias=True),
        dict(M=9, N=300, K=64, R=2, block_size=32, dtype=FP16, double_quant=True, dropout_p=0.5),
        # Rows that begin inside a block, and inside a byte.
        dict(M=33, N=65, K=100, R=4, double_quant=True, dropout_p=0.2, bias=True),
        dict(M=18, N=67, K=129, R=5, dtype=BF16, bias=True, lora_e=True),
        dict(M=5, N=35, K=41, R=2, block_size=4096, double_quant=True),
    ],
    ids=lambda c: f"{c['M']}x{c['N']}x{c['K']}bs{c.get('block_size', 64)}-{str(c.get('dtype', FP32))[6:]}",
)
def test_forward_and_backward_against_float64(case):
    Nf4Case(**case).check()


@pytest.mark.parametrize("K", [512, 576])
def test_the_blocks_for_few_rows(monkeypatch, K):
    monkeypatch.setattr(configs, "_gemm_table", lambda family, kernel, *_: configs._SKINNY_GEMM[kernel])
    Nf4Case(5, 20, K, 2, double_quant=True, bias=True).check()


@pytest.mark.parametrize("family", ["sm80", "sm86", "sm90"])
def test_the_blocks_for_many_rows(monkeypatch, family):
    monkeypatch.setattr(configs, "_gemm_table", lambda _, kernel, *__: configs._NF4_GEMM[family])
    Nf4Case(130, 70, 128, 2, dtype=BF16, double_quant=True, dropout_p=0.2, bias=True).check()


@pytest.mark.parametrize("K", [64, 65])
def test_scales_beyond_the_first_256_blocks(K):
    Nf4Case(3, 300, K, 1, block_size=32, double_quant=True).check()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_without_an_adapter(dtype):
    inputs = lora_inputs(18, 35, 64, 1, dtype, bias=True)
    dy = torch.randn(18, 35).to(dtype)
    with use_backend("triton"):
        weight = quantize_nf4(inputs["weight"], double_quant=True)
        x = inputs["x"].clone().requires_grad_()
        y = frozen_linear(x, weight, inputs["bias"])
        y.backward(dy)
        dense = weight.dequantize(FP32).double()
    eager = inputs["x"].clone().requires_grad_()
    eager_y = torch.nn.functional.linear(eager, dense.to(dtype), inputs["bias"])
    eager_y.backward(dy)
    exact = inputs["x"].double() @ dense.T + inputs["bias"].double()
    assert_close_to_reference(y.detach(), eager_y.detach(), exact, "y")
    assert_close_to_reference(x.grad, eager.grad, dy.double() @ dense, "dx")


def test_gradients_of_an_adapter_of_rank_0_are_empty():
    case = Nf4Case(3, 5, 64, 1)
    x, h, dy = case.inputs["x"], torch.empty(3, 0), case.dy
    adapters = torch.empty(0, 64), torch.empty(5, 0)
    needs = (False, True, True, False)
    _, da, db, _ = ONE.lora_linear_bwd(dy, x, h, case.parts, *adapters, SCALING, None, 0.0, None, needs)
    assert da.shape == (0, 64) and db.shape == (5, 0)


def test_the_op_trains_the_adapter_on_this_backend():
    inputs = lora_inputs(4, 6, 64, 2)
    dense = inputs.pop("weight")
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t is not None}
    with use_backend("triton"):
        weight = quantize_nf4(dense)
        lora_linear(weight=weight, scaling=SCALING, **leaves).sum().backward()
        dense = weight.dequantize()
    actual = {name: t.grad.clone() for name, t in leaves.items()}
    for t in leaves.values():
        t.grad = None
    reference.lora_linear_ref(weight=dense, scaling=SCALING, **leaves).sum().backward()
    for name, t in leaves.items():
        torch.testing.assert_close(actual[name], t.grad)


@pytest.mark.parametrize("K", [64, 65])
def test_guarded_buffers(monkeypatch, K):
    """Nothing outside the tensors is read or written, and every output element is: all bytes start as 0xFF, a NaN."""
    pad = 1024
    arenas = []

    def guarded(shape, dtype, device="cpu"):
        size = (shape if isinstance(shape, int) else torch.Size(shape).numel()) * dtype.itemsize
        arena = torch.full((2 * pad + size,), 0xFF, dtype=torch.uint8)
        arenas.append(arena)
        return arena[pad : pad + size].view(dtype).view(shape)

    def place(name, t):
        return guarded(t.shape, t.dtype).copy_(t)

    case = Nf4Case(19, 35, K, 3, block_size=32, double_quant=True, bias=True)
    exact = case.run(EXACT.lora_linear_fwd, EXACT.lora_linear_bwd, dtype=torch.float64)
    weight = case.inputs["weight"]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", guarded)
    actual = case.run(ONE.lora_linear_fwd, ONE.lora_linear_bwd, place)
    parts = backend.quantize_nf4(place("weight", weight), 32, True)
    out = guarded(weight.shape, FP32)
    backend.dequantize_nf4(parts, out)
    monkeypatch.setattr(torch, "empty", empty)
    assert len(arenas) > 20
    for arena in arenas:
        assert (arena[:pad] == 0xFF).all() and (arena[-pad:] == 0xFF).all()
    for name, t in actual.items():
        if t is not None:
            torch.testing.assert_close(t.double(), exact[name], atol=1e-4, rtol=1e-4)
    assert_same(parts, reference.quantize_nf4(weight, 32, True))
    expected = torch.empty_like(weight)
    reference.dequantize_nf4(parts, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("K", [96, 90])
def test_the_order_of_programs_does_not_matter(monkeypatch, K):
    small_blocks(monkeypatch)
    case = Nf4Case(40, 70, K, 3, block_size=32, double_quant=True)
    first = case.check()
    monkeypatch.setattr(interpreter, "range", shuffled_range(random.Random(0)), raising=False)
    second = case.run(ONE.lora_linear_fwd, ONE.lora_linear_bwd)
    for name, t in first.items():
        assert t is second[name] is None or torch.equal(t, second[name]), f"{name} depends on the order of programs"


def test_launches(monkeypatch):
    """As many as for a dense weight; decoding takes one, double quantisation two and torch's mean."""
    case = Nf4Case(3, 10, 64, 3, double_quant=True, dtype=BF16, adapter_dtype=FP32, dropout_p=0.1)
    case.check()
    launches = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *a, **k: launches.append(self.fn.__name__))
    with OperatorLog() as log:
        case.run(ONE.lora_linear_fwd, ONE.lora_linear_bwd)
    assert launches == ["_h_kernel", "_gemm_kernel", "_dh_dlora_b_kernel", "_reduce_kernel", "_dlora_a_kernel",
                        "_gemm_kernel"]  # fmt: skip
    assert set(log.names) <= {"empty", "permute", "t", "view"}, log.names
    launches.clear()
    with OperatorLog() as log:
        parts = backend.quantize_nf4(case.inputs["weight"], 64, True)
        backend.dequantize_nf4(parts, torch.empty(10, 64))
    assert launches == ["_quantize_kernel", "_quantize_absmax_kernel", "_dequantize_kernel"]
    assert set(log.names) <= {"empty", "mean", "slice"}, log.names


def test_errors_name_the_argument():
    weight = torch.zeros(2, 64, dtype=torch.float64)
    with pytest.raises(TypeError, match="weight: .*float64"):
        backend.quantize_nf4(weight, 64, False)
    with pytest.raises(TypeError, match="out: .*float64"):
        backend.dequantize_nf4(backend.quantize_nf4(weight.float(), 64, False), weight)
