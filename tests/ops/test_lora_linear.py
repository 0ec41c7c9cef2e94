"""The op: its formula by gradcheck, the reference by an independent version, and torch's machinery around it."""

import math
from contextlib import nullcontext

import pytest
import torch
from lora_cases import OneLayer
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import backends, lora_linear, reference, use_backend
from lora_kernels.testing import assert_close_to_reference, lora_inputs

NAMES = ("x", "weight", "lora_a", "lora_b", "bias", "lora_e", "column_scale")


def call(inputs, scaling=0.5, dropout_p=0.0):
    return lora_linear(**inputs, scaling=scaling, dropout_p=dropout_p)


def with_grad(inputs, names=NAMES):
    return {name: None if t is None else t.clone().requires_grad_(name in names) for name, t in inputs.items()}


def plain(inputs, scaling, mask=None):
    """An independent version: nn.functional.linear three times, with a mask given from outside."""
    x = inputs["x"]
    dropped = x if mask is None else x * mask
    h = torch.nn.functional.linear(dropped, inputs["lora_a"])
    if inputs["lora_e"] is not None:
        h = h * inputs["lora_e"]
    z = torch.nn.functional.linear(x, inputs["weight"]) + scaling * torch.nn.functional.linear(h, inputs["lora_b"])
    return (z if inputs["column_scale"] is None else z * inputs["column_scale"]) + inputs["bias"]


def drawn_rng(seed):
    torch.manual_seed(seed)
    return torch.randint(2**62, (2,), dtype=torch.int64)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize("lora_e", [False, True])
def test_gradcheck_of_the_op_in_float64(lora_e, column_scale, dropout_p):
    inputs = lora_inputs(5, 4, 7, 3, torch.float64, bias=True, lora_e=lora_e, column_scale=column_scale)
    inputs = with_grad(inputs)

    def op(*args):
        torch.manual_seed(0)
        return call(dict(zip(NAMES, args, strict=True)), dropout_p=dropout_p)

    assert torch.autograd.gradcheck(op, tuple(inputs[name] for name in NAMES))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_of_the_reference_in_float64(dropout_p):
    inputs = with_grad(lora_inputs(5, 4, 7, 3, torch.float64, bias=True, lora_e=True, column_scale=True))
    rng = torch.tensor([3, 4])

    def ref(*args):
        named = dict(zip(NAMES, args, strict=True))
        return reference.lora_linear_ref(**named, scaling=0.5, dropout_p=dropout_p, rng=rng)

    assert torch.autograd.gradcheck(ref, tuple(inputs[name] for name in NAMES))


