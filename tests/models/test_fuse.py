"""Models with our decoder kernels against transformers' own."""

import copy
import inspect
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import transformers
from op_cases import tensors
from tiny_models import perturb, tiny_batch, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRAConfig, inject, reference, use_backend
from lora_kernels.backends import cpu
from lora_kernels.backends.cpu import decoder as cpu_decoder
from lora_kernels.models.fuse import _rotating, fuse_decoder
from lora_kernels.ops import recompute
from lora_kernels.ops.swiglu import swiglu
from lora_kernels.testing import assert_close_to_reference

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")

KINDS = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Olmo2"]
# RMSNorms, attentions and MLPs; of those of Gemma only the projections are fused, since the activation is another.
FUSED = {"Llama": 10, "Qwen2": 10, "Qwen3": 14, "Mistral": 10, "Gemma": 10, "Gemma2": 14, "Olmo2": 14}


def pair(kind: str, dtype: torch.dtype = torch.float32, **lora) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model with trained adapters as it is, and fused."""
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0}
    # How much a random model magnifies rounding is a matter of its seed: with 4 in 100, two right runs differ twofold.
    # With this one both stay within two thirds of the tolerance, on any instruction set and number of threads.
    torch.manual_seed(117)
    config = getattr(transformers, f"{kind}Config")(vocab_size=61, bos_token_id=1, eos_token_id=2, **sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    # Rows of size 1. Layers can all but cancel rows of 0.02, which is how models begin; the next norm then magnifies
    # their rounding errors.
    model.get_input_embeddings().weight.data.mul_(50)
    models = model.to(dtype), copy.deepcopy(model).to(dtype)
    assert fuse_decoder(models[1]) == FUSED[kind]
    for m in models:
        torch.manual_seed(118)
        inject(m, LoRAConfig(r=3, **lora))
        # Little, or scores reach hundreds, where softmax makes a thousand rounding errors of one.
        perturb(m, 0.05)
        m.train()
    return models


def loss_and_grads(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(9)
    model.zero_grad()
    ids = tiny_batch()
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(fused, plain, exact) -> None:
    assert_close_to_reference(fused[0], plain[0], exact[0], "logits")
    assert fused[1].keys() == plain[1].keys() and fused[1]
    # As one vector, each tensor in units of its largest element: what rounding reaches a single small tensor through a
    # whole model is a matter of luck.
    vectors = []
    for grads in (fused[1], plain[1], exact[1]):
        vectors.append(torch.cat([(grads[name] / exact[1][name].abs().max()).flatten() for name in exact[1]]))
    assert_close_to_reference(vectors[0].to(fused[0].dtype), vectors[1].to(fused[0].dtype), vectors[2], "gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_model(kind: str, dtype: torch.dtype) -> None:
    plain, fused = pair(kind, dtype)
    exact = copy.deepcopy(plain).double()
    assert_same(loss_and_grads(fused), loss_and_grads(plain), loss_and_grads(exact))


def test_state_dict_types_and_signatures_stay() -> None:
    plain, fused = pair("Llama")
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in fused.modules()]
    assert inspect.signature(fused.model.forward) == inspect.signature(plain.model.forward)
    assert fuse_decoder(fused) == 0
    again = copy.deepcopy(fused)
    again.model.norm.weight.data.mul_(2)
    assert not torch.equal(loss_and_grads(again)[0], loss_and_grads(fused)[0])


def test_what_is_something_else_is_left_alone() -> None:
    class OddRMSNorm(torch.nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e-3

    assert fuse_decoder(torch.nn.Sequential(OddRMSNorm(8, eps=1e-6))) == 0
    assert fuse_decoder(tiny_model("gpt2")) == 1  # the output embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_position_embedding_is_ours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the fused model alone: the function that its class calls stays what it was."""
    plain, fused = pair(kind)
    monkeypatch.setattr(cpu_decoder, "rotary", None)
    loss_and_grads(plain)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        loss_and_grads(fused)
    with use_backend("reference"):
        loss_and_grads(fused)


def test_another_rotary_position_embedding_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohere's turns neighbouring pairs, GPT-OSS's takes half as many angles; this Phi3's turns a half of D only."""
    models = transformers.models
    for attention in (models.cohere.modeling_cohere.CohereAttention, models.gpt_oss.modeling_gpt_oss.GptOssAttention):
        assert _rotating(attention.forward) is attention.forward
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(7)
    options = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "partial_rotary_factor": 0.5}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **options))
    expected = loss_and_grads(model)
    fuse_decoder(model)
    monkeypatch.setattr(cpu_decoder, "rotary", None)
    assert "forward" in vars(model.model.layers[0].self_attn)
    torch.testing.assert_close(loss_and_grads(model)[0], expected[0])


def apply_rotary_pos_emb(q: Tensor, k: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None):
    """As Qwen4-Exp's: the queries alone where there are no keys."""
    rotated = reference.rotary(q, cos, sin)
    return rotated if k is None else (rotated, reference.rotary(k, cos, sin))


