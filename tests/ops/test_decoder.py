"""RMSNorm, SwiGLU, rotary position embedding and cross-entropy, by every instruction set, against float64."""

import gc
import weakref

import pytest
import torch
from cpu_isa import threads
from op_cases import check, tensors
from torch import Tensor

from lora_kernels import reference
from lora_kernels.backends import cpu
from lora_kernels.backends.cpu import decoder as cpu_decoder
from lora_kernels.backends.cpu.cross_entropy import cross_entropy as cpu_cross_entropy
from lora_kernels.ops import recompute
from lora_kernels.ops.attention import causal_attention
from lora_kernels.ops.rms_norm import rms_norm
from lora_kernels.ops.rotary import rotary
from lora_kernels.ops.swiglu import swiglu
from lora_kernels.testing import assert_close_to_reference

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 7), (2, 3, 130), (1, 1), (33, 576), (0, 4)]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(isa, dtype: torch.dtype, shape: tuple[int, ...], offset: float, contiguous: bool) -> None:
    x, dy = tensors(2, shape, dtype, contiguous)
    (weight,) = tensors(1, shape[-1:], dtype, contiguous)
    y = rms_norm(x.requires_grad_(), weight.requires_grad_(), EPS, offset)
    y.backward(dy)
    check([y.detach(), x.grad, weight.grad], lambda x, w: reference.rms_norm(x, w, EPS, offset), [x, weight, dy])


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(isa, dtype: torch.dtype, shape: tuple[int, ...], contiguous: bool) -> None:
    gate, up, dy = tensors(3, shape, dtype, contiguous)
    y = swiglu(gate.requires_grad_(), up.requires_grad_())
    y.backward(dy)
    check([y.detach(), gate.grad, up.grad], reference.swiglu, [gate, up, dy])


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize(("B", "H", "T", "D"), [(1, 1, 1, 2), (2, 3, 5, 14), (2, 9, 33, 64), (1, 2, 3, 80)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(isa, dtype: torch.dtype, B: int, H: int, T: int, D: int, projected: bool) -> None:
    """`projected`: x is a view of a projection [B, T, H D], as models have it, and cos and sin are one for all."""
    x, dy = tensors(2, (B, T, H, D) if projected else (B, H, T, D), dtype, contiguous=projected)
    cos, sin = tensors(2, (1 if projected else B, T, D), dtype, contiguous=projected)
    x = (x.transpose(1, 2) if projected else x).detach().requires_grad_()
    dy = dy.transpose(1, 2) if projected else dy
    y = rotary(x, cos, sin)
    y.backward(dy)
    check([y.detach(), x.grad], lambda x: reference.rotary(x, cos.to(x.dtype), sin.to(x.dtype)), [x, dy])
    with torch.no_grad():
        assert torch.equal(rotary(x, cos, sin), y)


@pytest.mark.parametrize(("cos_rows", "sin_rows"), [(2, 1), (1, 2)])
def test_rotary_where_one_of_the_angles_is_the_same_for_all(cos_rows: int, sin_rows: int) -> None:
    x, dy = tensors(2, (2, 3, 4, 8), torch.float32)
    cos, sin = (tensors(1, (rows, 4, 8), torch.float32)[0] for rows in (cos_rows, sin_rows))
    y = rotary(x.requires_grad_(), cos, sin)
    y.backward(dy)
    check([y.detach(), x.grad], lambda x: reference.rotary(x, cos.to(x.dtype), sin.to(x.dtype)), [x, dy])


def cross_entropy(logits: Tensor, target: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The kernel's loss of each row and its gradient, which is written over a copy of the logits, and there only."""
    losses = []
    for with_gradient in (False, True):
        memory = torch.full((logits.numel() + 128,), 7.0).to(logits.dtype)
        inside = memory[64:-64].view(logits.shape)
        inside.copy_(logits)
        losses.append(cpu_cross_entropy(inside, target, scale, with_gradient))
        assert (memory[:64] == 7).all() and (memory[-64:] == 7).all()
        assert with_gradient or torch.equal(inside.nan_to_num(5), logits.nan_to_num(5))
    assert torch.equal(losses[0].nan_to_num(5), losses[1].nan_to_num(5))
    return losses[0], inside


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.6, -1.5])
@pytest.mark.parametrize(("M", "V"), [(0, 5), (1, 1), (5, 7), (3, 33), (67, 1000), (2, 49152)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(isa, dtype: torch.dtype, M: int, V: int, scale: float, count: int) -> None:
    (logits,) = tensors(1, (M, V), dtype)
    target = torch.arange(M) * 11 % V
    with threads(count, at_least=max(1, min(M, count))):
        loss, grad = cross_entropy(logits, target, scale)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    results = []
    for wide in (logits.float(), logits.double()):
        leaf = wide.requires_grad_()
        each = torch.nn.functional.cross_entropy(leaf * scale, target, reduction="none")
        results.append((each.detach(), torch.autograd.grad(each.sum(), leaf)[0]))
    (eager, eager_grad), (exact, exact_grad) = results
    assert_close_to_reference(loss, eager, exact, "loss")
    assert_close_to_reference(grad, eager_grad.to(dtype), exact_grad, "gradient")


def test_the_number_of_threads_changes_no_bit(isa) -> None:
    x, dy, up = tensors(3, (300, 64), torch.float32)
    weight, angles = up[0], dy[:100, :32].contiguous()[None]
    rstd = cpu_decoder.rms_norm_fwd(x, weight, EPS, 0.0)[1]
    kernels = [
        lambda: cpu_decoder.rms_norm_fwd(x, weight, EPS, 0.0)[0],
        lambda: cpu_decoder.rms_norm_bwd(dy, x, rstd, weight, 0.0),
        lambda: cpu_decoder.swiglu_fwd(x, up),
        lambda: torch.cat(cpu_decoder.swiglu_bwd(dy, x, up)),
        lambda: cpu_decoder.rotary(x.view(1, 6, 100, 32), angles, angles),
    ]
    for kernel in kernels:
        single = kernel()
        with threads(3):
            assert torch.equal(kernel(), single)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_extreme_logits(isa, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [0.0, 0.0, 0.0], [1e-6, -1e-6, 0.0], [5e4, 5e4, -5e4]]
    rows += [[1.0, -inf, 2.0], [nan, 1.0, 2.0], [1.0, 2.0, nan], [inf, 1.0, 2.0], [-inf, -inf, -inf], [nan, nan, nan]]
    # A whole vector and a part of one, the last of which is the target.
    logits = torch.tensor(rows).repeat_interleave(9, dim=1).to(dtype)
    for column in (26, 13):
        target = torch.full((len(rows),), column)
        leaf = logits.double().requires_grad_()
        exact = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
        exact.sum().backward()
        loss, grad = cross_entropy(logits, target)
        torch.testing.assert_close(loss, exact.float(), equal_nan=True, rtol=1e-6, atol=1e-6)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(grad, leaf.grad.to(dtype), equal_nan=True, rtol=2 * eps, atol=2 * eps)


def test_cross_entropy_adds_up_many_equal_terms(isa) -> None:
    logits = torch.full((2, 1 << 18), -0.3)
    logits[:, 7] = 0
    target = torch.tensor([3, 7])
    loss, _ = cross_entropy(logits, target)
    torch.testing.assert_close(loss.double(), reference.cross_entropy(logits.double(), target), rtol=0, atol=3e-6)


def test_swiglu_of_extreme_values() -> None:
    gate = torch.tensor([-1e4, -200.0, -87.5, -20.0, -0.0, 0.0, 20.0, 87.5, 200.0, 1e4])
    up = torch.ones_like(gate)
    y = swiglu(gate, up)
    assert_close_to_reference(y, torch.nn.functional.silu(gate), gate.double() * gate.double().sigmoid(), "y")
    torch.testing.assert_close(y, torch.nn.functional.silu(gate), atol=1e-30, rtol=1e-5)
    assert swiglu(torch.tensor([float("nan")]), torch.ones(1)).isnan().all()


def test_rms_norm_of_tiny_and_zero_rows() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1e-25, -2e-25, 3e-25]], requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0])
    dy = torch.ones(2, 3)
    y = rms_norm(x, weight, 1e-6)
    y.backward(dy)
    check([y.detach(), x.grad], lambda x: reference.rms_norm(x, weight.to(x.dtype), 1e-6), [x, dy])


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_asked_for(needs: tuple[bool, bool]) -> None:
    a, b, dy = tensors(3, (4, 9), torch.float32)
    for function in (lambda a, b: rms_norm(a, b[0], EPS), swiglu):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((a, b), needs, strict=True)]
        y = function(*leaves)
        assert y.requires_grad == any(needs)
        if any(needs):
            y.backward(dy)
        assert [leaf.grad is not None for leaf in leaves] == list(needs)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_formulas_of_the_gradients(offset: float) -> None:
    """reference.*_bwd, which says what the kernels compute, against autograd through the forward formulas."""
    x, dy, other = tensors(3, (4, 9), torch.float64)
    weight = other[0].clone().requires_grad_()
    x, other = x.requires_grad_(), other.requires_grad_()
    expected = torch.autograd.grad(reference.rms_norm(x, weight, EPS, offset), (x, weight), dy)
    torch.testing.assert_close(reference.rms_norm_bwd(dy, x, weight, EPS, offset), expected)
    expected = torch.autograd.grad(reference.swiglu(x, other), (x, other), dy)
    torch.testing.assert_close(reference.swiglu_bwd(dy, x, other), expected)
    target = torch.tensor([0, 3, 8, 3])
    loss = reference.cross_entropy(x, target, offset + 0.5)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy((offset + 0.5) * x, target, reduction="none"))
    (expected,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(reference.cross_entropy_bwd(x, target, offset + 0.5), expected)


def test_wrong_arguments() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, torch.ones(2), EPS)
    with pytest.raises(ValueError, match="torch.float64"):
        rms_norm(x.double(), torch.ones(3).double(), EPS)
    with pytest.raises(ValueError, match="torch.bfloat16"):
        rms_norm(x, torch.ones(3).bfloat16(), EPS)
    with pytest.raises(ValueError, match="up has shape"):
        swiglu(x, x[:1])
    x = torch.ones(2, 3, 4, 6)
    with pytest.raises(ValueError, match=r"x has shape \[2, 3, 4, 5\]; allowed: \[B, H, T, D\] with an even D"):
        rotary(x[..., :5], x[:, 0], x[:, 0])
    with pytest.raises(ValueError, match=r"sin has shape \[2, 3, 6\]; expected \[2 or 1, 4, 6\]"):
        rotary(x, x[:, 0], x[:, 0, :3])
    with pytest.raises(ValueError, match="torch.bfloat16"):
        rotary(x, x[:, 0], x[:, 0].bfloat16())