def test_reference_equals_plain_torch_in_float64():
    inputs = with_grad(lora_inputs(33, 17, 21, 5, torch.float64, bias=True, lora_e=True, column_scale=True))
    dy = torch.randn(33, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rng = torch.tensor([11, 2**40 + 5])
    mask = reference.keep_mask(rng, 0.25, 33, 21).double() / 0.75
    expected_y = plain(inputs, 0.7, mask)
    names = ("x", "lora_a", "lora_b", "lora_e", "column_scale")
    expected = torch.autograd.grad(expected_y, [inputs[name] for name in names], dy)

    detached = {name: t.detach() for name, t in inputs.items()}
    args = [detached[name] for name in ("x", "weight", "lora_a", "lora_b")]
    bias, scale = detached["bias"], detached["column_scale"]
    y, h = OneLayer(reference).lora_linear_fwd(*args, 0.7, bias, detached["lora_e"], 0.25, rng, scale)
    dz, dscale = reference.column_scale_bwd(dy, y, bias, scale)
    grads = OneLayer(reference).lora_linear_bwd(
        dz, args[0], h, *args[1:], 0.7, detached["lora_e"], 0.25, rng, (True, True, True, True)
    )
    torch.testing.assert_close(y, expected_y.detach(), rtol=1e-12, atol=1e-12)
    for name, actual, wanted in zip(names, (*grads, dscale), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12, msg=f"gradient of {name}")


def test_philox_matches_an_integer_implementation():
    """Random123's definition on Python integers, for counters that reach the top bits."""

    def philox(counter, key):
        for _ in range(7):
            p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = (
                (p1 >> 32) ^ counter[1] ^ key[0],
                p1 & 0xFFFFFFFF,
                (p0 >> 32) ^ counter[3] ^ key[1],
                p0 & 0xFFFFFFFF,
            )
            key = ((key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32)
        return counter

    counters = [(0, 0, 0, 0), (2**32 - 1,) * 4, (1, 2**31, 0xDEADBEEF, 7)]
    for key in [(0, 0), (2**32 - 1, 0x12345678)]:
        for counter in counters:
            words = reference.philox4x32(*(torch.tensor([c]) for c in counter), key=key)
            assert tuple(int(word) for word in words) == philox(counter, key)


def test_philox_ten_rounds_is_random123s_known_answer(monkeypatch):
    """Known answers of Random123's kat_vectors file, published for ten rounds."""
    monkeypatch.setattr(reference, "PHILOX_ROUNDS", 10)
    zero = torch.zeros(1, dtype=torch.int64)
    words = reference.philox4x32(zero, zero, zero, zero, key=(0, 0))
    assert [f"{int(word):08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_mask_keeps_the_right_share_independently(dropout_p):
    M, K = 512, 515
    keep = reference.keep_mask(torch.tensor([5, 6]), dropout_p, M, K).double()
    keep_probability = 1 / reference.dropout_scale(dropout_p)
    assert abs(keep_probability - (1 - dropout_p)) < 2**-16
    sigma = math.sqrt(keep_probability * (1 - keep_probability) / (M * K))
    assert abs(keep.mean().item() - keep_probability) < 4 * sigma
    centred = keep - keep_probability
    for shifted in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1], centred[:, 4:] * centred[:, :-4]):
        assert abs(shifted.mean().item()) < 4 * keep_probability * (1 - keep_probability) / math.sqrt(shifted.numel())
    assert not torch.equal(keep, reference.keep_mask(torch.tensor([5, 7]), dropout_p, M, K).double())
    assert not torch.equal(keep, reference.keep_mask(torch.tensor([4, 6]), dropout_p, M, K).double())


def test_no_nan_leaks_through_a_dropped_element():
    x = torch.full((1, 8), math.inf)
    rng = torch.tensor([0, 0])
    dropped = reference.drop(x, 0.9, rng)
    assert torch.equal(torch.isinf(dropped), reference.keep_mask(rng, 0.9, 1, 8))
    with pytest.raises(ValueError, match="rng is None with dropout_p 0.9; allowed: int64"):
        reference.drop(x, 0.9, None)


@pytest.mark.parametrize("dtype, adapter_dtype", [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("column_scale", [False, True])
def test_forward_and_every_gradient_by_auto(dtype, adapter_dtype, dropout_p, column_scale):
    base = lora_inputs(65, 33, 47, 5, dtype, adapter_dtype, bias=True, lora_e=True, column_scale=column_scale)
    names = NAMES if column_scale else NAMES[:-1]
    dy = torch.randn(65, 33, generator=torch.Generator().manual_seed(3)).to(dtype)
    rng = drawn_rng(7)

    def run(function, inputs):
        inputs = with_grad(inputs)
        y = function(inputs)
        return [y.detach(), *torch.autograd.grad(y, [inputs[name] for name in names], dy.to(y.dtype))]

    def ref(inputs):
        return reference.lora_linear_ref(**inputs, scaling=2.0, dropout_p=dropout_p, rng=rng)

    def op(inputs):
        torch.manual_seed(7)
        return call(inputs, scaling=2.0, dropout_p=dropout_p)

    exact = run(ref, {name: None if t is None else t.double() for name, t in base.items()})
    for name, actual, eager, wanted in zip(("y", *names), run(op, base), run(ref, base), exact, strict=True):
        # With a column scale, all gradients are made of dz, which is rounded to the dtype of x.
        kind = dtype if column_scale else actual.dtype
        assert_close_to_reference(actual.to(kind), eager.to(kind), wanted, name)


@pytest.mark.parametrize(
    "names",
    [("x",), ("lora_a",), ("lora_b",), ("lora_e",), ("column_scale",), ("x", "lora_b"), ("bias", "weight")],
)
def test_subsets_of_gradients(names):
    base = lora_inputs(9, 6, 10, 4, bias=True, lora_e=True, column_scale=True)
    every, some = with_grad(base), with_grad(base, names)
    call(every).square().sum().backward()
    call(some).square().sum().backward()
    for name in NAMES:
        if name in names:
            torch.testing.assert_close(some[name].grad, every[name].grad)
        else:
            assert some[name].grad is None


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (2, 3, 8)])
def test_leading_dimensions_and_empty_inputs(shape):
    inputs = with_grad(lora_inputs(1, 5, 8, 2, bias=True))
    inputs["x"] = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = call(inputs, dropout_p=0.5)
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert inputs["x"].grad.shape == shape
    if y.numel() == 0:
        assert torch.count_nonzero(inputs["lora_b"].grad) == 0


def test_zero_features():
    inputs = with_grad(lora_inputs(3, 5, 8, 2, bias=True))
    inputs.update(x=torch.ones(3, 0), weight=torch.ones(5, 0), lora_a=torch.ones(2, 0, requires_grad=True))
    y = call(inputs)
    torch.testing.assert_close(y, inputs["bias"].expand(3, 5))
    y.sum().backward()
    assert inputs["lora_a"].grad.shape == (2, 0)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_non_contiguous_inputs(backend):
    base = lora_inputs(12, 10, 14, 4, bias=True)
    contiguous = with_grad(base)
    strided = {
        "x": base["x"].T.contiguous().T.requires_grad_(),
        "weight": base["weight"].T.contiguous().T,
        "lora_a": base["lora_a"].T.contiguous().T.requires_grad_(),
        "lora_b": torch.cat([base["lora_b"]] * 2, dim=1)[:, :4].requires_grad_(),
        "bias": torch.stack([base["bias"]] * 2, dim=1)[:, 0],
        "lora_e": torch.full((1,), 0.5).expand(4),
    }
    contiguous["lora_e"] = torch.full((4,), 0.5)
    with use_backend(backend):
        expected, actual = call(contiguous), call(strided)
        torch.testing.assert_close(actual, expected)
        # sum's gradient is an expanded scalar: stride 0 in both dimensions.
        expected.sum().backward()
        actual.sum().backward()
    for name in ("x", "lora_a", "lora_b"):
        torch.testing.assert_close(strided[name].grad, contiguous[name].grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(use_reentrant):
    base = lora_inputs(16, 8, 12, 4, column_scale=True)
    grads = []
    for wrap in (False, True):
        inputs = with_grad(base)
        torch.manual_seed(5)
        if wrap:
            y = checkpoint(lambda x, i=inputs: call({**i, "x": x}, dropout_p=0.5), inputs["x"],
                           use_reentrant=use_reentrant)  # fmt: skip
        else:
            y = call(inputs, dropout_p=0.5)
        y.square().sum().backward()
        grads.append([inputs[name].grad for name in ("x", "lora_a", "lora_b", "column_scale")])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_follows_torchs_generator():
    inputs = lora_inputs(16, 8, 12, 4)
    torch.manual_seed(1)
    first, second = call(inputs, dropout_p=0.5), call(inputs, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(call(inputs, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("column_scale", [False, True])
def test_compiles_without_graph_breaks(column_scale):
    base = lora_inputs(16, 8, 12, 4, bias=True, lora_e=True, column_scale=column_scale)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for dropout_p in (0.0, 0.25):
        eager_inputs, compiled_inputs = with_grad(base), with_grad(base)
        torch.manual_seed(3)
        expected = call(eager_inputs, dropout_p=dropout_p)
        torch.manual_seed(3)
        actual = compiled(compiled_inputs, dropout_p=dropout_p)
        torch.testing.assert_close(actual, expected)
        expected.square().sum().backward()
        actual.square().sum().backward()
        for name in NAMES if column_scale else NAMES[:-1]:
            torch.testing.assert_close(compiled_inputs[name].grad, eager_inputs[name].grad)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck(dropout_p):
    inputs = with_grad(lora_inputs(6, 5, 8, 3, bias=True, lora_e=True, column_scale=True))
    rng = torch.tensor([1, 2]) if dropout_p else None
    args = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    for scale in ((), (inputs["column_scale"],)):
        torch.library.opcheck(
            torch.ops.lora_kernels.lora_linear_fwd.default,
            (*args, 0.5, inputs["bias"], inputs["lora_e"], dropout_p, rng, *scale),
        )
    scale_bwd = torch.ops.lora_kernels.column_scale_bwd.default
    for y in (torch.ones(6, 5), None):
        torch.library.opcheck(scale_bwd, (torch.ones(6, 5), y, inputs["bias"].detach(), torch.ones(5)))
    detached = [t.detach() for t in args]
    dy, h = torch.ones(6, 5), torch.ones(6, 3)
    torch.library.opcheck(
        torch.ops.lora_kernels.lora_linear_bwd.default,
        (dy, detached[0], h, *detached[1:], 0.5, inputs["lora_e"].detach(), dropout_p, rng, [True, False, True, True]),
    )


def test_autocast_runs_in_its_dtype_with_float32_adapters():
    base = lora_inputs(16, 8, 12, 4, bias=True, column_scale=True)
    inputs = with_grad(base)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(inputs)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(inputs[name].grad.dtype == torch.float32 for name in ("x", "lora_a", "column_scale"))
    half = {**base, **{name: base[name].bfloat16() for name in ("x", "weight", "bias")}}
    torch.testing.assert_close(y, call(half), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_y", [torch.sum, lambda y: y.square().sum()], ids=["sum", "square"])
def test_no_second_derivative(dtype, of_y):
    """Also where the gradient of y is a constant: the norm of dx would be one, silently."""
    inputs = lora_inputs(4, 3, 5, 2, dtype)
    for every in (True, False):
        leaves = with_grad(inputs) if every else with_grad(inputs, ("x", "lora_a", "lora_b"))
        (grad,) = torch.autograd.grad(of_y(call(leaves)), leaves["x"], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            grad.norm().backward()


def test_changes_between_forward_and_backward_are_noticed():
    for name in ("weight", "x", "lora_a", "lora_b"):
        inputs = with_grad(lora_inputs(12, 3, 5, 2), ("x", "lora_a", "lora_b"))
        y = call(inputs)
        with torch.no_grad():
            inputs[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_backward_by_another_backend():
    inputs = with_grad(lora_inputs(12, 3, 5, 2), ("x", "lora_a", "lora_b"))
    grads = []
    for backend in ("cpu", "reference"):
        with use_backend("cpu"):
            y = call(inputs)
        with use_backend(backend):
            grads.append(torch.autograd.grad(y.sum(), [inputs[name] for name in ("x", "lora_a", "lora_b")]))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_the_gradient_of_a_trained_weight_is_differentiable_in_x(rows):
    """It is a product outside the op, so here a second derivative exists, whatever the shape of x."""
    base = lora_inputs(6, 5, 7, 2, torch.float64, bias=True)
    found = []
    for run in (call, lambda inputs: plain(inputs, 0.5)):
        inputs = with_grad(base, ("x", "weight"))
        inputs["x"] = base["x"].view(*rows, 7).clone().requires_grad_()
        (dweight,) = torch.autograd.grad(run(inputs).sum(), inputs["weight"], create_graph=True)
        found += torch.autograd.grad(dweight.square().sum(), inputs["x"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("change, error, message", [
    (dict(x=torch.ones(3, 7)), ValueError, "x has 7 features"),
    (dict(x=torch.ones(3, 8, dtype=torch.int32)), TypeError, "x has dtype torch.int32"),
    (dict(weight=torch.ones(8)), ValueError, "weight"),
    (dict(weight=torch.ones(5, 8).half()), TypeError, "weight has dtype torch.float16"),
    (dict(lora_a=torch.ones(0, 8)), ValueError, "rank R must be at least 1"),
    (dict(lora_a=torch.ones(2, 9)), ValueError, r"lora_a has shape \[2, 9\]; expected \[2, 8\]"),
    (dict(lora_b=torch.ones(2, 5)), ValueError, r"lora_b has shape \[2, 5\]; expected \[5, 2\]"),
    (dict(lora_b=torch.ones(5, 2).bfloat16()), TypeError, "lora_b has dtype torch.bfloat16"),
    (dict(bias=torch.ones(4)), ValueError, "bias has shape"),
    (dict(lora_e=torch.ones(3)), ValueError, "lora_e has shape"),
    (dict(column_scale=torch.ones(8)), ValueError, r"column_scale has shape \[8\]; expected \[5\]"),
    (dict(column_scale=torch.ones(5).half()), TypeError, "column_scale has dtype torch.float16"),
    (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0"),
    (dict(dropout_p=-0.1), ValueError, "dropout_p is -0.1"),
    (dict(lora_a=torch.ones(2, 8, device="meta")), ValueError, "lora_a is on meta"),
])  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    inputs = {**lora_inputs(3, 5, 8, 2), "scaling": 1.0, **change}
    with pytest.raises(error, match=message):
        lora_linear(**inputs)


def test_backend_choice(monkeypatch):
    x = torch.ones(1)
    with (
        pytest.raises(ValueError, match="'cuba'.*allowed: auto, reference, cpu, triton, cuda, cuda-emulated"),
        use_backend("cuba"),
    ):
        pass
    with use_backend("reference"):
        assert backends.resolve(x) is reference
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "reference")
    backends.from_environment.cache_clear()
    assert backends.resolve(x) is reference
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "nonsense")
    backends.from_environment.cache_clear()
    with pytest.raises(ValueError, match="LORA_KERNELS_BACKEND"):
        backends.resolve(x)
    monkeypatch.delenv("LORA_KERNELS_BACKEND")
    backends.from_environment.cache_clear()
    assert backends.resolve(x.double()) is reference
    assert set(backends.available()) == {"reference", "cpu", "triton", "cuda", "cuda-emulated"}


@pytest.mark.parametrize("triton_works, cuda_works", [(True, True), (True, False), (False, True), (False, False)])
def test_what_auto_takes_on_a_gpu(triton_works, cuda_works, monkeypatch):
    """Without Triton CUDA C++ runs all that it can; its lora_linear takes no float32."""
    from types import SimpleNamespace

    from lora_kernels.backends import triton
    from lora_kernels.backends.cuda import backend as cuda

    for module, works in ((triton, triton_works), (cuda, cuda_works)):
        monkeypatch.setattr(module, "unavailable", None if works else "by decree")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
        any_op = triton if triton_works else cuda if cuda_works else reference
        assert backends.resolve(x) is any_op
        linear = reference if any_op is cuda and dtype == torch.float32 else any_op
        assert backends.resolve(x, activations=True) is linear


def test_an_unusable_backend_says_why(monkeypatch):
    from lora_kernels.backends import cpu

    monkeypatch.setattr(cpu, "unavailable", "no compiler was found")
    with pytest.raises(RuntimeError, match="cpu backend.*no compiler was found"), use_backend("cpu"):
        pass
    assert backends.resolve(torch.ones(1)) is reference


@pytest.mark.parametrize("trains", [False, True])
def test_a_dispatch_mode_sees_the_op(trains):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = lora_inputs(3, 8, 8, 2, torch.float32)
    x, weight, lora_a, lora_b = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
    lora_a.requires_grad_(trains)
    expected = lora_linear(x, weight, lora_a, lora_b, 2.0)
    with Log():
        found = lora_linear(x, weight, lora_a, lora_b, 2.0)
    assert "lora_kernels.lora_linear_fwd.default" in seen and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_column_scale_of_16_bits_where_a_mode_watches(dtype):
    """The op is given it in float32, as the kernels read it."""
    inputs = lora_inputs(20, 48, 64, 4, dtype, torch.float32)
    scale = torch.rand(48).to(dtype)
    gradients = []
    for mode in (nullcontext, lambda: FlopCounterMode(display=False)):
        leaf = scale.clone().requires_grad_()
        with mode():
            y = lora_linear(**inputs | {"column_scale": leaf}, scaling=0.5)
            y.float().square().sum().backward()
        gradients.append(leaf.grad)
        assert leaf.grad.dtype == dtype
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("trained", ["weight", "column_scale"])
def test_second_derivatives_past_a_column_scale_are_refused(trained):
    inputs = lora_inputs(5, 6, 7, 2, column_scale=True)
    leaves = {name: t.requires_grad_(name in ("x", trained)) for name, t in inputs.items() if t is not None}
    y = lora_linear(**leaves, scaling=0.5)
    (gradient,) = torch.autograd.grad(y.square().sum(), [leaves[trained]], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), [leaves["x"]])
