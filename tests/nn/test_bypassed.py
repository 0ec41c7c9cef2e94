"""Layers whose weight a model uses without calling them: no adapter can work there."""

import copy
import functools
import re
import warnings
from types import MethodType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, perturb, tiny_batch, tiny_model
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from lora_kernels import fuse_decoder, load_adapter
from lora_kernels.io.nf4 import load_nf4_model, save_nf4_model
from lora_kernels.methods import adapters_disabled, inject, merge
from lora_kernels.methods.adalora import AdaLoRAConfig
from lora_kernels.methods.lora import LoRAConfig, lora_modules
from lora_kernels.methods.named import add_adapter, use_adapter
from lora_kernels.nn.bypassed import NEVER_CALLED, bypassed_layers, layers_read
from lora_kernels.nn.hooks import FAST_PATHS
from lora_kernels.nn.lora_linear import FusedLoRALinear, not_linear
from lora_kernels.nn.nf4_linear import NF4Linear
from lora_kernels.train.causal_lm import AnswerLoss

_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def family(kind):
    torch.manual_seed(5)
    layers = {"num_hidden_layers": 2}
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(**_SMALL, **layers, state_size=4, time_step_rank=32)).eval()
    if kind == "jamba":
        how = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        sizes = {"expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
        return JambaForCausalLM(JambaConfig(**_SMALL, **layers, **_HEADS, **how, **sizes)).eval()
    if kind == "longcat":
        how = {"num_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "moe_topk": 2}
        experts = {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 2}
        mla = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        return LongcatFlashForCausalLM(LongcatFlashConfig(**_SMALL, **how, **experts, **mla)).eval()
    if kind == "moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SMALL, **layers, **_HEADS, **experts)).eval()
    if kind == "falcon":
        return FalconForCausalLM(FalconConfig(**_SMALL, **layers, num_attention_heads=4, bias=True)).eval()
    how = {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "interleave_moe_layer_step": 2}
    return Llama4ForCausalLM(Llama4TextConfig(**_SMALL, **layers, **_HEADS, **how)).eval()


def ends(names):
    return {name.rpartition(".")[2] for name in names}


def loss(model):
    return model(input_ids=tiny_batch(), labels=tiny_batch(), use_cache=False).loss


@torch.no_grad()
def logits(model):
    return model(input_ids=tiny_batch(), use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "left_out"), [("mamba", "mixer.dt_proj"), ("jamba", "mamba.dt_proj"), ("longcat", "router.classifier")]
)
@pytest.mark.parametrize(
    "config",
    [LoRAConfig(r=4, init="both_gaussian"), LoRAConfig(r=4, use_dora=True), AdaLoRAConfig(init_r=4, target_r=2)],
    ids=["lora", "dora", "adalora"],
)
def test_all_linear_gives_every_adapter_a_gradient_and_merges_to_the_same_logits(kind, left_out, config):
    model = family(kind)
    with pytest.warns(UserWarning, match=rf"{re.escape(left_out)}: no LoRA adapter, .* never calls"):
        inject(model, config)
    perturb(model, std=0.05)
    loss(model).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    before = logits(model)
    assert torch.allclose(logits(merge(model)), before, atol=1e-4, rtol=1e-3)


def test_by_name_it_is_refused_with_the_reason_and_the_model_left_alone():
    model = family("mamba")
    before = copy.deepcopy(model.state_dict())
    for targets in (["dt_proj", "x_proj"], r".*_proj"):
        with pytest.raises(ValueError, match=r"dt_proj'.* never calls the layer itself.* exclude_modules.*x_proj"):
            inject(model, LoRAConfig(target_modules=targets))
        assert all(p.requires_grad for p in model.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    inject(model, LoRAConfig(target_modules=r".*_proj", exclude_modules=["dt_proj"]))
    assert ends(name for name, _ in lora_modules(model)) == {"in_proj", "x_proj", "out_proj"}


@pytest.mark.parametrize("kind", ["moe", "llama4", "falcon", "llama", "gpt2"])
def test_layers_that_are_called_are_found_so(kind):
    model = tiny_model(kind) if kind in ("llama", "gpt2") else family(kind)
    called = set()
    for name, module in model.named_modules():
        if not_linear(module) is None:
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    assert bypassed_layers(model) == {} and not called
    logits(model)
    assert called == {name for name, module in model.named_modules() if not_linear(module) is None}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_dry_forward_leaves_no_trace_and_needs_no_weights(device):
    model = family("jamba").train()
    fuse_decoder(model)
    loss(model).backward()
    model.to(device)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: (tensor, tensor._version, tensor.requires_grad) for name, tensor in tensors.items()}
    grads = {name: None if p.grad is None else (p.grad, p.grad._version) for name, p in model.named_parameters()}
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    random = torch.get_rng_state()
    assert ends(bypassed_layers(model)) == {"dt_proj"}
    assert model.training and torch.equal(torch.get_rng_state(), random)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert tensor is state[name][0] and (tensor._version, tensor.requires_grad) == state[name][1:]
    for name, parameter in model.named_parameters():
        assert grads[name] is None or (parameter.grad is grads[name][0] and parameter.grad._version == grads[name][1])


def test_no_gpu_is_started_for_a_model_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"asked {device}"))
    assert ends(bypassed_layers(family("mamba"))) == {"dt_proj"}