def test_no_second_derivative() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_result_of_rotary_may_be_changed_in_place() -> None:
    """As that of the function which it replaces."""
    (x,) = (t.requires_grad_() for t in tensors(1, (1, 2, 5, 8), torch.float32))
    cos, sin = tensors(2, (1, 5, 8), torch.float32)
    expected = torch.autograd.grad(2 * rotary(x, cos, sin).sum(), x)
    assert torch.equal(torch.autograd.grad(rotary(x, cos, sin).mul_(2).sum(), x)[0], expected[0])


def test_a_forward_pass_without_backward_leaves_nothing_behind() -> None:
    q, k = (t.requires_grad_() for t in tensors(2, (1, 2, 5, 8), torch.float32))
    with recompute.recomputing():
        o = causal_attention(q, k, k)
    storage = weakref.ref(o.untyped_storage())
    node = weakref.ref(o.grad_fn)
    del o
    gc.collect()
    assert node() is None and storage() is None


def test_nothing_is_kept_after_backward() -> None:
    gate, up = tensors(2, (4, 9), torch.float32)
    with recompute.recomputing():
        y = swiglu(gate.requires_grad_() * 1, up)
        loss = y.square().sum()
    recipe = weakref.ref(getattr(y.untyped_storage(), recompute._RECIPE))
    del y
    assert recipe() is not None
    loss.backward()
    assert recipe() is None


