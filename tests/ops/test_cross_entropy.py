import pytest
import torch
from torch.nn import functional as F

from lora_kernels import use_backend
from lora_kernels.backends import cpu
from lora_kernels.backends.cpu import memory as recycling
from lora_kernels.ops import cross_entropy
from lora_kernels.ops.cross_entropy import chunked_cross_entropy, chunked_logprobs
from lora_kernels.testing import assert_close_to_reference


def full_cross_entropy(hidden, weight, labels, bias, softcap, scale):
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    return loss_of_logits(logits if logits.dtype == torch.float64 else logits.float(), labels, softcap, scale)


def loss_of_logits(logits, labels, softcap, scale):
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=-100)


def results(loss_function, dtype, inputs, labels, softcap, scale):
    leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in inputs]
    loss = loss_function(*leaves[:2], labels, leaves[2], softcap, scale)
    (loss * 0.25).backward()
    return loss, [None if t is None else t.grad for t in leaves]


def make_inputs(bias: bool):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 13, 24, generator=generator), torch.randn(65, 24, generator=generator)
    labels = torch.randint(65, (3, 13), generator=generator)
    labels[torch.rand(3, 13, generator=generator) < 0.4] = -100
    return (hidden, weight, torch.randn(65, generator=generator) if bias else None), labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "softcap", "scale"), [(False, None, 1.0), (True, None, 0.5), (True, 3.0, 2.0)])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("dense_size", [1, 1 << 19], ids=["our product", "torch's"])
def test_equals_cross_entropy_over_all_logits(monkeypatch, dtype, bias, softcap, scale, chunk_size, dense_size):
    monkeypatch.setattr("lora_kernels.backends.cpu.lora_linear.DENSE_SIZE", dense_size)
    inputs, labels = make_inputs(bias)
    inputs = tuple(None if t is None else t.to(dtype) for t in inputs)

    def chunked(hidden, weight, labels, bias, softcap, scale):
        loss, count = chunked_cross_entropy(hidden, weight, labels, bias, chunk_size, softcap, scale)
        assert count == int((labels != -100).sum())
        return loss

    loss, grads = results(chunked, dtype, inputs, labels, softcap, scale)
    eager_loss, eager_grads = results(full_cross_entropy, dtype, inputs, labels, softcap, scale)
    reference_loss, reference_grads = results(full_cross_entropy, torch.float64, inputs, labels, softcap, scale)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.bfloat16:
        # The rounding of the logits dwarfs the loss's own: compare from the same logits on, in float32.
        logits = torch.addmm(inputs[2], inputs[0].flatten(0, 1), inputs[1].t()) if bias else inputs[0] @ inputs[1].t()
        logits = logits.view(*labels.shape, -1)
        eager_loss = loss_of_logits(logits.float(), labels, softcap, scale)
        reference_loss = loss_of_logits(logits.double(), labels, softcap, scale)
    if dtype == torch.float64:
        for actual, reference in zip([loss, *grads], [reference_loss, *reference_grads], strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-13)
        return
    assert_close_to_reference(loss, eager_loss, reference_loss, "loss")
    for name, grad, eager, reference in zip(
        ("hidden", "weight", "bias"), grads, eager_grads, reference_grads, strict=True
    ):
        if reference is not None:
            assert grad.dtype == dtype
            assert_close_to_reference(grad, eager, reference, f"d{name}")


def test_gradcheck():
    (hidden, weight, bias), labels = make_inputs(bias=True)
    leaves = [t.double().requires_grad_() for t in (hidden[:, :3], weight[:9], bias[:9])]
    labels = labels[:, :3] % 9

    def loss(hidden, weight, bias):
        return chunked_cross_entropy(hidden, weight, labels, bias, 4, 2.0, 0.7)[0]

    torch.autograd.gradcheck(loss, leaves)


