"""The Triton kernels under the interpreter, against float64."""

import os
import random
import runpy
import subprocess
import sys

import fake_cuda
import pytest
import torch
from lora_cases import (
    RNG,
    GuardedBuffers,
    LoraCase,
    OneLayer,
    check_group,
    check_low_rank_beside_a_full_weight,
    group_case,
    group_results,
    strided,
)
from places import TESTS, environment
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import lora_linear_group, reference, use_backend
from lora_kernels.backends import triton as backend

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from lora_kernels.backends.triton import configs, lora_linear  # noqa: E402

ONE, EXACT = OneLayer(backend), OneLayer(reference)

pytestmark = pytest.mark.skipif(not lora_linear.INTERPRETED, reason="needs TRITON_INTERPRET=1")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def forget_configurations():
    """Some tests change what they are made of."""
    lora_linear.planned.cache_clear()
    yield
    lora_linear.planned.cache_clear()


@pytest.fixture
def noted_launches(monkeypatch):
    """(kernel, grid) of each launch of lora_linear, in their order."""
    launches = []
    launch = lora_linear._LoraLauncher.launch

    def noted(self, kernel, grid, *args, **constants):
        launches.append((kernel, grid))
        launch(self, kernel, grid, *args, **constants)

    monkeypatch.setattr(lora_linear._LoraLauncher, "launch", noted)
    return launches


@pytest.fixture(autouse=True)
def patch_language_once_per_launch(monkeypatch):
    """The interpreter patches triton.language again at each call of a device function, which is most of its time."""
    patched = set()
    original = interpreter._patch_lang

    class Scope(interpreter._LangPatchScope):
        def restore(self):
            patched.clear()
            super().restore()

    def patch_lang(fn):
        key = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
        if key in patched:
            return interpreter._LangPatchScope()
        patched.add(key)
        return original(fn)

    monkeypatch.setattr(interpreter, "_LangPatchScope", Scope)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)


class Case(LoraCase):
    backend = backend


@triton.jit
def _mask_kernel(rng_ptr, out_ptr, m0, k0, threshold, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    keep = lora_linear._keep_mask(rng_ptr, m0, k0, threshold, ROWS, COLS)
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLS)[None, :], keep)


@pytest.mark.parametrize("rng", [(0, 0), (-1, -1), (2**63 - 1, 2**40 + 3), tuple(RNG.tolist())])
def test_mask_is_the_reference_mask_bit_for_bit(rng):
    rng = torch.tensor(rng)
    out = torch.empty(16, 64, dtype=torch.bool)
    for dropout_p in (0.1, 0.5, 0.99999):
        threshold = reference.dropout_threshold(dropout_p)
        _mask_kernel[(1,)](rng, out, 32, 128, threshold, out.stride(0), ROWS=16, COLS=64)
        assert torch.equal(out, reference.keep_mask(rng, dropout_p, 48, 192)[32:, 128:])


@pytest.mark.parametrize(
    "case",
    [
        dict(M=1, N=1, K=1, R=1),
        dict(M=1, N=129, K=63, R=4, lora_e=True),
        dict(M=63, N=65, K=129, R=17, dropout_p=0.3, bias=True, lora_e=True),
        dict(M=65, N=63, K=64, R=64, dropout_p=0.5),
        dict(M=63, N=65, K=129, R=8, dtype=BF16, dropout_p=0.1, bias=True),
        dict(M=129, N=300, K=65, R=16, dtype=BF16, adapter_dtype=FP32, dropout_p=0.3, bias=True, lora_e=True),
        dict(M=65, N=129, K=63, R=70, dtype=BF16, adapter_dtype=FP32, dropout_p=0.1, lora_e=True),
        dict(M=64, N=64, K=128, R=1, dtype=FP16, adapter_dtype=FP32, bias=True),
        dict(M=65, N=63, K=129, R=4, dtype=FP16, dropout_p=0.5, lora_e=True),
        dict(M=1, N=1, K=1, R=1, dtype=BF16, column_scale=True),
        dict(M=65, N=129, K=63, R=17, dropout_p=0.3, bias=True, column_scale=True),
        dict(M=63, N=300, K=65, R=8, dtype=BF16, adapter_dtype=FP32, dropout_p=0.1, column_scale=True),
        dict(M=65, N=63, K=64, R=16, dtype=FP16, adapter_dtype=FP32, bias=True, lora_e=True, column_scale=True),
    ],
    ids=lambda c: f"{c['M']}x{c['N']}x{c['K']}r{c['R']}-{str(c.get('dtype', FP32))[6:]}",
)
def test_forward_and_backward_against_float64(case):
    Case(**case).check()