def test_what_backward_needs_must_not_change() -> None:
    gate, up, dy = tensors(3, (4, 9), torch.float32)
    gate = gate.requires_grad_() * 1
    up.requires_grad_()
    with recompute.recomputing():
        y = swiglu(gate, up)
        z = y * y
    with torch.no_grad():
        gate.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        z.backward(dy)


def test_a_result_that_was_changed_is_kept() -> None:
    gate, up = tensors(2, (4, 9), torch.float32)
    gate.requires_grad_()
    with recompute.recomputing():
        y = swiglu(gate, up)
        with torch.no_grad():
            y.add_(1)
        z = y * y
    (grad,) = torch.autograd.grad(z.sum(), gate)
    s = gate.detach().sigmoid()
    expected = 2 * (gate.detach() * s * up + 1) * up * s * (1 + gate.detach() * (1 - s))
    torch.testing.assert_close(grad, expected)


def test_rms_norm_of_one_row() -> None:
    x, dy = tensors(2, (9,), torch.float32)
    weight = torch.full((9,), 2.0)
    y = rms_norm(x.requires_grad_(), weight.requires_grad_(), EPS)
    y.backward(dy)
    check([y.detach(), x.grad, weight.grad], lambda x, w: reference.rms_norm(x, w, EPS), [x, weight, dy])


def test_inference_tensors_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        x, gate = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(rms_norm(x, torch.ones(8), EPS), reference.rms_norm(x, torch.ones(8), EPS))
    torch.testing.assert_close(swiglu(gate, x), reference.swiglu(gate, x))
