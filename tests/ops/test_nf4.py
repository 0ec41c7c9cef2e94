"""NF4: the codec bit for bit against bitsandbytes and the format's definition, and layers on NF4 weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cpu_isa import multiply_bf16
from lora_cases import OneLayer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    FusedLoRALinear,
    NF4Linear,
    NF4Weight,
    backends,
    lora_linear,
    quantize_nf4,
    reference,
    use_backend,
)
from lora_kernels.backends import cpu
from lora_kernels.backends.cpu.nf4 import decode
from lora_kernels.ops.frozen_linear import frozen_linear
from lora_kernels.ops.nf4 import from_bitsandbytes, to_bitsandbytes
from lora_kernels.testing import assert_close_to_reference, lora_inputs
from lora_kernels.types import NF4

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TENSORS = ("packed", "absmax", "absmax_scale", "absmax_offset")
DTYPES = (FP32, BF16, FP16)
# Multiples of a block, partial last blocks, blocks that straddle rows, odd rows that begin inside a byte, less than
# one block, one element.
SHAPES = [(64, 64), (96, 128), (100, 96), (33, 65), (7, 31), (1, 1), (576, 64)]


@pytest.fixture
def codec(backend):
    """The module with the functions of every backend in turn."""
    return backends._load(backend)


def bnb():
    return pytest.importorskip("bitsandbytes").functional


def weight_of(shape, dtype=FP32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def dequantized(backend, parts, dtype):
    out = torch.full(parts.shape, torch.nan, dtype=dtype)
    backend.dequantize_nf4(parts, out)
    return out


def assert_is_bitsandbytes(dense, packed, state):
    """dense, of state's dtype, is what bitsandbytes makes of packed."""
    dtype, theirs = state.dtype, bnb().dequantize_4bit(packed, state)
    state.dtype = FP32
    exact = bnb().dequantize_4bit(packed, state)
    state.dtype = dtype
    if dtype == FP16:
        # Its library for CUDA is compiled for any x86: there its CPU code converts to float16 by hand, and away from
        # zero what lies halfway between two numbers, for which numpy and the processor take the even one.
        halfway = exact.view(torch.int32) & 0x1FFF == 0x1000
        assert torch.equal(dense, torch.from_numpy(exact.numpy().astype(np.float16)))
        dense, theirs = dense[~halfway], theirs[~halfway]
    assert torch.equal(dense, theirs)


def by_definition(weight, block_size):
    """Codes [N·K] and absmax of the format, element by element in numpy's float32."""
    flat = weight.float().numpy().reshape(-1)
    code = np.array(reference.NF4_CODE, dtype=np.float32)
    midpoints = (code[1:] + code[:-1]) / np.float32(2)
    codes, scales = [], []
    for start in range(0, flat.size, block_size):
        block = flat[start : start + block_size]
        scales.append(np.abs(block).max())
        inverse = np.float32(1) / max(scales[-1], np.float32(1e-38))
        codes.append((block[:, None] * inverse > midpoints).sum(1))
    return np.concatenate(codes), np.array(scales, dtype=np.float32)


@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_is_the_definition(codec, shape, dtype, block_size):
    weight = weight_of(shape, dtype)
    weight.view(-1)[: weight.numel() // 3] = 0
    parts = codec.quantize_nf4(weight, block_size, False)
    codes, scales = by_definition(weight, block_size)
    padded = np.append(codes, 7)[: 2 * parts.packed.numel()]
    assert np.array_equal(parts.packed.numpy(), padded[0::2] << 4 | padded[1::2])
    assert np.array_equal(parts.absmax.numpy(), scales)
    values = np.array(reference.NF4_CODE, np.float32)[codes] * scales.repeat(block_size)[: codes.size]
    assert torch.equal(dequantized(codec, parts, dtype), torch.from_numpy(values).view(shape).to(dtype))


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (37, 256), (33, 65)])
def test_bits_of_bitsandbytes(codec, shape, dtype, block_size):
    weight = weight_of(shape, dtype)
    parts = codec.quantize_nf4(weight, block_size, False)
    packed, state = bnb().quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    # Its last, partial block divides by absmax, where all others (and CUDA) multiply by the reciprocal.
    whole = weight.numel() // block_size * block_size // 2
    assert torch.equal(parts.packed[:whole], packed.view(-1)[:whole])
    assert torch.equal(parts.absmax, state.absmax)
    if shape[1] % block_size == 0:  # elsewhere its AVX-512 path takes the scale of another block
        assert_is_bitsandbytes(dequantized(codec, parts, dtype), packed, state)