@pytest.mark.parametrize(
    "needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (0, 1, 0, 1), (0, 0, 0, 0)]
)
def test_only_what_is_needed_is_computed(needs):
    Case(17, 33, 24, 4, dropout_p=0.2, lora_e=True, needs=tuple(map(bool, needs))).check()


def test_lora_e_gradient_is_none_without_lora_e():
    assert Case(5, 6, 7, 2).check()["dlora_e"] is None


def test_strided_inputs_and_transposed_weight():
    Case(33, 65, 40, 5, dtype=BF16, dropout_p=0.2, bias=True, column_scale=True).check(strided)


@pytest.mark.parametrize("column_scale", [False, True])
def test_guarded_buffers(monkeypatch, column_scale):
    """Nothing outside the tensors is read or written, and every output element is: all of them start as NaN."""
    guarded = GuardedBuffers()
    case = Case(35, 67, 41, 5, dropout_p=0.2, bias=True, lora_e=True, column_scale=column_scale)
    exact = case.run(EXACT.lora_linear_fwd, EXACT.lora_linear_bwd, dtype=torch.float64)
    monkeypatch.setattr(torch, "empty", guarded)
    functions = (ONE.lora_linear_fwd, ONE.lora_linear_bwd, lambda name, t: guarded(t.shape, t.dtype).copy_(t))
    actual = case.run(*functions, scale_bwd=backend.column_scale_bwd)
    assert len(guarded.arenas) == (21 if column_scale else 18)
    guarded.check()
    for name, t in actual.items():
        if exact[name] is None:
            continue
        torch.testing.assert_close(t.double(), exact[name], atol=1e-4, rtol=1e-4)


def shuffled_range(generator):
    def shuffled(*bounds):
        values = list(range(*bounds))
        # One bound is an axis of the grid; tl.range passes three and keeps its order, as it does on a GPU.
        if len(bounds) == 1:
            generator.shuffle(values)
        return values

    return shuffled


def small_blocks(monkeypatch):
    """Several programs along every axis of every grid, for a shape the interpreter can afford."""
    lookup = configs.lookup

    def small(family, kernel, *problem):
        config = lookup(family, kernel, *problem)
        limit = 512 if kernel == "reduce" else 32
        return {name: min(value, limit) if name.startswith("BLOCK") else value for name, value in config.items()}

    monkeypatch.setattr(configs, "lookup", small)


def test_the_order_of_programs_does_not_matter(monkeypatch):
    small_blocks(monkeypatch)
    case = Case(70, 40, 40, 33, dropout_p=0.2, lora_e=True, column_scale=True)
    first = case.check()
    monkeypatch.setattr(interpreter, "range", shuffled_range(random.Random(0)), raising=False)
    second = case.run(ONE.lora_linear_fwd, ONE.lora_linear_bwd, scale_bwd=backend.column_scale_bwd)
    for name, t in first.items():
        assert torch.equal(t, second[name]), f"{name} depends on the order of programs"