def test_rotary_position_embedding_with_other_arguments_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = tensors(2, (1, 2, 5, 8), torch.float32)
    cos, sin = tensors(2, (1, 5, 8), torch.float32)
    both = _rotating(lambda self: apply_rotary_pos_emb(q, k, cos, sin))
    alone = _rotating(lambda self: apply_rotary_pos_emb(q, cos=cos, sin=sin))
    expected = [reference.rotary(t, cos, sin) for t in (q, k)]
    torch.testing.assert_close(list(both(None)), expected)
    monkeypatch.setattr(cpu_decoder, "rotary", None)
    torch.testing.assert_close(alone(None), expected[0])
    with pytest.raises(TypeError):
        both(None)


def test_dropout_and_checkpointing() -> None:
    _, fused = pair("Llama", lora_dropout=0.3)
    expected = loss_and_grads(fused)
    fused.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logits, grads = loss_and_grads(fused)
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-4)
    assert grads.keys() == expected[1].keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], atol=1e-6, rtol=1e-3)


def test_projections_of_one_input_share_a_dropout() -> None:
    """The fused model against the unfused one in which the second and third of them draw as the first did."""
    plain, fused = pair("Llama", lora_dropout=0.3)
    state = {}
    for layer in plain.model.layers:
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            parent = layer.self_attn if names[0] == "q_proj" else layer.mlp
            first, *others = (getattr(parent, name) for name in names)
            first.register_forward_pre_hook(lambda *_: state.update(rng=torch.get_rng_state()))
            for other in others:
                other.register_forward_pre_hook(lambda *_: torch.set_rng_state(state["rng"]))
    expected, found = loss_and_grads(plain), loss_and_grads(fused)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, expected[1][name], atol=1e-6, rtol=1e-3)