def test_only_the_needed_gradients_and_no_label_at_all():
    (hidden, weight, _), labels = make_inputs(bias=False)
    hidden.requires_grad_()
    loss, count = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert count == 0
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert weight.grad is None


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    loss, _ = chunked_cross_entropy(hidden, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2000
    assert torch.equal(hidden.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, 12, dtype=torch.long)}, "labels"),
        ({"lm_head_weight": torch.zeros(65, 23)}, "lm_head_weight"),
        ({"lm_head_weight": torch.zeros(65, 24, dtype=torch.bfloat16)}, "dtype"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"labels": torch.zeros(3, 13, dtype=torch.int32)}, "labels must be int64, got torch.int32"),
        ({"labels": torch.full((3, 13), 65)}, "labels must be -100 or from 0 to 64, got 65 to 65"),
        ({"labels": torch.arange(-1, 38).view(3, 13)}, "labels must be -100 or from 0 to 64, got -1 to 37"),
    ],
)
def test_bad_arguments(change, message):
    (hidden, weight, _), labels = make_inputs(bias=False)
    for function in (chunked_cross_entropy, chunked_logprobs):
        with pytest.raises(ValueError, match=message):
            function(**{"hidden": hidden, "lm_head_weight": weight, "labels": labels, **change})


@pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")
@pytest.mark.parametrize("trained", ["none", "hidden", "weight", "bias", "all"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_and_torch_agree(monkeypatch, dtype, softcap, trained):
    """The kernel takes what has no softcap and isn't float64; a gradient of the head's is summed up from float32."""
    inputs, labels = make_inputs(bias=True)
    names = ("hidden", "weight", "bias")

    def run(function, backend):
        leaves = [t.to(dtype).requires_grad_(trained in (name, "all")) for name, t in zip(names, inputs, strict=True)]
        with use_backend(backend):
            y = function(*leaves[:2], labels, leaves[2], 7, softcap, 0.8)
            if trained != "none":
                weighted_logprobs(y).backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    for function in (lambda *args: chunked_cross_entropy(*args)[0].view(1), chunked_logprobs):
        ours, theirs = run(function, "auto"), run(function, "reference")
        with monkeypatch.context() as patch:
            patch.setattr(cross_entropy, "cpu_cross_entropy", None)
            if softcap is None and dtype != torch.float64:
                with pytest.raises(TypeError, match="'NoneType' object is not callable"):
                    run(function, "auto")
            else:
                run(function, "auto")
        eps = torch.finfo(dtype).eps
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps * b.abs().max().item())


def test_memory_of_the_logits_is_used_again(monkeypatch):
    """Of any number of chunks, one chunk's logits at a time."""
    monkeypatch.setattr(recycling, "LARGE", 1)
    monkeypatch.setattr(recycling, "_pool", recycling.Pool())
    monkeypatch.setattr("lora_kernels.backends.cpu.lora_linear.DENSE_SIZE", 1)
    hidden = torch.randn(99, 24, requires_grad=True)
    weight = torch.randn(2000, 24)
    for function in (chunked_cross_entropy, chunked_logprobs):
        function(hidden, weight, torch.arange(99), chunk_size=9)
        assert recycling._pool.free_bytes() <= 2 * (1 << 16)


def weighted_logprobs(logprobs):
    """A loss whose gradient differs from label to label, as a preference loss's does."""
    weights = torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype).view(logprobs.shape)
    return (logprobs * weights).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "softcap", "scale"), [(False, None, 1.0), (True, None, 1 / 0.7), (True, 3.0, 2.0)])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("dense_size", [1, 1 << 19], ids=["our product", "torch's"])