@pytest.mark.parametrize("adapter_dtype", [BF16, FP32])
def test_sums_in_parts(monkeypatch, noted_launches, adapter_dtype):
    """As on a GPU with many multiprocessors: h over columns of x, dlora_a over its rows."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(configs, "PARTS", dict.fromkeys(configs.PARTS, configs.Parts(2, 33, 32)))
    monkeypatch.setattr(lora_linear, "_multiprocessors", lambda index: 12)
    Case(100, 40, 300, 17, dtype=BF16, adapter_dtype=adapter_dtype, dropout_p=0.2, bias=True).check()
    parts = {kernel: grid[1] for kernel, grid in noted_launches}
    assert min(parts[lora_linear._h_kernel], parts[lora_linear._dlora_a_kernel]) > 1


@pytest.mark.parametrize("adapter_dtype", [BF16, FP32])
@pytest.mark.parametrize(("M", "rank"), [(11, 3), (11, 20), (90, 3), (90, 20)])
def test_products_add_up_the_parts_of_h(monkeypatch, adapter_dtype, M, rank):
    monkeypatch.setattr(configs, "PARTS", configs.PARTS | {"h": configs.Parts(2, 33, 32)})
    monkeypatch.setattr(lora_linear, "_multiprocessors", lambda index: 12)
    case = Case(M, 150, 300, rank, dtype=BF16, adapter_dtype=adapter_dtype, bias=True, lora_e=True)
    functions = ONE.lora_linear_fwd, ONE.lora_linear_bwd
    with OperatorLog() as log:
        case.run(*functions)
    assert "sum" not in log.names
    case.check()


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("M", [3, 65])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)])
def test_group_matches_float64(monkeypatch, noted_launches, dtype, adapter_dtype, dropout_p, M, nf4):
    monkeypatch.setattr(configs, "PARTS", configs.PARTS | {"h": configs.Parts(2, 33, 32)})
    case = group_case(M, dtype, adapter_dtype, nf4)
    with use_backend("triton"):
        actual = group_results(lora_linear_group, *case, dropout_p)
    launches = [kernel for kernel, _ in noted_launches]
    assert launches.count(lora_linear._h_kernel) == launches.count(lora_linear._dlora_a_kernel) == 1
    assert launches.count(lora_linear._gemm_kernel) == 3 + 1
    check_group(actual, *case, dropout_p, dtype)


def test_group_computes_what_is_asked_for():
    x, layers, dys = group_case(35, FP32, FP32, False)
    leaves = [x.requires_grad_()] + [t.requires_grad_() for layer in layers for t in (layer.lora_a, layer.lora_b)]
    with use_backend("triton"):
        everything = torch.autograd.grad(lora_linear_group(x, layers), leaves, dys)
        for leaf, expected in zip(leaves, everything, strict=True):
            (found,) = torch.autograd.grad(lora_linear_group(x, layers), [leaf], dys)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("options", [dict(bias=True, lora_e=True), dict(dropout_p=0.3, column_scale=True)])
def test_tiles_by_the_copy_engine(monkeypatch, noted_launches, options, conv1d):
    monkeypatch.setattr(configs, "by_tma", lambda family, rows, columns: True)
    case = Case(130, 72, 136, 17, dtype=BF16, adapter_dtype=FP32, **options)
    if conv1d:
        case.inputs["weight"] = case.inputs["weight"].T.contiguous().T
    case.check()
    assert [kernel for kernel, _ in noted_launches].count(lora_linear._tma_gemm_kernel) == 2


def test_what_the_copy_engine_can_not_fetch():
    run = lora_linear._LoraLauncher(torch.zeros(4, 64, dtype=BF16), None, False)
    run.family = "sm90"

    def by_tma(x, weight, backward=False, m=512):
        return run.by_tma([(x, weight)], m, 4096, backward)

    x, weight = torch.zeros(4, 64, dtype=BF16), torch.zeros(32, 64, dtype=BF16)
    assert by_tma(x, weight) is True and by_tma(x, weight, True) is False
    assert by_tma(x, weight.T.contiguous().T) is False
    assert by_tma(x, torch.zeros(32, 68, dtype=BF16)[:, :64]) is None, "rows that don't start at 16 bytes"
    assert by_tma(torch.zeros(4, 65, dtype=BF16)[:, 1:], weight) is None, "x starts elsewhere"
    assert by_tma(x[:, :0], weight[:, :0]) is None
    assert by_tma(x, weight, m=64) is None


@pytest.mark.parametrize(("dtype", "K"), [(BF16, 256), (FP32, 300)])
def test_the_blocks_for_few_rows(monkeypatch, dtype, K):
    monkeypatch.setattr(configs, "_gemm_table", lambda family, kernel, *_: configs._SKINNY_GEMM[kernel])
    Case(5, 70, K, 2, dtype=dtype, dropout_p=0.2, bias=True, column_scale=True).check()


def test_the_blocks_follow_the_size():
    def blocks(rows, columns=4096, kernel="tma_gemm"):
        config = configs.lookup("sm90", kernel, 16, False, 4096, rows, columns)
        return config["BLOCK_M"], config["BLOCK_N"]

    few = configs.SKINNY_ROWS
    assert [blocks(rows, kernel="gemm") for rows in (few, few + 1, 512, 4096)] == [
        (16, 16),
        (64, 32),
        *[(128, 128)] * 2,
    ]
    assert [blocks(rows) for rows in (512, 4096)] == [(128, 128), (128, 256)]
    assert blocks(512, 576) == (64, 64) and blocks(few + 1, kernel="nf4_rows") == (32, 32)


def test_launches_past_triton_give_the_driver_the_same(tmp_path):
    fake_cuda.build(tmp_path)
    command = [sys.executable, TESTS / "triton_launches.py"]
    variables = environment(**fake_cuda.variables(tmp_path))
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.stdout == "the same launches\n", result.stderr


class OperatorLog(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_launches(monkeypatch):
    """Two forward and four backward, and no other operator that would launch one; a column scale adds two backward."""
    launches = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *a, **k: launches.append(self.fn.__name__))
    functions = ONE.lora_linear_fwd, ONE.lora_linear_bwd
    sizes, options = (9, 10, 11, 3), dict(dtype=BF16, adapter_dtype=FP32, dropout_p=0.1, bias=True, lora_e=True)
    plain, scaled = Case(*sizes, **options), Case(*sizes, **options, column_scale=True)
    with OperatorLog() as log:
        scaled.run(*functions, scale_bwd=backend.column_scale_bwd)
    assert len(launches) == 7 and launches.pop(2) == "_column_scale_bwd_kernel"
    assert set(log.names) <= {"empty", "permute", "t", "view", "sum"} and log.names.count("sum") == 1
    launches.clear()
    with OperatorLog() as log:
        plain.run(*functions)
    assert launches == ["_h_kernel", "_gemm_kernel", "_dh_dlora_b_kernel", "_reduce_kernel", "_dlora_a_kernel",
                        "_gemm_kernel"]  # fmt: skip
    assert set(log.names) <= {"empty", "permute", "t", "view"}, log.names


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_low_rank_term_alone(dtype):
    case = Case(65, 63, 64, 8, dtype=dtype)
    case.inputs["weight"].zero_()
    case.check()


def test_the_low_rank_term_beside_a_full_weight():
    check_low_rank_beside_a_full_weight(ONE)


def test_errors_name_the_argument():
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="x: .*float64"):
        ONE.lora_linear_fwd(x, x, x, x, 1.0)


def test_cpu_tensors_without_the_interpreter_are_refused():
    script = """
import torch
from lora_kernels.backends import triton as backend
from lora_kernels.types import Layers, Projection
x = torch.zeros(2, 2)
assert torch.cuda.is_available() or "TRITON_INTERPRET" in backend.unavailable, backend.unavailable
try:
    backend.lora_linear_fwd(x, Layers([Projection(x, x, x, 1.0)]), None)
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "x is on cpu" in result.stdout


def test_importable_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton can't be imported" in runpy.run_path(backend.__file__)["unavailable"]


def test_importable_with_an_old_triton(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert (
        runpy.run_path(backend.__file__)["unavailable"] == "triton is 3.3.1; 3.4 (of torch 2.8) and newer are supported"
    )