@pytest.mark.parametrize("shape, block_size", [((96, 128), 64), ((1024, 64), 32), ((200, 256), 64)])
def test_double_quantisation(codec, shape, block_size):
    weight = weight_of(shape)
    parts = codec.quantize_nf4(weight, block_size, True)
    packed, state = bnb().quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    assert torch.equal(parts.packed, packed.view(-1))
    assert torch.equal(parts.absmax_offset, state.offset)
    assert torch.equal(parts.absmax_scale, state.state2.absmax)
    # bitsandbytes looks 8-bit codes up in a table of 65,536 bins, so a few are not the nearest one. Ours are.
    centred = codec.quantize_nf4(weight, block_size, False).absmax - parts.absmax_offset
    scaled = centred / parts.absmax_scale.repeat_interleave(256)[: centred.numel()]
    distance = (scaled[:, None] - reference.dynamic_code()).abs()
    chosen = distance.gather(1, parts.absmax.long()[:, None])[:, 0]
    assert (chosen <= distance.amin(1) + 1e-6).all()
    assert (parts.absmax.int() - state.absmax.int()).abs().max() <= 1
    theirs = NF4(packed.view(-1), state.absmax, state.state2.absmax, state.offset, block_size, shape)
    for dtype in DTYPES:
        state.dtype = dtype
        assert_is_bitsandbytes(dequantized(codec, theirs, dtype), packed, state)


def test_dynamic_code_is_bitsandbytes():
    assert torch.equal(reference.dynamic_code(), bnb().create_dynamic_map())


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 65), (131, 257)])
def test_double_quantisation_is_the_references(codec, shape, block_size):
    """Bit for bit, with more blocks than share a scale of scales and with fewer."""
    for dtype in DTYPES:
        parts, expected = (
            module.quantize_nf4(weight_of(shape, dtype), block_size, True) for module in (codec, reference)
        )
        assert (parts.block_size, parts.shape) == (expected.block_size, expected.shape)
        for name in TENSORS:
            assert getattr(parts, name).dtype == getattr(expected, name).dtype
            assert torch.equal(getattr(parts, name), getattr(expected, name)), name
        for out_dtype in {FP32, dtype}:
            assert torch.equal(dequantized(codec, parts, out_dtype), dequantized(reference, parts, out_dtype))


def test_ties_go_down_and_neighbours_do_not(codec):
    code = torch.tensor(reference.NF4_CODE)
    middle = (code[:-1] + code[1:]) / 2
    infinity = torch.tensor(float("inf"))
    values = torch.cat([middle, middle.nextafter(infinity), middle.nextafter(-infinity), code])
    weight = torch.nn.functional.pad(values, (0, 64 - values.numel())).view(1, 64)
    weight = torch.cat([weight, 3e38 * weight])
    parts = codec.quantize_nf4(weight, 64, False)
    codes, scales = by_definition(weight, 64)
    assert np.array_equal(parts.packed.numpy(), codes[0::2] << 4 | codes[1::2])
    assert np.array_equal(parts.absmax.numpy(), scales)