class Reader(nn.Module):
    """Reads the weight of `read`, calls `called`; `expert` is for other tokens."""

    def __init__(self, fails=False):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.read, self.called, self.expert = (nn.Linear(8, 8) for _ in range(3))
        self.fails = fails

    def forward(self, input_ids):
        x = self.called(self.embed(input_ids)) @ self.read.weight
        if self.fails:
            raise RuntimeError("needs more than ids")
        return self.expert(x) if (input_ids == 6).any() else x


def test_what_is_neither_called_nor_read_counts_as_called_and_so_does_a_model_that_cannot_run():
    assert list(bypassed_layers(Reader())) == ["read"]
    assert layers_read(tiny_model("llama")) == set()
    assert bypassed_layers(Reader(fails=True)) == {}
    assert bypassed_layers(nn.Sequential(nn.Linear(8, 8))) == {}


@pytest.mark.parametrize("product", [torch.bmm, torch.Tensor.bmm])
def test_experts_in_one_tensor_take_no_memory(product):
    class Experts(Reader):
        def __init__(self):
            super().__init__()
            # 2^51 bytes.
            self.down = nn.Parameter(torch.empty(1, 2**46, 8, device="meta"))

        def forward(self, input_ids):
            return product(super().forward(input_ids)[:, :, :1].expand(1, -1, 2**46), self.down)

    assert list(bypassed_layers(Experts())) == ["read"]