def test_logprobs_equal_log_softmax_over_all_logits(monkeypatch, dtype, bias, softcap, scale, chunk_size, dense_size):
    monkeypatch.setattr("lora_kernels.backends.cpu.lora_linear.DENSE_SIZE", dense_size)
    inputs, labels = make_inputs(bias)
    inputs = tuple(None if t is None else t.to(dtype) for t in inputs)
    picked = {}

    def chunked(hidden, weight, labels, bias, softcap, scale):
        picked["chunked"] = chunked_logprobs(hidden, weight, labels, bias, chunk_size, softcap, scale)
        return weighted_logprobs(picked["chunked"])

    def full(hidden, weight, labels, bias, softcap, scale):
        # torch rounds a product of one row in another way, and further off.
        rows = hidden.flatten(0, 1).split(1000 if dense_size == 1 else chunk_size)
        logits = torch.cat([F.linear(part, weight, bias) for part in rows])
        logits = (logits if hidden.dtype == torch.float64 else logits.float()).view(*labels.shape, -1) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logprobs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        picked["full"] = logprobs.masked_fill(labels == -100, 0)
        return weighted_logprobs(picked["full"])

    _, grads = results(chunked, dtype, inputs, labels, softcap, scale)
    _, eager_grads = results(full, dtype, inputs, labels, softcap, scale)
    eager = picked["full"]
    _, reference_grads = results(full, torch.float64, inputs, labels, softcap, scale)
    logprobs, reference = picked["chunked"], picked["full"]
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(logprobs == 0, labels == -100)
    if dtype == torch.float64:
        torch.testing.assert_close(logprobs, reference, rtol=1e-12, atol=1e-13)
        for grad, reference_grad in zip(grads, reference_grads, strict=True):
            torch.testing.assert_close(grad, reference_grad, rtol=1e-12, atol=1e-13)
        return
    assert_close_to_reference(logprobs, eager, reference, "logprobs")
    for name, grad, eager_grad, reference_grad in zip(
        ("hidden", "weight", "bias"), grads, eager_grads, reference_grads, strict=True
    ):
        if reference_grad is not None:
            assert grad.dtype == dtype
            assert_close_to_reference(grad, eager_grad, reference_grad, f"d{name}")


def test_logprobs_are_the_cross_entropy_and_pass_gradcheck():
    (hidden, weight, bias), labels = make_inputs(bias=True)
    loss, _ = chunked_cross_entropy(hidden.double(), weight.double(), labels, bias.double())
    logprobs = chunked_logprobs(hidden.double(), weight.double(), labels, bias.double())
    torch.testing.assert_close(-logprobs.sum(), loss)

    leaves = [t.double().requires_grad_() for t in (hidden[:, :3], weight[:9], bias[:9])]
    labels = labels[:, :3] % 9
    torch.autograd.gradcheck(lambda *inputs: chunked_logprobs(*inputs[:2], labels, inputs[2], 4, 2.0, 0.7), leaves)


def test_logprobs_keep_no_logits_and_nothing_at_all_without_gradients():
    (hidden, weight, _), labels = make_inputs(bias=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_logprobs(hidden.requires_grad_(), weight, labels, chunk_size=4)
        answers = int((labels != -100).sum())
        assert max(kept) <= answers * hidden.shape[-1]
        kept.clear()
        with torch.no_grad():
            logprobs = chunked_logprobs(hidden, weight, labels, chunk_size=4)
    assert not kept
    assert not logprobs.requires_grad
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        chunked_logprobs(hidden, weight, labels, chunk_size=0)


def test_shapes_are_named():
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"labels must be \[2, 3\] like hidden without its last dim, got \[2, 2\]"):
        chunked_cross_entropy(hidden, weight, torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"lm_head_weight must be \[V, 4\], got \[5, 6\]"):
        chunked_logprobs(hidden, torch.zeros(5, 6), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_of_very_different_size(backend):
    """The largest logit is taken off each row by itself: with one for all rows the small ones would underflow."""
    hidden = torch.tensor([[1e3, 0.0], [-1e3, 1.0], [0.0, 1.0]])
    weight, labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), torch.tensor([0, 1, 2])
    with use_backend(backend):
        loss, count = chunked_cross_entropy(hidden, weight, labels, logit_softcap=1e4)
        plain, _ = chunked_cross_entropy(hidden, weight, labels)
    logits = hidden.double() @ weight.double().t()
    wanted = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(plain.double(), wanted, rtol=1e-4, atol=1e-4)
    capped = 1e4 * torch.tanh(logits / 1e4)
    torch.testing.assert_close(loss.double(), F.cross_entropy(capped, labels, reduction="sum"), rtol=2e-3, atol=2e-3)
    assert count == 3