def test_denormals_and_zero_blocks(codec):
    weight = torch.zeros(4, 64)
    weight[1] = torch.linspace(-1e-39, 1e-39, 64)
    weight[2, 5] = 3e-45
    weight[3] = -0.0
    parts = codec.quantize_nf4(weight, 64, False)
    codes, scales = by_definition(weight, 64)
    assert np.array_equal(parts.packed.numpy(), codes[0::2] << 4 | codes[1::2])
    assert np.array_equal(parts.absmax.numpy(), scales)
    assert (parts.packed[:32] == 0x77).all() and (dequantized(codec, parts, FP32)[0] == 0).all()


def test_ranges_of_the_weight(isa):
    """Any rows and columns, into rows that are wider than the range, by the cpu backend: what lies beside it stays."""
    for shape, block_size in (((33, 65), 32), ((40, 192), 64)):
        parts = reference.quantize_nf4(weight_of(shape), block_size, True)
        dense = dequantized(reference, parts, BF16)
        for rows, cols in ((slice(0, 33), slice(3, 65)), (slice(5, 6), slice(0, 64)), (slice(2, 31), slice(33, 34))):
            out = torch.full((rows.stop - rows.start, 70), 7.0, dtype=BF16)
            decode(parts, rows, cols, out[:, : cols.stop - cols.start])
            assert torch.equal(out[:, : cols.stop - cols.start], dense[rows, cols])
            assert (out[:, cols.stop - cols.start :] == 7.0).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, which Triton's interpreter computes with
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_is_refused(codec, double_quant, bad):
    for row, column in ((0, 0), (6, 30), (3, 7)):
        weight = weight_of((7, 31))
        weight[row, column] = bad
        finite = torch.isfinite(codec.quantize_nf4(weight, 32, False).absmax)
        assert [i for i, good in enumerate(finite) if not good] == [(31 * row + column) // 32]
        with pytest.raises(ValueError, match="not finite"):
            quantize_nf4(weight, 32, double_quant)


def test_bad_arguments_are_named():
    weight = weight_of((8, 64))
    with pytest.raises(ValueError, match="block_size is 48; allowed: 32, 64"):
        quantize_nf4(weight, 48)
    with pytest.raises(TypeError, match="weight has dtype torch.float64"):
        quantize_nf4(weight.double())
    with pytest.raises(ValueError, match=r"weight has shape \[8, 64, 1\]"):
        quantize_nf4(weight[..., None])
    with pytest.raises(ValueError, match=r"weight has shape \[0, 64\]"):
        quantize_nf4(weight[:0])
    packed = quantize_nf4(weight)
    with pytest.raises(TypeError, match="dtype is torch.int8"):
        packed.dequantize(torch.int8)
    with pytest.raises(ValueError, match=r"out is \[64, 8\].*strides \[1, 64\]"):
        packed.dequantize(out=torch.empty(8, 64).T)
    with pytest.raises(ValueError, match=r"x has 63 features .*expects 64"):
        lora_linear(torch.zeros(2, 63), packed, torch.zeros(1, 64), torch.zeros(8, 1), 1.0)
    with pytest.raises(ValueError, match="quantize is 'int8'"):
        FusedLoRALinear.from_linear(torch.nn.Linear(4, 4), 1, 1, quantize="int8")


def test_dequantize_writes_to_out():
    packed = quantize_nf4(weight_of((8, 64), BF16))
    assert packed.dequantize().dtype == BF16
    out = torch.empty(8, 64, dtype=FP16)
    assert packed.dequantize(out=out) is out
    assert torch.equal(out, packed.dequantize(FP16))


GRADIENTS = ("dx", "dlora_a", "dlora_b", "dlora_e")
RNG = torch.tensor([0x1234_5678_9ABC_DEF0, (3 << 32) + 17])
# M either side of what is decoded in registers and of what is decoded in cache at all.
SIZES = [
    (1, 33, 65, 4),
    (3, 64, 64, 2),
    (4, 100, 96, 17),
    (5, 7, 31, 8),
    (63, 65, 129, 16),
    (129, 63, 300, 64),
    (17, 40, 600, 16),
]


def results(backend, parts, inputs, dy, dropout_p, needs=(True,) * 4):
    x, _, lora_a, lora_b, bias, lora_e, column_scale = inputs.values()
    backend = OneLayer(backend)
    y, h = backend.lora_linear_fwd(x, parts, lora_a, lora_b, 0.7, bias, lora_e, dropout_p, RNG, column_scale)
    if column_scale is not None:
        dy, _ = backend.column_scale_bwd(dy, None, bias, column_scale)
    grads = backend.lora_linear_bwd(dy, x, h, parts, lora_a, lora_b, 0.7, lora_e, dropout_p, RNG, needs)
    return {"y": y, "h": h, **dict(zip(GRADIENTS, grads, strict=True))}


def eager(parts, inputs, dy, dropout_p):
    """torch on the dequantised weight, in the dtype of x."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items() if t is not None and name != "weight"}
    leaves |= {"weight": dequantized(reference, parts, leaves["x"].dtype)}
    y = reference.lora_linear_ref(**leaves, scaling=0.7, dropout_p=dropout_p, rng=RNG)
    wanted = [leaves[name] for name in ("x", "lora_a", "lora_b", "lora_e") if name in leaves]
    grads = torch.autograd.grad(y, wanted, dy)
    h = reference.drop(leaves["x"].detach().to(leaves["lora_a"].dtype), dropout_p, RNG) @ leaves["lora_a"].T
    return {"y": y.detach(), "h": h.detach().float(), **dict(zip(GRADIENTS, grads, strict=False))}


@pytest.mark.parametrize("how", ["converted", "own"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_lora_linear_matches_float64(isa, monkeypatch, sizes, dtype, how):
    if how == "own" and dtype != BF16:
        pytest.skip("one case is enough")
    multiply_bf16(monkeypatch, how)
    M, N, K, R = sizes
    # Of a few independent sums, h of one row say, the eager version's largest error is luck: several inputs together.
    together = {"actual": [], "eager": [], "exact": []}
    for seed in range(8 if M < 16 else 1):
        inputs = lora_inputs(M, N, K, R, dtype, FP32, bias=True, lora_e=True, column_scale=M % 3 == 0, seed=seed)
        parts = reference.quantize_nf4(inputs["weight"], 64, R % 2 == 0)
        dy = torch.randn(M, N, generator=torch.Generator().manual_seed(7 + seed)).to(dtype)
        wide = {name: None if t is None else t.double() for name, t in inputs.items()}
        actual = results(cpu, parts, inputs, dy, 0.3)
        together["actual"].append(actual)
        together["eager"].append(eager(parts, inputs, dy, 0.3))
        together["exact"].append(results(reference, parts, wide, dy.double(), 0.3))
    for name in actual:
        assert_close_to_reference(*(torch.stack([r[name] for r in of]) for of in together.values()), name)
    for needs in ((True, False, False, False), (False, True, True, False)):
        some = results(cpu, parts, inputs, dy, 0.3, needs)
        for name, need in zip(GRADIENTS, needs, strict=True):
            assert torch.equal(some[name], actual[name]) if need else some[name] is None


@pytest.mark.parametrize("M", [2, 70])
def test_small_update_survives_rounding(M):
    """⟨y - x Wᵀ, Δ⟩ / ⟨Δ, Δ⟩ = 1 within 1 % over many rows, at ‖sBA‖ / ‖W‖ = 1e-3 in bfloat16."""
    K = 512
    inputs = lora_inputs(M, 4096, K, 8, BF16, FP32)
    weight = quantize_nf4(inputs["weight"])
    dense = weight.dequantize(FP32).double()
    update = inputs["lora_b"].double() @ inputs["lora_a"].double()
    scaling = 1e-3 * dense.norm().item() / update.norm().item()
    y = lora_linear(inputs["x"], weight, inputs["lora_a"], inputs["lora_b"], scaling).double()
    delta = scaling * inputs["x"].double() @ update.T
    found = ((y - inputs["x"].double() @ dense.T) * delta).sum() / (delta * delta).sum()
    spread = 3 * 0.3 * 2**-8 * y.norm().item() / y.numel() ** 0.5 / delta.norm().item()
    assert abs(found.item() - 1) < 0.01 + spread


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")
@pytest.mark.parametrize("how", ["converted", "own"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("M", [8, 200])
def test_no_dense_weight_is_made(monkeypatch, M, dtype, how):
    multiply_bf16(monkeypatch, how)
    N = K = 2048
    inputs = lora_inputs(M, N, K, 4, dtype, FP32)
    weight = quantize_nf4(inputs["weight"])
    x = inputs["x"].requires_grad_()
    lora_a, lora_b = inputs["lora_a"].requires_grad_(), inputs["lora_b"].requires_grad_()
    del inputs
    with LargestTensor() as largest, use_backend("cpu"):
        lora_linear(x, weight, lora_a, lora_b, 1.0).sum().backward()
    assert 0 < largest.numel < N * K // 3


def test_gradcheck_in_float64():
    weight = quantize_nf4(weight_of((9, 40)), 32, double_quant=True)
    inputs = lora_inputs(5, 9, 40, 3, torch.float64, bias=True, lora_e=True)
    tensors = [inputs[name].requires_grad_() for name in ("x", "lora_a", "lora_b", "bias", "lora_e")]

    def function(x, lora_a, lora_b, bias, lora_e):
        return lora_linear(x, weight, lora_a, lora_b, 0.7, bias, lora_e)

    assert torch.autograd.gradcheck(function, tensors)


def test_op_contract():
    weight = quantize_nf4(weight_of((24, 64)), double_quant=True)
    inputs = lora_inputs(6, 24, 64, 3)
    tensors = [inputs[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
    packed, *scales = weight.parts
    args = (tensors[0], packed, *tensors[1:], 0.7, None, None, 0.0, None, None, *scales, weight.block_size)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_fwd.default, args)


def test_compiles_without_graph_break():
    weight = quantize_nf4(weight_of((24, 64)))
    inputs = lora_inputs(6, 24, 64, 3)
    x = inputs["x"].requires_grad_()

    def function(x):
        return lora_linear(x, weight, inputs["lora_a"], inputs["lora_b"], 0.7) + frozen_linear(x, weight)

    y = torch.compile(function, fullgraph=True)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, function(x))
    assert torch.equal(dx, torch.autograd.grad(function(x).sum(), x)[0])


@pytest.mark.parametrize("double_quant", [False, True])
def test_layer_runs_in_any_order_and_state_dict_stays(double_quant):
    linear = torch.nn.Linear(64, 48)
    layer = FusedLoRALinear.from_linear(linear, 4, 8, lora_dropout=0.2, quantize="nf4", double_quant=double_quant)
    torch.nn.init.normal_(layer.lora_b)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 5, 64)
    for train in (False, True, False, True):
        layer.train(train)
        with torch.no_grad():
            layer(x[0, :1])
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        assert leaf.grad.abs().min() > 0 and layer.lora_a.grad.abs().max() > 0
    after = layer.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)

    dense = torch.nn.functional.linear(x, layer.weight.dequantize(), layer.bias)
    layer.eval()
    full = dense + layer.scaling * (x @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(layer(x), full, rtol=1e-5, atol=1e-5)
    layer.adapters_enabled = False
    torch.testing.assert_close(layer(x), dense, rtol=1e-5, atol=1e-5)
    layer.adapters_enabled = True
    unmerged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), full, rtol=1e-5, atol=1e-5)
    merged_state = layer.state_dict()
    assert all(torch.equal(before[name], merged_state[name]) for name in before)
    plain = layer.to_linear()
    assert type(plain) is torch.nn.Linear and torch.equal(plain(x), layer(x))
    layer.unmerge()
    assert torch.equal(layer(x), unmerged) and isinstance(layer.weight, NF4Weight)


def test_checkpointing_draws_the_same_mask():
    layer = FusedLoRALinear.from_linear(torch.nn.Linear(64, 48), 4, 8, lora_dropout=0.5, quantize="nf4")
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(70, 64, requires_grad=True)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(call(x).square().sum(), [x, layer.lora_a, layer.lora_b]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_and_casts_leave_the_bits():
    layer = NF4Linear.from_linear(torch.nn.Linear(64, 48), double_quant=True)
    bits = copy.deepcopy(dict(layer.named_buffers()))
    x = torch.randn(2, 64)
    with torch.autocast("cpu", dtype=BF16):
        assert layer(x).dtype == BF16
    layer.to(BF16)
    assert layer.weight.dtype == layer.bias.dtype == BF16
    assert layer(x.to(BF16)).dtype == BF16
    assert all(torch.equal(bits[name], t) for name, t in layer.named_buffers())
    other = copy.deepcopy(layer)
    assert torch.equal(other(x.to(BF16)), layer(x.to(BF16)))


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_is_that_of_bitsandbytes(double_quant):
    weight = weight_of((48, 64), BF16)
    layer = NF4Linear(quantize_nf4(weight, double_quant=double_quant))
    state = layer.state_dict()
    packed, theirs = bnb().quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    if double_quant:
        theirs.absmax = layer.weight.absmax  # see test_double_quantisation
    expected = {"weight": packed} | {f"weight.{name}": t for name, t in theirs.as_dict(packed=True).items()}
    assert set(state) == set(expected)
    for name, t in expected.items():
        assert torch.equal(state[name], t) and state[name].dtype == t.dtype, name

    loaded = NF4Linear.from_linear(torch.nn.Linear(64, 48, bias=False))
    loaded.load_state_dict(expected)
    assert loaded.weight.dtype == BF16 and loaded.weight.double_quant == double_quant
    assert torch.equal(loaded.weight.dequantize(), layer.weight.dequantize())
    nested = torch.nn.Sequential(torch.nn.ReLU(), copy.deepcopy(layer))
    copied = torch.nn.Sequential(torch.nn.ReLU(), NF4Linear.from_linear(torch.nn.Linear(64, 48, bias=False)))
    copied.load_state_dict(nested.state_dict())
    assert torch.equal(copied[1].weight.packed, layer.weight.packed)
    # quant_storage of another dtype is the same bytes
    parts, _ = from_bitsandbytes(to_bitsandbytes(layer.weight) | {"": packed.view(-1).view(BF16)})
    assert torch.equal(parts.packed, packed.view(-1))


def test_bad_state_dict_is_named():
    layer = NF4Linear.from_linear(torch.nn.Linear(64, 48, bias=False))
    state = layer.state_dict()
    for change, message in (
        ({"weight": None}, "Missing key.*weight"),
        ({"weight.absmax": None}, "absmax is missing"),
        ({"weight.absmax": state["weight.absmax"][:-1]}, r"absmax is \(torch.float32, 47\); expected"),
        ({"weight.quant_map": state["weight.quant_map"] * 2}, "quant_map is not NF4's"),
        ({"weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "quant_state.bitsandbytes__nf4"),
    ):
        changed = {name: t for name, t in (dict(state) | change).items() if t is not None}
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(changed)
    other = NF4Linear.from_linear(torch.nn.Linear(32, 48, bias=False))
    with pytest.raises(RuntimeError, match=r"shape is \(32, 48\)|shape is \[48, 32\], the layer needs \[48, 64\]"):
        layer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name, dtype", [("reference", FP32), ("cpu", FP32), ("cpu", BF16), ("cuda-emulated", BF16)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_layer_keeps_nothing_but_its_weight_for_backward(name, dtype, bias):
    inputs = lora_inputs(12, 65, 129, 1, dtype, bias=bias)
    weight = quantize_nf4(inputs["weight"])
    x, b = inputs["x"].view(3, 4, 129).requires_grad_(), inputs["bias"]
    dense, dy = weight.dequantize(dtype), torch.randn(3, 4, 65, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept = []
    with use_backend(name), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_linear(x, weight, b)
        (dx,) = torch.autograd.grad(y, x, dy)
        again = frozen_linear(x, weight, b)
    assert {t.data_ptr() for t in kept if t.numel()} == {t.data_ptr() for t in weight.parts[:2]}
    assert again.requires_grad
    plain = torch.nn.functional.linear(x, dense, b)
    exact = torch.nn.functional.linear(x.double(), dense.double(), None if b is None else b.double())
    assert_close_to_reference(y, plain, exact, "y")
    assert_close_to_reference(dx, dy @ dense, dy.double() @ dense.double(), "dx")
    y = frozen_linear(x, weight, b)
    weight.absmax.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_large_weight_is_dequantised_inside_a_compiled_function():
    weight = quantize_nf4(lora_inputs(1, 1024, 1024, 1)["weight"])
    compiled = torch.compile(lambda x: x @ weight.dequantize(FP32).T, backend="eager")
    x = torch.randn(2, 1024)
    torch.testing.assert_close(compiled(x), x @ weight.dequantize(FP32).T)


@pytest.mark.parametrize("default", [BF16, torch.float64])
@pytest.mark.parametrize("double_quant", [False, True])
def test_another_default_dtype_changes_nothing(default, double_quant):
    """Kernels write float32 to what they are given."""
    weight = lora_inputs(1, 300, 256, 1)["weight"]
    expected = quantize_nf4(weight, 64, double_quant)
    torch.set_default_dtype(default)
    try:
        for name in ("cpu", "reference"):
            with use_backend(name):
                made = quantize_nf4(weight, 64, double_quant)
                assert torch.equal(made.dequantize(FP32), expected.dequantize(FP32))
        assert torch.equal(made.absmax, expected.absmax) and made.absmax.dtype == expected.absmax.dtype
        layers = [NF4Linear(w) for w in (made, quantize_nf4(torch.zeros_like(weight), 64, double_quant))]
        state = layers[0].state_dict()
        assert state["weight.quant_map"].dtype == FP32
        layers[1].load_state_dict(state)
    finally:
        torch.set_default_dtype(FP32)
    assert torch.equal(layers[1].weight.dequantize(FP32), expected.dequantize(FP32))
    layers[1].weight.packed.zero_()
    assert torch.equal(made.dequantize(FP32), expected.dequantize(FP32)), "what was loaded is a copy"


def test_no_address_is_read_of_a_tensor_that_has_none():
    weight = quantize_nf4(torch.randn(64, 64), double_quant=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert weight.dequantize().shape == (64, 64)
        with pytest.raises(DataDependentOutputException):
            quantize_nf4(mode.from_tensor(torch.randn(64, 64)))


def test_a_layer_without_memory_takes_what_it_loads():
    source = FusedLoRALinear.from_linear(torch.nn.Linear(64, 32), r=2, lora_alpha=4, quantize="nf4", double_quant=True)
    target = FusedLoRALinear.from_linear(torch.nn.Linear(64, 32), r=2, lora_alpha=4, quantize="nf4").to("meta")
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_layer_in_float64(use_dora):
    torch.manual_seed(0)
    layer = FusedLoRALinear.from_linear(torch.nn.Linear(64, 32), r=2, lora_alpha=4, quantize="nf4", use_dora=use_dora)
    x = torch.randn(3, 64, dtype=torch.float64)
    expected = layer(x.float())
    layer.double()
    layer.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x).float(), expected)
    layer.double()
    layer.merge()
    torch.testing.assert_close(layer(x).float(), expected)
