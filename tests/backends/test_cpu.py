"""The C++ kernels, every instruction set that this processor can run, against float64 and the reference's mask."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cpu_isa import multiply_bf16, threads
from lora_cases import OneLayer, check_group, group_case, group_results, one_by_one

from lora_kernels import (
    Projection,
    lora_linear_group,
    quantize_nf4,
    reference,
    use_backend,
)
from lora_kernels.backends import cpu
from lora_kernels.backends.cpu import lora_linear
from lora_kernels.backends.cpu.extension import ISA_ENVIRONMENT_VARIABLE, kernels, weight_view
from lora_kernels.ops.frozen_linear import frozen_linear, frozen_linear_dx
from lora_kernels.testing import assert_close_to_reference, lora_inputs
from lora_kernels.types import Layers

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")

GRADIENTS = ("dx", "dlora_a", "dlora_b", "dlora_e")
RNG = torch.tensor([0x1234_5678_9ABC_DEF0, (3 << 32) + 17])
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# x's dtype, the adapters', and how the base product is taken of bfloat16.
DTYPES = [(dtype, adapters, "converted") for dtype in (FP32, BF16, FP16) for adapters in {FP32: 0, dtype: 0}]
DTYPES += [(BF16, adapters, "own") for adapters in (FP32, BF16)]
WAYS = [(FP32, "converted"), (BF16, "converted"), (BF16, "own"), (FP16, "converted")]
# Every size and rank of the design appears, and each rank in a tile of its own shape.
SIZES = [(1, 1, 1, 1), (63, 65, 129, 4), (65, 129, 63, 8), (129, 63, 65, 17), (129, 65, 1, 16), (1, 129, 65, 64)]


def make_case(M, N, K, R, dtype, adapter_dtype, dropout_p, extras=True, column_scale=False):
    inputs = lora_inputs(M, N, K, R, dtype, adapter_dtype, bias=extras, lora_e=extras, column_scale=column_scale)
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(7)).to(dtype)
    return inputs, dy, dropout_p, RNG if dropout_p else None


def run(backend, inputs, dy, dropout_p, rng, needs=(True, True, True, True), h=None):
    x, weight, lora_a, lora_b, bias, lora_e, column_scale = inputs.values()
    backend = OneLayer(backend)
    y, own_h = backend.lora_linear_fwd(x, weight, lora_a, lora_b, 0.7, bias, lora_e, dropout_p, rng, column_scale)
    h = own_h if h is None else h
    results = {"y": y, "h": own_h}
    if column_scale is not None:
        dy, results["dcolumn_scale"] = backend.column_scale_bwd(dy, y, bias, column_scale)
    grads = backend.lora_linear_bwd(dy, x, h, weight, lora_a, lora_b, 0.7, lora_e, dropout_p, rng, needs)
    return results | dict(zip(GRADIENTS, grads, strict=True))


def eager(inputs, dy, dropout_p, rng):
    """What torch gives for the version that people write, gradients by torch's autograd."""
    leaves = {name: None if t is None else t.clone() for name, t in inputs.items()}
    wanted = {grad: grad[1:] for grad in (*GRADIENTS, "dcolumn_scale") if leaves[grad[1:]] is not None}
    for name in wanted.values():
        leaves[name].requires_grad_()
    x, weight, lora_a, lora_b, bias, lora_e, column_scale = leaves.values()
    y = reference.lora_linear_ref(x, weight, lora_a, lora_b, 0.7, bias, lora_e, dropout_p, rng, column_scale)
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted.values()], dy)
    h = reference.drop(x.detach().to(lora_a.dtype), dropout_p, rng) @ lora_a.detach().T
    return {"y": y.detach(), "h": h.float(), **dict(zip(wanted, grads, strict=True))}


def float64(inputs, dy, dropout_p, rng):
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    return run(reference, wide, dy.double(), dropout_p, rng)