class CrossAttention(torch.nn.Module):
    """Keys and values of another sequence, or of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.q_proj(x) @ self.k_proj(other).T @ self.v_proj(other)


def test_projections_of_two_inputs_are_left_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    plain = CrossAttention()
    fused = copy.deepcopy(plain)
    assert fuse_decoder(fused) == 1
    for model in (plain, fused):
        torch.manual_seed(4)
        inject(model, LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
        perturb(model)
    x, other = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(fused(x, x), plain(x, x))
    assert not fused.lora_kernels_apart
    torch.testing.assert_close(fused(x, other), plain(x, other))
    assert not fused.lora_kernels_apart  # backward may run it again, and must do the same
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x, other), plain.eval()(x, other))
    assert fused.lora_kernels_apart
    torch.testing.assert_close(fused(x, other), plain(x, other))
    assert all(layer.group is None for layer in fused.children())


class NamedCrossAttention(CrossAttention):
    def forward(self, x: Tensor, key_value_states: Tensor | None = None) -> Tensor:
        return super().forward(x, x if key_value_states is None else key_value_states)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", [CrossAttention, NamedCrossAttention])
def test_two_inputs_under_checkpointing(kind: type, use_reentrant: bool) -> None:
    """The first pass and the one that backward repeats draw the same dropout."""
    torch.manual_seed(3)
    model = kind()
    fuse_decoder(model)
    perturb(inject(model, LoRAConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "k_proj", "v_proj"])))
    x, other = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    gradients = []
    for call in (model, lambda *args: checkpoint(model, *args, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(4)
        call(x, other).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_no_group_outlives_an_error() -> None:
    _, fused = pair("Llama")
    attention = fused.model.layers[0].self_attn
    with pytest.raises(TypeError):
        attention.forward(torch.ones(1, 3, 32), position_embeddings=None, attention_mask=None)
    assert attention.q_proj.group is None and attention.k_proj.group is None


@pytest.mark.parametrize("change", ["disabled", "merged", "dora", "dropout", "rank", "mode"])
def test_layers_that_cannot_be_one_group(change: str) -> None:
    """Whatever is done to an adapter, a fused model computes what the unfused does."""
    plain, fused = pair("Llama", use_dora=change == "dora")
    for model in (plain, fused):
        layer = model.model.layers[1].self_attn.k_proj
        if change == "disabled":
            layer.adapters_enabled = False
        elif change == "merged":
            layer.merge()
        elif change == "dropout":
            layer.lora_dropout = 0.5
            layer.eval()
        elif change == "rank":
            layer.keep_ranks(torch.tensor([0, 2]))
            model.model.layers[0].self_attn.k_proj.keep_ranks(torch.tensor([], dtype=torch.int64))
        elif change == "mode":
            model.model.layers[1].self_attn.eval()
    exact = copy.deepcopy(plain).double()
    assert_same(loss_and_grads(fused), loss_and_grads(plain), loss_and_grads(exact))


def test_results_are_not_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair("Llama")
    dropped = []

    def pack(t: Tensor, own=recompute._pack) -> object:
        packed = own(t)
        if not isinstance(packed, recompute._Kept):
            dropped.append((t.numel() // t.shape[-1], t.shape[-1]))
        return packed

    monkeypatch.setattr(recompute, "_pack", pack)
    fused(input_ids=tiny_batch(), use_cache=False)
    rows = tiny_batch().numel()
    # Of each layer: the input of q, k and v, that of gate and up, and that of down.
    assert dropped == 2 * ([(rows, 32)] * 2 + [(rows, 44)])


def test_own_forward_where_the_kernels_do_not_apply() -> None:
    plain, fused = pair("Llama")
    with use_backend("reference"):
        assert torch.equal(loss_and_grads(fused)[0], loss_and_grads(plain)[0])
    plain, fused = plain.double(), fused.double()
    assert torch.equal(loss_and_grads(fused)[0], loss_and_grads(plain)[0])


def test_inference_mode() -> None:
    plain, fused = pair("Llama")
    with torch.inference_mode():
        expected, found = (m.eval()(input_ids=tiny_batch()).logits for m in (plain, fused))
    torch.testing.assert_close(found, expected)
    gate, up = tensors(2, (4, 9), torch.float32)
    with torch.inference_mode():
        found = swiglu(gate * 1, up * 1)
    assert torch.equal(found, swiglu(gate, up))


def test_generation() -> None:
    plain, fused = pair("Qwen3")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    answers = [m.eval().generate(tiny_batch(), **options) for m in (plain, fused)]
    assert torch.equal(*answers)


def test_compile() -> None:
    plain, fused = pair("Llama")
    expected = loss_and_grads(plain)
    fused.forward = torch.compile(fused.forward, backend="aot_eager")
    logits, grads = loss_and_grads(fused)
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], atol=1e-6, rtol=1e-3)


def test_what_is_kept_must_not_change() -> None:
    """As torch sees to it where nothing is computed again."""
    _, fused = pair("Llama")
    loss = fused(input_ids=tiny_batch(), labels=tiny_batch()).loss
    with torch.no_grad():
        fused.model.layers[0].mlp.down_proj.lora_b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class SelfAttention(torch.nn.Module):
    def __init__(self, between: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.between = between
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        self.between(x)
        return q + 2 * self.k_proj(x) + 3 * self.v_proj(x)


def fused_and_plain(between: Callable[[Tensor], object] = id) -> tuple[torch.nn.Module, torch.nn.Module]:
    models = []
    for fuse in (True, False):
        torch.manual_seed(3)
        model = torch.nn.Sequential(SelfAttention(between))
        if fuse:
            assert fuse_decoder(model) == 1
        torch.manual_seed(4)
        inject(model, LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
        perturb(model)
        models.append(model)
    return tuple(models)


@pytest.mark.parametrize("rows", [3, 20])
def test_x_that_changes_between_the_layers_of_a_group(rows: int) -> None:
    fused, plain = fused_and_plain(lambda x: x.add_(1))
    x = torch.randn(rows, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()))


def test_layers_whose_hooks_change_them_are_no_group() -> None:
    fused, plain = fused_and_plain()
    x = torch.randn(20, 8)
    for model in (fused, plain):
        prune.l1_unstructured(model[0].k_proj, "lora_a", 0.5)
        model[0].v_proj.register_forward_hook(lambda module, args, y: 2 * y)
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x))
        for model in (fused, plain):
            model[0].k_proj.lora_a_orig.data.mul_(3)


def test_threads_do_not_take_each_others_group() -> None:
    """One is between q_proj and k_proj while another runs the same model from end to end."""
    inside, leave = threading.Event(), threading.Event()

    def between(x: Tensor) -> None:
        if x is xs[0]:
            inside.set()
            assert leave.wait(20)

    fused, plain = fused_and_plain(between)
    plain[0].between = id
    xs, results = [torch.randn(20, 8) for _ in range(2)], []
    thread = threading.Thread(target=lambda: results.append(fused(xs[0])))
    thread.start()
    assert inside.wait(20) and fused[0].k_proj.group is not None
    torch.testing.assert_close(fused(xs[1]), plain(xs[1]))
    leave.set()
    thread.join()
    torch.testing.assert_close(results[0], plain(xs[0]))
    assert not fused[0].lora_kernels_apart


def test_a_pickled_model_comes_back_plain_and_can_be_fused() -> None:
    plain, fused = pair("Llama")
    loaded = pickle.loads(pickle.dumps(fused))
    assert torch.equal(loss_and_grads(loaded)[0], loss_and_grads(plain)[0])
    assert fuse_decoder(loaded) == FUSED["Llama"]
    assert torch.equal(loss_and_grads(loaded)[0], loss_and_grads(fused)[0])


def test_what_sees_ops_sees_those_of_a_fused_model():
    """No kernel reads the address of a tensor that has none."""
    plain, fused = tiny_model("llama").requires_grad_(False), tiny_model("llama").requires_grad_(False)
    fuse_decoder(fused)
    ids = tiny_batch()

    def run(model, ids):
        return model(input_ids=ids, use_cache=False).logits

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert run(fused, mode.from_tensor(ids)).shape == (*ids.shape, plain.config.vocab_size)
    norm, x = fused.model.norm, torch.randn(2, 3, 32)
    torch.testing.assert_close(make_fx(norm)(x)(2 * x), norm(2 * x))
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(norm)(x), norm(x))
