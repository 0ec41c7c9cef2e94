"""Causal attention against float64, and models with it against the unmodified transformers models."""

import contextlib
import copy
import json
import pickle
from collections.abc import Iterator

import pytest
import torch
import transformers
from cpu_isa import instruction_set, threads
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lora_kernels import reference, use_backend
from lora_kernels.backends import cpu
from lora_kernels.models import fuse as fused_decoder
from lora_kernels.models.fuse import fuse_decoder
from lora_kernels.ops.attention import causal_attention
from lora_kernels.testing import assert_close_to_reference

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")

# B, H, KV, T, D
SIZES = [
    *((2, 3, 1, T, 20) for T in (2, 5, 6, 7, 16, 31)),
    *((1, 4, 2, T, 16) for T in (95, 96, 97, 200)),
    (2, 6, 2, 130, 64),
    (1, 2, 2, 34, 1),
    (1, 1, 1, 513, 80),
    (1, 3, 1, 101, 128),
    (1, 1, 1, 33, 256),
]


def inputs(B: int, H: int, KV: int, T: int, D: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> list:
    """q, k, v and dout, as transposed views."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(B, T, heads, D, generator=generator) for heads in (H, KV, KV, H)]
    made[:2] = [size * t for t in made[:2]]
    return [t.to(dtype).transpose(1, 2) for t in made]


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def results(function, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """o, dq, dk and dv."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (q, k, v)]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, dout.to(o.dtype))]


def check(actual: list[Tensor], tensors: list[Tensor]) -> None:
    eager = results(torch_attention, *tensors)
    exact = results(torch_attention, *tensors, dtype=torch.float64)
    for name, *t in zip(("o", "dq", "dk", "dv"), actual, eager, exact, strict=True):
        assert_close_to_reference(*t, name)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(isa, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    tensors = inputs(*sizes, dtype)
    check(results(causal_attention, *tensors), tensors)


def test_one_row(isa) -> None:
    q, k, v, dout = inputs(2, 4, 2, 1, 20)
    o, dq, dk, dv = results(causal_attention, q, k, v, dout)
    assert torch.equal(o, v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(dv, dout.unflatten(1, (2, 2)).sum(2))
    # Its score has no influence.
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_scores(isa, size: float) -> None:
    """Of ±1e3 and ±1e5 times √D: a softmax that is nearly a maximum."""
    tensors = inputs(1, 2, 1, 150, 24, size=size)
    check(results(causal_attention, *tensors), tensors)


def test_strides(isa) -> None:
    tensors = inputs(2, 4, 2, 37, 20)
    expected = results(causal_attention, *tensors)

    def sliced(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:3], t.shape[3] + 5), float("nan"))
        wide[..., 2:-3] = t
        return wide[..., 2:-3]

    def every_second(t: Tensor) -> Tensor:
        return torch.stack([t, t], dim=-1)[..., 0]

    for change in (Tensor.contiguous, sliced, every_second):
        for found, wanted in zip(results(causal_attention, *map(change, tensors)), expected, strict=True):
            assert torch.equal(found, wanted)


def test_nothing_else_is_written(isa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results lie in the middle of larger tensors, whose other elements stay."""
    from lora_kernels.backends.cpu import decoder as cpu_decoder

    whole = []

    def guarded(like: Tensor) -> Tensor:
        B, heads, T, D = like.shape
        whole.append(torch.full((B, T + 2, heads, D + 3), 7.0))
        return whole[-1][:, 1:-1, :, 1:-2].transpose(1, 2)

    tensors = inputs(2, 6, 2, 97, 20)
    expected = results(causal_attention, *tensors)
    monkeypatch.setattr(cpu_decoder, "_empty_heads", guarded)
    q, k, v, dout = tensors
    o, lse = cpu_decoder.attention_fwd(q, k, v, 20**-0.5)
    found = [o, *cpu_decoder.attention_bwd(dout, q, k, v, o, lse, 20**-0.5)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for t in whole:
        t[:, 1:-1, :, 1:-2] = 7.0
        assert (t == 7.0).all()


@pytest.mark.parametrize("sizes", [(1, 6, 2, 300, 16), (1, 3, 3, 200, 16), (4, 9, 3, 100, 16)], ids=str)
def test_the_same_bits_for_any_number_of_threads(sizes: tuple[int, ...]) -> None:
    found = []
    for count in (1, 2, 3, 5):
        with threads(count):
            found.append(results(causal_attention, *inputs(*sizes)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_gradients_that_are_asked_for(needs: tuple[bool, ...]) -> None:
    *tensors, dout = inputs(1, 4, 2, 40, 16)
    expected = results(causal_attention, *tensors, dout)[1:]
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    o = causal_attention(*leaves)
    assert o.requires_grad == any(needs)
    if any(needs):
        o.backward(dout)
    for leaf, need, grad in zip(leaves, needs, expected, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


def test_formulas_of_the_reference() -> None:
    q, k, v, dout = inputs(2, 4, 2, 9, 5, torch.float64)
    expected = results(torch_attention, q, k, v, dout)
    torch.testing.assert_close(reference.causal_attention(q, k, v, 5**-0.5), expected[0])
    torch.testing.assert_close(reference.causal_attention_bwd(dout, q, k, v, 5**-0.5), tuple(expected[1:]))


def test_scale_and_second_derivative() -> None:
    q, k, v, _ = inputs(1, 2, 1, 40, 16)
    torch.testing.assert_close(causal_attention(q, k, v, 0.7), reference.causal_attention(q, k, v, 0.7))
    q.requires_grad_()
    (grad,) = torch.autograd.grad(causal_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_wrong_arguments() -> None:
    q, k, v, _ = inputs(1, 4, 2, 8, 16)
    for arguments, message in [
        ((q[0], k, v), "q has shape"),
        ((q[:, :, :0], k, v), "none of them 0"),
        ((q[:, :3], k, v), "3 heads"),
        ((q, k[:, :, :7], v), "k has shape"),
        ((q, k, v[..., :8]), "v has shape"),
        ((q.double(), k, v), "q is torch.float64"),
        ((q, k, v.bfloat16()), "v is torch.bfloat16"),
        ((torch.ones(1, 1, 2, 257),) * 3, "up to 256"),
    ]:
        with pytest.raises(ValueError, match=message):
            causal_attention(*arguments)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch):
    """A context without our attention, in which what needs it fails; on an instruction set where models use it."""

    @contextlib.contextmanager
    def without() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(fused_decoder, "causal_attention", None)
            yield

    monkeypatch.setattr(cpu, "native_bfloat16", lambda: False)
    with instruction_set("avx2"):
        yield without


def is_needed():
    return pytest.raises(TypeError, match="'NoneType' object is not callable")


def pair(kind: str = "Llama", **options) -> list[torch.nn.Module]:
    """The same model as it is, and fused."""
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0}
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(vocab_size=61, bos_token_id=1, eos_token_id=2, **(sizes | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    models = [model, copy.deepcopy(model)]
    fuse_decoder(models[1])
    return models


def ids(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_and_grads(model: torch.nn.Module, **arguments) -> list[Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids(), use_cache=False, **arguments).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids()[:, 1:].flatten()).backward()
    grads = [p.grad / p.grad.abs().max().clamp_min(1e-20) for p in model.parameters()]
    return [logits.detach(), torch.cat([g.flatten() for g in grads])]


def assert_same(fused: list[Tensor], plain: list[Tensor]) -> None:
    for found, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral", "Gemma"])
def test_models(absent, kind: str) -> None:
    plain, fused = pair(kind)
    exact = copy.deepcopy(plain).double()
    found = [logits_and_grads(model) for model in (fused, plain, exact)]
    for name, *t in zip(("logits", "gradients"), *found, strict=True):
        assert_close_to_reference(*t, name)
    with absent(), is_needed():
        logits_and_grads(fused)


def test_padding_and_sliding_windows_are_torchs(absent) -> None:
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :9] = 0
    with absent():
        plain, fused = pair()
        assert_same(logits_and_grads(fused, attention_mask=mask), logits_and_grads(plain, attention_mask=mask))
        plain, fused = pair("Mistral", sliding_window=16)
        assert_same(logits_and_grads(fused), logits_and_grads(plain))


def test_dropout_and_eager_are_left_alone(absent) -> None:
    with absent():
        plain, fused = pair(attention_dropout=0.3)
        for model in (plain.train(), fused.train()):
            torch.manual_seed(5)
            model.loss = logits_and_grads(model)
        assert_same(fused.loss, plain.loss)
        plain, fused = pair(attn_implementation="eager")
        assert_same(logits_and_grads(fused), logits_and_grads(plain))
        with use_backend("reference"):
            plain, fused = pair()
            assert torch.equal(logits_and_grads(fused)[1], logits_and_grads(plain)[1])


def test_generation(absent) -> None:
    plain, fused = pair()
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :12] = 0
    for arguments in ({}, {"attention_mask": mask}, {"cache_implementation": "static"}):
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **arguments}
        assert torch.equal(*(m.eval().generate(ids(), **options) for m in (plain, fused)))
    # Ours are the prompts, where nothing is padded.
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with absent():
        with is_needed():
            fused.generate(ids(), **options)
        fused.generate(ids(), attention_mask=mask, **options)


def test_checkpointing_and_compile(absent) -> None:
    # Other tests may have compiled this forward so often that dynamo would leave it as it is.
    torch.compiler.reset()
    plain, fused = pair()
    expected = logits_and_grads(plain)
    compiled = copy.deepcopy(fused)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager")
    with absent():
        assert_same(logits_and_grads(compiled), expected)
    fused.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(logits_and_grads(fused), expected)
    with absent(), is_needed():
        logits_and_grads(fused)


def test_the_config_and_other_models_stay(absent, tmp_path) -> None:
    plain, fused = pair()
    assert fused.config._attn_implementation == "sdpa"
    assert fused.config.to_dict() == plain.config.to_dict()
    fused.save_pretrained(tmp_path)
    assert "lora_kernels" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = logits_and_grads(plain)
    with absent():
        assert_same(logits_and_grads(loaded), expected)
    # Twice is once, and nothing has happened to models that aren't fused.
    registered = transformers.AttentionInterface()["sdpa"]
    assert fuse_decoder(fused) == 0 and fuse_decoder(pair()[0]) > 0
    assert transformers.AttentionInterface()["sdpa"] is registered
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(pair()[1].model.layers[0].self_attn))):
        assert any(module.__dict__.get("lora_kernels_attention") for module in model.modules())
    copied = copy.deepcopy(fused)
    assert_same(logits_and_grads(copied), expected)
    with absent(), is_needed():
        logits_and_grads(copied)


def test_arguments_that_change_the_result_go_to_torch(absent) -> None:
    attention = transformers.AttentionInterface()["sdpa"]
    module = pair()[1].model.layers[0].self_attn
    q, k, v, _ = inputs(1, 4, 2, 70, 8)
    harmless = {"position_ids": ids(1, 70), "num_items_in_batch": 3, "output_attentions": False, "return_dict": True}
    o, _ = attention(module, q, k, v, None, scaling=0.2, sliding_window=8, **harmless)
    assert o.shape == (1, 70, 4, 8) and o.is_contiguous()
    torch.testing.assert_close(o.transpose(1, 2), reference.causal_attention(q, k, v, 0.2))
    with absent():
        with is_needed():
            attention(module, q, k, v, None, scaling=0.2, sliding_window=8, **harmless)
        with contextlib.suppress(ValueError):  # which is what some versions of transformers say to it
            attention(module, q, k, v, None, softcap=30.0)
        everything = attention(module, q, k, v, None, is_causal=False)[0]
        assert not torch.allclose(everything, o)
        attention(module, q[:, :, -1:], k, v, None)
        attention(module, q[:, :, :65], k, v, None)
        attention(module, q[:, :, :40], k[:, :, :40], v[:, :, :40], None)
        attention(module, q, k, v, None, unknown=1)
        attention(pair()[0].model.layers[0].self_attn, q, k, v, None)
        with torch.autocast("cpu", torch.bfloat16):
            attention(module, q, k, v, None)