def assert_case(case):
    actual, plain, exact = run(cpu, *case), eager(*case), float64(*case)
    for name, t in actual.items():
        if exact[name] is None:
            assert t is None
        else:
            # The gradient of column_scale is made of y, and so as exact as y's dtype is.
            dtype = actual["y"].dtype if name == "dcolumn_scale" else t.dtype
            assert_close_to_reference(t.to(dtype), plain[name].to(dtype), exact[name], name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype, adapter_dtype, how", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_matches_float64(isa, monkeypatch, sizes, dtype, adapter_dtype, how, dropout_p):
    multiply_bf16(monkeypatch, how)
    assert_case(make_case(*sizes, dtype, adapter_dtype, dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype, adapter_dtype, how", DTYPES)
@pytest.mark.parametrize("sizes", SIZES[::2], ids=lambda s: "x".join(map(str, s)))
def test_column_scale_matches_float64(isa, monkeypatch, sizes, dtype, adapter_dtype, how, dropout_p):
    multiply_bf16(monkeypatch, how)
    for extras in (False, True):
        assert_case(make_case(*sizes, dtype, adapter_dtype, dropout_p, extras, column_scale=True))


def test_gradients_of_a_column_scale(isa):
    """One of zero, one that is frozen, and several threads, whose sums are added in their order."""
    inputs, dy, *_ = make_case(300, 129, 65, 4, BF16, FP32, 0.0, column_scale=True)
    scale, bias, y = inputs["column_scale"], inputs["bias"], torch.randn(300, 129).to(BF16)
    scale[2] = 0.0
    dz, dscale = cpu.column_scale_bwd(dy, y, bias, scale)
    assert dscale[2] == 0 and (dz[:, 2] == 0).all() and torch.isfinite(dscale).all()
    frozen_dz, nothing = cpu.column_scale_bwd(dy, None, None, scale)
    assert nothing is None and torch.equal(frozen_dz, dz)
    with threads(3):
        (dz3, first), (_, second) = (cpu.column_scale_bwd(dy, y, bias, scale) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(dz3, dz)
    torch.testing.assert_close(first, dscale)


def test_long_sums_of_a_column_scale(isa):
    """Added row by row to one float32, 2048 rows have four times the error of torch's sum."""
    generator = torch.Generator().manual_seed(0)
    dy, y = (torch.randn(2048, 129, generator=generator) for _ in range(2))
    scale = 0.5 + torch.rand(129, generator=generator)
    _, actual = cpu.column_scale_bwd(dy, y + 1, None, scale)
    eager, exact = (
        (a * b).sum(0) / c for a, b, c in ((dy, y + 1, scale), (dy.double(), (y + 1).double(), scale.double()))
    )
    assert_close_to_reference(actual, eager, exact, "dcolumn_scale")


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("M", [3, 65, 140])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype, adapter_dtype, how", DTYPES)
def test_group_matches_float64(isa, monkeypatch, dtype, adapter_dtype, how, dropout_p, M, nf4):
    multiply_bf16(monkeypatch, how)
    case = group_case(M, dtype, adapter_dtype, nf4)
    actual = group_results(lora_linear_group, *case, dropout_p)
    check_group(actual, *case, dropout_p)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("M", [1, 2, 4, 8])
def test_few_rows_read_every_element_of_nf4(isa, M, block_size, double_quant):
    """A row of the identity picks a column of W, bit for bit; rows of 192 begin and end inside blocks of 128."""
    N, K = 7, 192
    inputs = lora_inputs(K, N, K, 3, FP32)
    weight = quantize_nf4(inputs["weight"], block_size, double_quant)
    layer = Projection(weight.tensors(), inputs["lora_a"], torch.zeros(N, 3), 1.0)
    layers, x = Layers([layer]), torch.eye(K)
    y = torch.cat([cpu.lora_linear_fwd(x[m : m + M], layers, None).ys[0] for m in range(0, K, M)])
    assert torch.equal(y, weight.dequantize(FP32).T)
    x = inputs["x"][:M]
    y = cpu.lora_linear_fwd(x, layers, None).ys[0]
    dense = weight.dequantize(FP32)
    assert_close_to_reference(y, x @ dense.T, x.double() @ dense.double().T, "y")


@pytest.mark.parametrize("dtype, how", WAYS)
@pytest.mark.parametrize("M", [1, 8, 30])
def test_frozen_dense_layer(isa, monkeypatch, dtype, how, M):
    inputs = lora_inputs(M, 1030, 1024, 1, dtype, bias=True)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    plain = torch.nn.functional.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    # What torch multiplies shows.
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias=None: x.new_full((), torch.nan))
    multiply_bf16(monkeypatch, how)

    monkeypatch.setattr(lora_linear, "native_bfloat16", lambda: False)

    def is_torchs(*args):
        return frozen_linear(*args).isnan().all()

    with torch.no_grad():
        # Many rows are ours where the product was measured.
        if M > 8 and cpu.isa() == "generic":
            assert is_torchs(x, weight, bias)
        else:
            y = frozen_linear(x.view(M, 1, 1024), weight, bias)
            assert y.shape == (M, 1, 1030)
            assert_close_to_reference(y.view(M, 1030), plain, exact, "y")
        # Torch's instructions for bfloat16 are faster than our float32.
        monkeypatch.setattr(lora_linear, "native_bfloat16", lambda: True)
        by_torch = how == "converted" if dtype == BF16 else cpu.isa() == "generic"
        assert is_torchs(x.expand(9, M, 1024), weight) == by_torch
        # Small, of another layout, on another backend.
        assert is_torchs(x[:, :64].contiguous(), weight[:64, :64].contiguous())
        assert is_torchs(x, weight.T.contiguous().T)
        with use_backend("reference"):
            assert is_torchs(x, weight)
    assert is_torchs(x, weight)


@pytest.mark.parametrize("dtype, how", WAYS)
@pytest.mark.parametrize("M", [1, 8, 200])
def test_dx_of_a_frozen_dense_layer(isa, monkeypatch, dtype, how, M):
    multiply_bf16(monkeypatch, how)
    weight = lora_inputs(1, 130, 65, 1, dtype)["weight"]
    dy = torch.randn(M, 130).to(dtype)
    exact = dy.double() @ weight.double()
    for w in (weight, weight.t().contiguous().t()):
        out = torch.empty(M, 65, dtype=dtype)
        frozen_linear_dx(dy, w, out)
        assert_close_to_reference(out, dy @ w, exact, "dx")


def test_group_draws_the_mask_of_the_reference():
    case = group_case(140, FP32, FP32, False)
    expected = group_results(lora_linear_group, *case, 0.3)
    with use_backend("reference"):
        for a, b in zip(group_results(lora_linear_group, *case, 0.3), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_group_of_weights_of_every_kind(isa, dropout_p):
    x, layers, dys = group_case(65, FP32, FP32, False)
    transposed = layers[1].weight.T.contiguous().T
    layers = [
        layers[0],
        replace(layers[1], weight=transposed),
        replace(layers[2], weight=quantize_nf4(layers[2].weight)),
    ]
    plain, exact = (group_results(one_by_one, x, layers, dys, dropout_p, dtype) for dtype in (FP32, torch.float64))
    found = group_results(lora_linear_group, x, layers, dys, dropout_p)
    for index, (t, rounded, wide) in enumerate(zip(found, plain, exact, strict=True)):
        assert_close_to_reference(t, rounded, wide, str(index))


def test_group_computes_what_is_asked_for():
    x, layers, dys = group_case(65, FP32, FP32, False)
    leaves = [x.requires_grad_(), layers[1].lora_e.requires_grad_(), layers[2].lora_a.requires_grad_()]
    everything = torch.autograd.grad(lora_linear_group(x, layers), leaves, dys)
    for leaf, expected in zip(leaves, everything, strict=True):
        (found,) = torch.autograd.grad(lora_linear_group(x, layers), [leaf], dys)
        torch.testing.assert_close(found, expected)
    (found,) = torch.autograd.grad(lora_linear_group(x, layers)[2], [leaves[2]], dys[2])
    torch.testing.assert_close(found, everything[2])
    layers[0].bias.requires_grad_()
    (found,) = torch.autograd.grad(lora_linear_group(x, layers), [layers[0].bias], dys)
    torch.testing.assert_close(found, dys[0].sum(0))
    layers[0].bias.requires_grad_(False)
    with torch.no_grad():
        plain = one_by_one(x, layers, 0.0)
        for batch in (x, x.view(5, 13, 129)):
            for y, expected in zip(lora_linear_group(batch, layers), plain, strict=True):
                assert y.shape == (*batch.shape[:-1], y.shape[-1])
                torch.testing.assert_close(y.view_as(expected), expected, atol=1e-4, rtol=1e-4)


def test_group_refuses_what_does_not_fit():
    x, layers, _ = group_case(5, FP32, FP32, False)
    with pytest.raises(ValueError, match="layers is empty"):
        lora_linear_group(x, [])
    with pytest.raises(ValueError, match=r"layers\[1\]: lora_b has shape"):
        lora_linear_group(x, [layers[0], replace(layers[1], lora_b=layers[0].lora_b)])
    with pytest.raises(ValueError, match="dropout_p"):
        lora_linear_group(x, layers, 1.0)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_several_blocks_of_rows_and_columns(isa, dtype):
    """More rows and columns than a block; no bias, no lora_e."""
    assert_case(make_case(613, 300, 530, 17, dtype, FP32, 0.1, extras=False))
    assert_case(make_case(613, 300, 530, 17, dtype, FP32, 0.1, extras=False, column_scale=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rows_are_converted_some_at_a_time(monkeypatch, dtype, dropout_p):
    """In float32 1030 rows of so many columns would be more than is held of them."""
    multiply_bf16(monkeypatch, "converted")
    assert_case(make_case(1030, 9, 16400, 4, dtype, FP32, dropout_p))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("M, J, P", [(1, 1, 1), (13, 17, 255), (203, 300, 800), (1100, 40, 300), (35, 530, 257)])
@pytest.mark.parametrize("x_dtype", [FP32, BF16])
def test_product(isa, x_dtype, transposed, turned, dtype, M, J, P):
    """Blocks of rows, columns and depth, whole and not; terms of several types; any number of threads."""
    make = torch.Generator().manual_seed(3)

    def normal(*shape, dtype=FP32):
        return torch.randn(*shape, generator=make).to(dtype)

    def term(depth, dtype, factor):
        wide = normal(M, depth + 5, dtype=x_dtype)
        weight = normal(*((depth, J) if transposed else (J, depth)), dtype=dtype)
        return weight.T.contiguous().T if turned else weight, wide[:, 2 : depth + 2], factor

    terms = [term(P, dtype, 1.0), term(9, FP32, -1.5), term(33, BF16, 0.25)]
    nf4 = quantize_nf4(normal(*((P, J) if transposed else (J, P))), 64)
    terms.append((nf4.tensors(), normal(M, P, dtype=x_dtype), 1.0))
    scale, bias = normal(J), normal(J)

    def formula(dtype):
        dense = [factor * weight for weight, _, factor in terms[:-1]] + [nf4.dequantize(FP32)]
        pairs = zip(dense, terms, strict=True)
        total = sum(x.to(dtype) @ (w if transposed else w.T).to(x_dtype).to(dtype) for w, (_, x, _) in pairs)
        return scale.to(dtype) * total + bias.to(dtype)

    out = torch.full((M, J + 3), torch.nan, dtype=dtype)
    for count in (1, 2, 7):
        # One for each tile, of which a small result has few.
        with threads(count, at_least=1 if M * J < 10_000 else count):
            views = [(weight_view(weight), x, factor) for weight, x, factor in terms]
            arguments = {"transposed": transposed, "column_scale": scale, "bias": bias}
            kernels.product(terms=views, out=out[:, 1 : J + 1], **arguments, num_threads=torch.get_num_threads())
        assert out[:, 0].isnan().all() and out[:, J + 1 :].isnan().all()
        if count == 1:
            first = out[:, 1 : J + 1].clone()
        assert torch.equal(out[:, 1 : J + 1], first)
    assert_close_to_reference(first, formula(FP32).to(dtype), formula(torch.float64), "out")


def test_strided_rows_and_weights(isa):
    inputs, dy, *rest = make_case(65, 63, 129, 8, FP32, FP32, 0.3)
    plain = run(cpu, inputs, dy, *rest)
    wide_x, wide_dy = torch.full((65, 200), torch.nan), torch.full((65, 200), torch.nan)
    wide_x[:, 3:132], wide_dy[:, 5:68] = inputs["x"], dy
    wide_weight = inputs["weight"].repeat_interleave(2, dim=1)
    for weight in (inputs["weight"], inputs["weight"].T.contiguous().T, wide_weight[:, ::2]):
        strided = inputs | {"x": wide_x[:, 3:132], "weight": weight}
        for name, t in run(cpu, strided, wide_dy[:, 5:68], *rest).items():
            assert torch.equal(t, plain[name]), name


def test_a_weight_without_contiguous_rows_may_change(isa):
    """Such a weight is copied, each time."""
    weight = torch.randn(6, 10)[:, ::2]
    layers = Layers([Projection(weight, torch.zeros(1, 5), torch.zeros(6, 1), 1.0)])
    x = torch.randn(3, 5)
    for _ in range(2):
        torch.testing.assert_close(cpu.lora_linear_fwd(x, layers, None).ys[0], x @ weight.T)
        weight.mul_(3)


@pytest.mark.parametrize("needs", range(16))
def test_needs(isa, needs):
    """Each subset gives the same bits as all gradients together, and None for the rest."""
    case = make_case(65, 63, 129, 4, BF16, FP32, 0.3)
    wanted = tuple(bool(needs >> i & 1) for i in range(4))
    everything, some = run(cpu, *case), run(cpu, *case, needs=wanted)
    for name, need in zip(GRADIENTS, wanted, strict=True):
        assert torch.equal(some[name], everything[name]) if need else some[name] is None


@pytest.mark.parametrize("dtype, how", WAYS)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9999999])
@pytest.mark.parametrize("rng", [[0, 0], [2**63 - 1, 2**40 + 9], [-1, 2**31]], ids=str)
def test_mask_is_the_references(isa, monkeypatch, dtype, how, dropout_p, rng):
    """x = 1 and lora_a = identity make h the mask itself; dh = 1 makes it dx."""
    multiply_bf16(monkeypatch, how)
    M, K = 101, 273
    rng = torch.tensor(rng)
    keep = reference.keep_mask(rng, dropout_p, M, K)
    x, eye = torch.ones(M, K, dtype=dtype), torch.eye(K)
    zero = torch.zeros(1, K, dtype=dtype)
    _, h = OneLayer(cpu).lora_linear_fwd(x, zero, eye, torch.zeros(1, K), 1.0, None, None, dropout_p, rng)
    scale = reference.dropout_scale(dropout_p)
    assert torch.equal(h != 0, keep)
    torch.testing.assert_close(h, keep * scale, rtol=1e-6, atol=0)

    args = (torch.ones(M, 1, dtype=dtype), x, h, zero, torch.ones(1, K), torch.ones(1, 1), 1.0)
    dx, dlora_a, _, _ = OneLayer(cpu).lora_linear_bwd(*args, None, dropout_p, rng, (True, True, False, False))
    if scale < 60000:
        assert (dx[keep] == torch.tensor(scale, dtype=dtype)).all() and (dx[~keep] == 0).all()
    torch.testing.assert_close(dlora_a[0], keep.sum(0) * scale, rtol=1e-6, atol=0)


def test_dropped_nan_and_inf_do_not_leak(isa):
    x = torch.ones(40, 70)
    keep = reference.keep_mask(RNG, 0.5, *x.shape)
    x[~keep] = torch.nan
    args = (torch.zeros(1, 70), torch.randn(3, 70), torch.randn(1, 3), 1.0)
    _, h = OneLayer(cpu).lora_linear_fwd(x, *args, None, None, 0.5, RNG)
    needs = (False, True, False, False)
    _, dlora_a, _, _ = OneLayer(cpu).lora_linear_bwd(torch.ones(40, 1), x, h, *args, None, 0.5, RNG, needs)
    assert torch.isfinite(h).all() and torch.isfinite(dlora_a).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_conversion_of_every_value(isa, dtype):
    """All 65536 patterns are read as torch reads them, and values between them are rounded as torch rounds them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(256, 256)
    finite = torch.where(torch.isfinite(every), every, 0)
    _, out = OneLayer(cpu).lora_linear_fwd(
        finite, finite[:1], torch.eye(256), torch.zeros(1, 256), 1.0, None, None, 0.0, None
    )
    assert torch.equal(out, finite.float())

    exact = finite.float()
    inputs = torch.cat([exact * factor for factor in (1.0, 1 + 2**-9, 1 + 2**-12, 1 - 2**-9, 1 - 2**-11, 1 + 2**-8)])
    specials = torch.tensor([torch.inf, -torch.inf, torch.nan, 65504.0, 65519.99, 65520.0, 3.4e38, 1e-8, -0.0])
    inputs = torch.cat([inputs.flatten(), specials]).reshape(1, -1)
    rounded = torch.empty(inputs.shape, dtype=dtype)
    terms = [(weight_view(inputs), torch.ones(1, 1), 1.0)]
    kernels.product(
        terms=terms, out=rounded, transposed=True, column_scale=None, bias=None, num_threads=torch.get_num_threads()
    )
    torch.testing.assert_close(rounded, inputs.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_two_runs_give_the_same_bits(isa):
    case = make_case(300, 129, 257, 16, BF16, FP32, 0.1)
    with threads(3):
        first, second = run(cpu, *case), run(cpu, *case)
    assert all(torch.equal(first[name], second[name]) for name in first)
    single = run(cpu, *case)
    for name in ("y", "h"):
        assert torch.equal(first[name], single[name])
    for name in GRADIENTS:
        torch.testing.assert_close(first[name], single[name], rtol=2e-2, atol=1e-3)


def test_the_number_of_threads_changes_no_bit(isa):
    """Few rows of x, and NF4 both ways: no thread adds up what another one has."""
    weight = torch.randn(70, 64)
    nf4 = quantize_nf4(weight)
    case = make_case(5, 70, 64, 4, FP32, FP32, 0.0)
    kernels = [
        lambda: quantize_nf4(weight).tensors().packed,
        nf4.dequantize,
        lambda: OneLayer(cpu).lora_linear_fwd(*list(case[0].values())[:4], 0.7, None, None, 0.0, None)[0],
    ]
    for kernel in kernels:
        single = kernel()
        with threads(3):
            assert torch.equal(kernel(), single)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_lora_term_alone(isa, dtype):
    """With W0 = 0, y and dx are the low-rank term, elementwise."""
    inputs, *rest = make_case(129, 65, 63, 16, dtype, FP32, 0.3, extras=False)
    inputs["weight"] = torch.zeros_like(inputs["weight"])
    assert_case((inputs, *rest))


@pytest.mark.parametrize("how", ["converted", "own"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_small_lora_term_is_not_rounded_away(isa, monkeypatch, how, dropout_p):
    """At ‖sBA‖/‖W0‖ = 1e-3 the term's projection on its true value is 1 within 1 %, in bfloat16."""
    multiply_bf16(monkeypatch, how)
    inputs = lora_inputs(2048, 96, 64, 8, BF16, FP32)
    x, weight, lora_a, lora_b = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
    scaling = 1e-3 * weight.double().norm().item() / (lora_b.double() @ lora_a.double()).norm().item()
    rng = RNG if dropout_p else None
    delta = scaling * (reference.drop(x.double(), dropout_p, rng) @ lora_a.double().T @ lora_b.double().T)
    y, h = OneLayer(cpu).lora_linear_fwd(x, weight, lora_a, lora_b, scaling, None, None, dropout_p, rng)
    error = y.double() - x.double() @ weight.double().T
    assert (error * delta).sum() / (delta * delta).sum() == pytest.approx(1.0, abs=0.01)

    dy = torch.randn(2048, 96, generator=torch.Generator().manual_seed(3)).to(BF16)
    args = (dy, x, h, weight, lora_a, lora_b, scaling, None, dropout_p, rng, (True, False, False, False))
    delta = reference.drop(scaling * (dy.double() @ lora_b.double() @ lora_a.double()), dropout_p, rng)
    error = OneLayer(cpu).lora_linear_bwd(*args)[0].double() - dy.double() @ weight.double()
    assert (error * delta).sum() / (delta * delta).sum() == pytest.approx(1.0, abs=0.01)


def test_unknown_isa_is_refused():
    with pytest.raises(ValueError, match="sse9.*generic"):
        kernels.set_isa("sse9")


@pytest.mark.parametrize("name", ["generic", "sse9"])
def test_isa_by_environment(name):
    code = "from lora_kernels.backends import cpu; print(cpu.isa(), '|', cpu.unavailable)"
    environment = os.environ | {ISA_ENVIRONMENT_VARIABLE: name}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if name == "generic":
        assert output.stdout.strip() == "generic | None"
    else:
        assert "LORA_KERNELS_CPU_ISA" in output.stdout and "sse9" in output.stdout


def test_what_it_refuses():
    inputs, dy, *rest = make_case(3, 4, 5, 2, torch.float64, torch.float64, 0.0)
    with pytest.raises(ValueError, match="x of torch.float64"):
        run(cpu, inputs, dy, *rest)
    inputs, dy, *rest = make_case(3, 4, 5, 2, FP32, BF16, 0.0)
    with pytest.raises(ValueError, match="adapter weights are torch.bfloat16"):
        run(cpu, inputs, dy, *rest)


def test_group_checks_the_column_scale():
    x, layers, _ = group_case(5, FP32, FP32, False)
    for scale, error in ((torch.ones(1), ValueError), (torch.ones(layers[1].weight.shape[0]).double(), TypeError)):
        with pytest.raises(error, match=r"layers\[1\]: column_scale has"):
            lora_linear_group(x, [layers[0], replace(layers[1], column_scale=scale)])