def test_the_output_projection_of_torchs_attention_is_known():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.warns(UserWarning, match=r"self_attn\.out_proj: no LoRA adapter"):
        inject(model, LoRAConfig(r=2, init="both_gaussian"))
    assert ends(name for name, _ in lora_modules(model)) == {"linear1", "linear2"}
    model(torch.randn(2, 3, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_file_with_such_an_adapter_loads_and_the_adapter_stays_frozen(tmp_path):
    targets = ["dt_proj", "x_proj"]
    theirs = get_peft_model(family("mamba"), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).eval()
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    model = family("mamba")
    with pytest.warns(UserWarning, match="dt_proj: LoRA adapters without effect, which stay frozen"):
        load_adapter(model, tmp_path)
    assert torch.allclose(logits(model), logits(theirs), atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".x_proj." in name for name in trained)
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    before, kept = logits(model), model.backbone.layers[0].mixer.dt_proj.weight
    merge(model)
    assert torch.equal(model.backbone.layers[0].mixer.dt_proj.weight, kept) and not list(lora_modules(model))
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_a_second_adapter_leaves_the_layers_out_as_well():
    model = family("mamba")
    with pytest.warns(UserWarning, match="dt_proj"):
        inject(model, LoRAConfig(r=2))
    with pytest.warns(UserWarning, match="dt_proj"):
        add_adapter(model, "value", LoRAConfig(r=3))
    with use_adapter(model, "value"):
        assert ends(name for name, _ in lora_modules(model)) == {"in_proj", "x_proj", "out_proj"}


def test_in_four_bits_the_layer_stays_dense(tmp_path):
    model = family("mamba")
    model.save_pretrained(tmp_path)
    quantised = load_nf4_model(tmp_path, torch.float32, progress=False)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in quantised.named_modules()}
    assert kinds["x_proj"] is NF4Linear and kinds["dt_proj"] is nn.Linear
    for name, module in list(quantised.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(name, module.to_linear())
    assert torch.allclose(logits(quantised), logits(model), atol=1e-5)


@pytest.mark.parametrize(("kind", "router"), [("falcon", None), ("llama4", "router")])
def test_families_with_linear_classes_of_their_own_train(kind, router, tmp_path):
    base, model = family(kind), family(kind)
    fuse_decoder(model)
    assert torch.allclose(logits(model), logits(base), atol=1e-5)
    if router is None:
        inject(model, LoRAConfig(r=4))
    else:
        with pytest.warns(UserWarning, match=rf"{router}: no LoRA adapter, .* a Llama4Router computes something else"):
            inject(model, LoRAConfig(r=4))
        with pytest.raises(ValueError, match="a Llama4Router computes something else"):
            inject(family(kind), LoRAConfig(target_modules=[router]))
    assert torch.allclose(logits(model), logits(base), atol=1e-5)
    perturb(model, std=0.05)
    answer, labels = AnswerLoss(model), tiny_batch()
    answer.check(labels[0])
    found = answer(tiny_batch(), labels)["loss"] / labels[:, 1:].numel()
    found.backward()
    assert torch.allclose(found, loss(model), rtol=1e-5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    before = logits(model)
    assert torch.allclose(logits(merge(model)), before, atol=1e-4)
    base.save_pretrained(tmp_path)
    quantised = load_nf4_model(tmp_path, torch.float32, progress=False)
    assert any(isinstance(module, NF4Linear) for module in quantised.modules())


class Same(nn.Linear):
    """nn.Linear's forward, inherited."""


class Composed(nn.Linear):
    def forward(self, input):
        return torch.matmul(input, self.weight.mT) + (0 if self.bias is None else self.bias)


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Clipped(nn.Linear):
    def forward(self, input):
        return super().forward(input.clamp(-100, 100))


class Upcast(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input.float(), self.weight.float()).to(input.dtype)


class Noisy(nn.Linear):
    def forward(self, input):
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class Pair(nn.Linear):
    def forward(self, input):
        return super().forward(input), 0


class Buffered(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.ones(()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Same, Composed])
def test_a_subclass_that_computes_the_same_gets_an_adapter(kind, bias):
    linear = kind(6, 4, bias=bias)
    random = torch.get_rng_state()
    assert not_linear(linear) is None and torch.equal(torch.get_rng_state(), random)
    layer = FusedLoRALinear.from_linear(linear, r=2, lora_alpha=4, init="both_zero")
    x = torch.randn(3, 6)
    assert torch.allclose(layer(x), linear(x), atol=1e-6) and layer.weight is linear.weight


@pytest.mark.parametrize("kind", [Scaled, Clipped, Upcast, Noisy, Pair])
def test_a_subclass_that_computes_something_else_is_refused_by_name(kind):
    model = nn.Sequential()
    model.add_module("one", kind(6, 4, bias=False))
    model.add_module("two", nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf"'one'.* the forward of a {kind.__name__} computes something else"):
        inject(model, LoRAConfig(target_modules=["one", "two"]))
    with pytest.warns(UserWarning, match=f"one: no LoRA adapter, since the forward of a {kind.__name__}"):
        inject(model, LoRAConfig())
    assert isinstance(model.two, FusedLoRALinear) and type(model.one) is kind


def test_a_subclass_with_tensors_of_its_own_is_refused():
    with pytest.raises(TypeError, match="a Buffered has scale beside its weight and bias"):
        FusedLoRALinear.from_linear(Buffered(6, 4), r=2, lora_alpha=4)


def encoder(layers=2, **how):
    torch.manual_seed(7)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **how)
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(8)).eval()


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["layers.1.linear2"]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_torchs_encoders_use_the_adapters_in_evaluation_and_are_fast_again_without(targets, padded, gradients):
    base, model = encoder(), encoder()
    inject(model, LoRAConfig(r=2, init="both_gaussian", target_modules=targets))
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    mask, kept = (padding, ~padding) if padded else (None, torch.ones(2, 4, dtype=torch.bool))
    dense = copy.deepcopy(base)
    for name, layer in lora_modules(model):
        dense.get_submodule(name).weight.data += layer.scaling * layer.lora_b @ layer.lora_a
    with torch.set_grad_enabled(gradients):
        wanted = dense.train()(x, src_key_padding_mask=mask)[kept]
        assert torch.allclose(model(x, src_key_padding_mask=mask)[kept], wanted, atol=1e-5)
        with adapters_disabled(model):
            plain = model(x, src_key_padding_mask=mask)[kept]
        assert torch.allclose(plain, base(x, src_key_padding_mask=mask)[kept], atol=1e-5)
        assert not torch.allclose(plain, wanted, atol=1e-3)
        assert torch.allclose(merge(model)(x, src_key_padding_mask=mask)[kept], wanted, atol=1e-5)
    for (name, module), (_, before) in zip(model.named_modules(), base.named_modules(), strict=True):
        for switch in FAST_PATHS.values():
            assert getattr(module, switch, None) == getattr(before, switch, None), name
        assert vars(module).keys() == vars(before).keys()


def test_an_encoder_around_the_part_with_adapters_is_named():
    model = encoder()
    inject(model.layers[1], LoRAConfig(r=2))
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad(), pytest.raises(TypeError, match="x is a nested tensor.*inject into the whole nn.Transformer"):
        model(torch.randn(2, 4, 8), src_key_padding_mask=padding)


class ReadsAtTimes(Reader):
    """Reads the weight of `called` in the mode `training`, with gradients on or off as `gradients` says."""

    def __init__(self, training, gradients):
        super().__init__()
        self.mode = (training, gradients)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        if (self.training, torch.is_grad_enabled()) == self.mode:
            return nn.functional.linear(x, self.called.weight, self.called.bias)
        return self.called(x)


@pytest.mark.parametrize("mode", [(False, True), (False, False), (True, True)])
def test_a_layer_that_is_called_in_one_mode_and_read_in_another_is_left_out(mode):
    model = ReadsAtTimes(*mode)
    assert bypassed_layers(model) == {"called": NEVER_CALLED}
    assert model.training


class NoIds(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.read, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, residual, scale=1.0):
        y = torch.conv1d((self.first(x) + self.first(residual)).mT, self.read.weight[:, :, None])
        return self.last(y.mT) * scale


def test_a_model_that_takes_other_tensors_than_ids_is_tried_with_them():
    assert bypassed_layers(NoIds()) == {"read": NEVER_CALLED}


def rwkv():
    torch.manual_seed(5)
    return RwkvForCausalLM(RwkvConfig(**_SMALL, num_hidden_layers=2, attention_hidden_size=32, rescale_every=1)).eval()


def test_a_weight_that_the_model_changes_gets_no_adapter_and_stays_dense(tmp_path):
    base = rwkv()
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attention\.output'.*changes its weight from call to call"):
        inject(rwkv(), LoRAConfig(target_modules=["output"]))
    model = rwkv()
    with pytest.warns(UserWarning, match=r"attention\.output, .*feed_forward\.value: no LoRA adapter"):
        inject(model, LoRAConfig(r=2, init="both_gaussian"))
    assert ends(name for name, _ in lora_modules(model)) == {"key", "receptance", "value"}
    trained = model.train()(input_ids=tiny_batch(), use_cache=False).logits
    assert torch.allclose(logits(model.eval()), trained, atol=1e-5)
    assert torch.allclose(logits(merge(model)), trained, atol=1e-4)
    quantised, dense = load_nf4_model(tmp_path, torch.float32, progress=False), rwkv()
    assert type(quantised.rwkv.blocks[0].attention.output) is nn.Linear
    for name, module in list(quantised.named_modules()):
        if isinstance(module, NF4Linear):
            dense.set_submodule(name, module.to_linear())
    assert torch.allclose(logits(quantised), logits(dense), atol=1e-5)


def test_a_four_bit_file_of_a_layer_that_the_model_reads_loads_dense(tmp_path, monkeypatch):
    family("mamba").save_pretrained(tmp_path / "dense")
    with monkeypatch.context() as patched:
        patched.setattr("lora_kernels.io.nf4.layers_read", lambda model: set())
        quantised = load_nf4_model(tmp_path / "dense", torch.float32, progress=False)
    weight = quantised.backbone.layers[0].mixer.dt_proj.weight.dequantize()
    save_nf4_model(quantised, tmp_path / "nf4")
    model = load_nf4_model(tmp_path / "nf4", torch.float32, progress=False)
    layer = model.backbone.layers[0].mixer
    assert type(layer.dt_proj) is nn.Linear and torch.equal(layer.dt_proj.weight, weight)
    assert type(layer.x_proj) is NF4Linear and torch.isfinite(logits(model)).all()


class Reads(Reader):
    """Asks the weights of all its layers what an NF4 weight knows, and one of them for its values."""

    def forward(self, input_ids):
        x = self.embed(input_ids).to(self.called.weight.dtype)
        assert self.expert.weight.shape == (8, 8) and self.expert.weight.device == x.device
        return self.expert(self.called(self.read(x) + self.read.weight.sum()))


def test_only_a_weight_whose_values_are_read_stays_dense():
    assert layers_read(Reads()) == {"read"} and bypassed_layers(Reads()) == {}


def by_lambda(module):
    inner = module.forward
    module.forward = lambda x: inner(x)


def by_decorator(module):
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    module.forward = forward


def by_method(module):
    inner = module.forward
    module.forward = MethodType(lambda self, x: inner(x), module)


@pytest.mark.parametrize("replace", [by_lambda, by_decorator, by_method])
@pytest.mark.parametrize("where", ["", "0"])
def test_a_forward_made_of_the_models_own_is_not_run(replace, where):
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)), nn.Linear(8, 8))
    model[0][0].running_mean.fill_(5.0)
    model[0][0].register_forward_hook(lambda *_: pytest.fail("it ran"))
    replace(model.get_submodule(where))
    inject(model, LoRAConfig(r=2))
    assert (model[0][0].running_mean == 5).all() and isinstance(model[1], FusedLoRALinear)


def test_a_method_put_on_the_object_is_run_in_the_copy():
    model = Reader()
    model.forward = MethodType(lambda self, input_ids: self.embed(input_ids) @ self.called.weight, model)
    assert bypassed_layers(model) == {"called": NEVER_CALLED}


@pytest.mark.parametrize("lazy", [nn.LazyLinear, lambda size: nn.LazyConv1d(size, 1)])
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_layers_do_not_stop_all_linear(lazy):
    model = nn.Sequential(nn.Linear(8, 8), lazy(8))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "1: no LoRA adapter")
        inject(model, LoRAConfig(r=2))
    assert isinstance(model[0], FusedLoRALinear) and not isinstance(model[1], FusedLoRALinear)


class Asks(Reader):
    """Asks a layer that it doesn't call what kind of weight it has."""

    def forward(self, input_ids):
        weight = self.expert.weight
        x = self.called(self.embed(input_ids).to(weight.device, weight.dtype))
        return self.read(x) if weight.size(0) == 8 and weight.shape[1] == 8 and weight.requires_grad else x


def test_asking_a_weight_for_its_dtype_or_size_is_no_use_of_it():
    assert bypassed_layers(Asks()) == {}
    model = Asks()
    inject(model, LoRAConfig(r=2, target_modules=["expert"]))
    assert isinstance(model.expert, FusedLoRALinear)


class Applies(nn.Module):
    """Reads the weight of `read`."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def apply(self, x):
        return self.called(nn.functional.linear(x, self.read.weight))


class Defaulted(Applies):
    def forward(self, x=None):
        return self.apply(x)


class KeywordOnly(Applies):
    def forward(self, *, x, y=None):
        return self.apply(x)


class DefaultedKeyword(Applies):
    def forward(self, *, x=None):
        return self.apply(x)


class Variadic(Applies):
    def forward(self, *args):
        return self.apply(args[0])


class Batch(Applies):
    def forward(self, batch):
        return self.apply(batch["x"] + batch["y"])


class MainInput(Applies):
    main_input_name = "features"

    def forward(self, mask=None, features=None):
        return self.apply(features)


class Image(Applies):
    config = SimpleNamespace(image_size=(8, 16), num_channels=2)

    def forward(self, pixel_values=None):
        _batch, channels, height, width = pixel_values.shape
        assert (channels, height, width) == (2, 8, 16)
        return self.apply(pixel_values.mT)


class TextAndImage(Image):
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=8))

    def forward(self, input_ids=None, pixel_values=None):
        assert pixel_values.shape == (1, 3, 8, 8) and input_ids.dtype == torch.long
        return self.apply(pixel_values)


@pytest.mark.parametrize(
    "kind", [Defaulted, KeywordOnly, DefaultedKeyword, Variadic, Batch, MainInput, Image, TextAndImage]
)
def test_the_dry_forward_finds_the_arguments_of_many_kinds_of_models(kind):
    assert bypassed_layers(kind()) == {"read": NEVER_CALLED} and layers_read(kind()) == {"read"}
