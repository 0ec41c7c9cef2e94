"""PEFT's models after `fuse_peft`, against the same models before it."""

import copy
import pickle
import socket
from contextlib import nullcontext

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from tiny_models import in_backward, logits, perturb, tiny_batch, tiny_model
from torch import distributed as dist
from torch import nn

from lora_kernels import fuse_peft, unfuse_peft
from lora_kernels.integrations import peft as ours
from lora_kernels.nn.lora_linear import ProjectionGroup
from lora_kernels.ops import lora_linear as op

TARGETS = {"llama": "all-linear", "qwen2": "all-linear", "gpt2": ["c_attn", "c_fc", "c_proj"]}
LAYERS = {"llama": 14, "qwen2": 14, "gpt2": 8}


def lora(kind="llama", **arguments):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind], **arguments})


def adalora(kind="llama", **arguments):
    return peft.AdaLoraConfig(target_modules=TARGETS[kind], init_r=4, target_r=2, total_step=10, **arguments)


def pair(config, kind="llama", **fusing):
    """The same model with a trained adapter, as PEFT made it and fused, in training mode."""
    torch.manual_seed(1)
    plain = peft.get_peft_model(tiny_model(kind), config).train()
    perturb(plain, 0.1)
    fused = copy.deepcopy(plain)
    report = fuse_peft(fused, **fusing)
    assert len(report.fused) == LAYERS[kind] and not report.left
    return plain, fused


def loss_and_grads(model, **more):
    torch.manual_seed(2)
    model.zero_grad()
    loss = model(input_ids=tiny_batch(), labels=tiny_batch(), **more).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(plain, fused, **tolerance):
    (loss, grads), (fused_loss, fused_grads) = loss_and_grads(plain), loss_and_grads(fused)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    assert fused_grads.keys() == grads.keys() and grads
    for name, grad in grads.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(fused_grads[name], grad, rtol=0, atol=1e-4 * scale + 1e-8, msg=name)


def assert_as_exact(fused, plain, exact):
    """The gradients of 16 bits, as one vector: how far it is off is for single tensors a matter of luck."""
    assert {name: grad.dtype for name, grad in fused.items()} == {name: grad.dtype for name, grad in plain.items()}
    vectors = [torch.cat([(grads[n].double() / exact[n].norm()).flatten() for n in exact]) for grads in (fused, plain)]
    vectors.append(torch.cat([(grad.double() / grad.norm()).flatten() for grad in exact.values()]))
    errors = [(vector - vectors[2]).norm() for vector in vectors[:2]]
    assert errors[0] <= 2 * errors[1], errors


def assert_same_logits(fused, plain):
    torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-4, atol=1e-5)


@pytest.fixture
def taken(monkeypatch):
    """The layers that our op has computed, one entry a call."""
    count, one_pass = [], op._one_pass

    def counting(x, layers, dropout):
        count.extend(layers)
        return one_pass(x, layers, dropout)

    monkeypatch.setattr(op, "_one_pass", counting)
    return count


CONFIGS = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 1}),
    "some layers": lora(target_modules=["q_proj", "v_proj", "down_proj"]),
    "bias": lora("qwen2", lora_bias=True),
    "trained biases": lora("qwen2", bias="all"),
    "conv1d": lora("gpt2", fan_in_fan_out=True),
    "conv1d, dora": lora("gpt2", fan_in_fan_out=True, use_dora=True),
    "conv1d, bias": lora("gpt2", fan_in_fan_out=True, lora_bias=True),
    "mica": lora(init_lora_weights="mica"),
    "adalora": adalora(),
    "conv1d, adalora": adalora("gpt2", fan_in_fan_out=True),
}


def kind_of(name):
    return "qwen2" if name in ("bias", "trained biases") else "gpt2" if name.startswith("conv1d") else "llama"


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_pefts(name, decoder, taken):
    kind = kind_of(name)
    torch.manual_seed(1)
    plain = peft.get_peft_model(tiny_model(kind), CONFIGS[name]).train()
    perturb(plain, 0.1)
    fused = copy.deepcopy(plain)
    report = fuse_peft(fused, strict=True, decoder=decoder)
    layers = sum(isinstance(module, LoraLayer) for module in plain.modules())
    assert len(report.fused) == layers and (report.decoder > 0) == decoder
    # Twice, since the second call takes what the first has prepared.
    for _ in range(2):
        taken.clear()
        assert_same_training(plain, fused)
        assert sum(layer.lora_a.shape[0] > 0 for layer in taken) == layers
    plain.eval(), fused.eval()
    assert_same_logits(fused, plain)


def test_only_the_classes_of_layers_change():
    plain = peft.get_peft_model(tiny_model("llama"), lora())
    before, state = dict(plain.named_parameters()), dict(plain.state_dict(keep_vars=True))
    attributes = {path: set(vars(module)) for path, module in plain.named_modules()}
    kinds = {path: type(module) for path, module in plain.named_modules()}
    report = fuse_peft(plain)
    assert str(report) == "14 LoRA layers fused"
    assert all(dict(plain.named_parameters())[name] is parameter for name, parameter in before.items())
    assert plain.state_dict(keep_vars=True).keys() == state.keys()
    for path, module in plain.named_modules():
        assert isinstance(module, kinds[path]) and type(module).__name__ == kinds[path].__name__
    # Twice does no harm.
    assert fuse_peft(plain) == report
    loss_and_grads(plain)
    unfuse_peft(plain)
    assert {path: type(module) for path, module in plain.named_modules()} == kinds
    assert {path: set(vars(module)) for path, module in plain.named_modules()} == attributes


def test_the_decoder_is_unfused_too():
    plain, fused = pair(lora(), decoder=True)
    attributes = {path: set(vars(module)) for path, module in plain.named_modules()}
    unfuse_peft(fused)
    assert {path: set(vars(module)) for path, module in fused.named_modules()} == attributes
    assert loss_and_grads(fused)[0] == loss_and_grads(plain)[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused(copied, taken):
    plain, fused = pair(lora(), decoder=True)
    loss_and_grads(fused)
    again = copied(fused)
    taken.clear()
    assert_same_training(plain, again)
    assert len(taken) == 14
    # Nothing is shared with what the first one keeps.
    perturb(again)
    assert_same_training(plain, fused)


def test_files_are_pefts(tmp_path):
    plain, fused = pair(lora(use_dora=True))
    fused.save_pretrained(tmp_path)
    assert_same_logits(peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval(), plain.eval())
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    fuse_peft(loaded, strict=True)
    assert_same_logits(loaded, plain)
    states = [peft.get_peft_model_state_dict(model) for model in (plain, fused)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("name", ["plain", "dora", "conv1d", "conv1d, bias", "adalora"])
def test_merging_and_disabling(name):
    kind = kind_of(name)
    plain, fused = pair(CONFIGS[name], kind)
    plain.eval(), fused.eval()
    wanted, base = logits(plain), logits(tiny_model(kind))
    with fused.disable_adapter():
        torch.testing.assert_close(logits(fused), base, rtol=0, atol=0)
    fused.merge_adapter()
    torch.testing.assert_close(logits(fused), wanted, rtol=1e-4, atol=1e-5)
    # PEFT unmerges what is disabled.
    with fused.disable_adapter():
        torch.testing.assert_close(logits(fused), base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(fused), wanted, rtol=1e-4, atol=1e-5)
    fused.merge_adapter(safe_merge=True)
    fused.unmerge_adapter()
    torch.testing.assert_close(logits(fused), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(fused.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)


def test_several_adapters(taken):
    models = pair(lora())
    for model in models:
        torch.manual_seed(3)
        model.add_adapter("other", lora(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "lm_head"]))
        model.add_adapter("third", lora(r=2, use_rslora=True))
        for name in ("other", "third"):
            model.set_adapter(name)
            perturb(model, 0.1)
    plain, fused = models
    # The head got its first adapter after the others were fused.
    assert len(fuse_peft(fused).fused) == 15
    for active in ("default", "other", ["default", "other"], ["third", "default"]):
        for model in models:
            model.base_model.set_adapter(active)
        taken.clear()
        assert_same_training(plain, fused)
        assert len(taken) == {"default": 14, "other": 5}.get(
            active if isinstance(active, str) else "", 15 - 1 * (active[0] == "third")
        )
    for model in models:
        model.add_weighted_adapter(["default", "third"], [0.7, 0.2], "sum", combination_type="cat")
        model.set_adapter("sum")
    assert_same_training(plain, fused)
    for model in models:
        model.set_adapter("third")
        model.delete_adapter("default")
    assert_same_training(plain, fused)


def test_adapters_of_different_dropouts_go_to_peft_together(taken):
    model = peft.get_peft_model(tiny_model("llama"), lora(lora_dropout=0.1))
    model.add_adapter("other", lora(lora_dropout=0.2))
    model.base_model.set_adapter(["default", "other"])
    model.train()
    report = fuse_peft(model)
    assert len(report.fused) == 14 and set(report.left.values()) == {
        "adapters default, other are active together, with different dropouts"
    }
    loss_and_grads(model)
    assert not taken
    # In evaluation there is none.
    logits(model.eval())
    assert len(taken) == 14


@pytest.mark.parametrize("gradients", [False, True])
def test_batches_of_mixed_adapters(gradients, taken):
    models = pair(lora())
    for model in models:
        torch.manual_seed(3)
        model.add_adapter("other", lora(r=3, target_modules=["q_proj", "down_proj"]))
        model.set_adapter("other")
        perturb(model, 0.1)
        model.eval()
    names = ["other", "__base__", "default", "other"]
    ids = tiny_batch().repeat(2, 1)
    with torch.set_grad_enabled(gradients):
        plain, fused = (model(input_ids=ids, adapter_names=names).logits for model in models)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    assert len(taken) == 14 + 4
    with pytest.raises(ValueError, match="same as the number of inputs"):
        models[1](input_ids=ids, adapter_names=names[:3])


def test_hotswap(tmp_path):
    other = peft.get_peft_model(tiny_model("llama"), lora())
    perturb(other, 0.3)
    other.save_pretrained(tmp_path)
    _, fused = pair(lora())
    loss_and_grads(fused)
    hotswap_adapter(fused, tmp_path, "default")
    assert_same_logits(fused.eval(), other.eval())


def test_scales_and_weights_that_change_are_seen():
    plain, fused = pair(lora())
    for change in (
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.lora_A["default"].weight.data.mul_(2),
        lambda layer: setattr(layer.lora_B["default"], "weight", nn.Parameter(layer.lora_B["default"].weight * 2)),
        lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight * 0.5)),
        lambda layer: layer.lora_A["default"].weight.__setattr__("data", layer.lora_A["default"].weight.data * 0.3),
        lambda layer: layer.scaling.update(default=torch.tensor(0.4)),
    ):
        for model in (plain, fused):
            change(model.base_model.model.model.layers[0].mlp.up_proj)
        assert_same_training(plain, fused)


@pytest.mark.parametrize("part", ["layer", "base_layer", "lora_A", "lora_dropout"])
def test_hooks_are_called(part):
    plain, fused = pair(lora())
    loss_and_grads(fused)
    results = []
    for model in (plain, fused):
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        module = {"layer": layer}.get(part) or getattr(layer, part)
        module = module["default"] if isinstance(module, nn.ModuleDict) else module
        handle = module.register_forward_hook(lambda module, args, y: 2 * y)
        results.append(loss_and_grads(model))
        handle.remove()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert_same_training(plain, fused)


def test_what_is_left_to_peft(taken):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = nn.Embedding(7, 8), nn.Conv1d(8, 8, 1)
            self.linear, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, ids):
            return self.other(self.linear(self.conv(self.embed(ids).mT).mT.contiguous()))

    torch.manual_seed(1)
    config = lora(target_modules=["embed", "conv", "linear", "other"], init_lora_weights=False)
    plain = peft.get_peft_model(Net(), config)
    plain.base_model.model.other.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    plain.add_adapter("alora", lora(target_modules=["linear"], alora_invocation_tokens=[3]))
    fused = copy.deepcopy(plain)
    with pytest.raises(ValueError, match=r"strict is True, and model has layers that can't be fused\n[\s\S]*Embedding"):
        fuse_peft(fused, strict=True)
    assert not [module for module in fused.modules() if isinstance(module, ours.AdaptedLayer)]
    report = fuse_peft(fused)
    assert report.fused == ["base_model.model.linear"]
    assert report.left == {
        "base_model.model.embed": "lora.layer.Embedding is none of the layers that we know",
        "base_model.model.conv": "lora.layer.Conv1d is none of the layers that we know",
        "base_model.model.other": "its base layer has hooks",
        "base_model.model.linear": "adapter alora: ALoraLinearVariant computes something else than LoRA",
    }
    assert str(report).splitlines()[0] == "1 LoRA layers fused"
    assert "PEFT's own forward for base_model.model.conv: lora.layer.Conv1d is none" in str(report)
    ids = torch.arange(6).view(2, 3)
    torch.testing.assert_close(fused(ids), plain(ids))
    assert len(taken) == 1
    for model in (plain, fused):
        model.set_adapter("alora")
    assert torch.equal(fused(ids), plain(ids)) and len(taken) == 1


def test_models_without_loras_layers_are_refused():
    with pytest.raises(ValueError, match="model .LlamaForCausalLM. has no LoRA layer of PEFT"):
        fuse_peft(tiny_model("llama"))
    with pytest.raises(ValueError, match="has no LoRA layer"):
        fuse_peft(peft.get_peft_model(tiny_model("llama"), peft.LoHaConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_bfloat16(adapters):
    plain, fused = pair(lora())
    exact = copy.deepcopy(plain)
    for model in (plain, fused):
        model.to(torch.bfloat16)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapters)
    wanted, found, fused_found = map(loss_and_grads, (exact, plain, fused))
    assert fused_found[0].dtype == found[0].dtype
    assert_as_exact(fused_found[1], found[1], wanted[1])


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base, taken):
    plain, fused = pair(lora())
    exact = copy.deepcopy(plain)
    for model in (plain, fused):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(base)
    wanted, results = loss_and_grads(exact), []
    for model in (plain, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(loss_and_grads(model))
    assert len(taken) == 14
    assert_as_exact(results[1][1], results[0][1], wanted[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("decoder", [False, True])
def test_checkpointing_replays_dropout(reentrant, decoder):
    _, fused = pair(lora(lora_dropout=0.3), decoder=decoder)
    wanted = loss_and_grads(fused)
    assert wanted[0] == loss_and_grads(fused)[0]
    fused.enable_input_require_grads()
    fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ran = []
    handle = fused.base_model.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: ran.append(in_backward()))
    found = loss_and_grads(fused)
    handle.remove()
    assert ran == [False, True]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_keeps_as_many_elements(use_dora):
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), lora(target_modules=["0"], lora_dropout=0.3, r=64))
    fuse_peft(layer)
    linear = layer.base_model.model[0]
    with torch.no_grad():
        linear.base_layer.weight.zero_(), linear.base_layer.bias.zero_()
        linear.lora_A["default"].weight.copy_(torch.eye(64)), linear.lora_B["default"].weight.copy_(torch.eye(64))
        linear.scaling["default"] = 1.0
    x = torch.ones(4096, 64)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), y) and not torch.equal(layer(x), y)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7), rtol=1e-4, atol=0)
    # Three standard deviations.
    assert abs(kept.float().mean().item() - 0.7) < 3 * (0.3 * 0.7 / kept.numel()) ** 0.5
    assert torch.equal(layer.eval()(x), x)


def test_groups_share_one_call(monkeypatch, taken):
    _, fused = pair(lora(lora_dropout=0.1), decoder=True)
    calls, call = [], ProjectionGroup.__call__
    monkeypatch.setattr(ProjectionGroup, "__call__", lambda self, layer, x: calls.append(layer) or call(self, layer, x))
    passes, project = [], op.project
    monkeypatch.setattr(
        "lora_kernels.nn.lora_linear.project", lambda *args: passes.append(len(args[1])) or project(*args)
    )
    for _ in range(2):
        calls.clear(), passes.clear()
        loss_and_grads(fused)
        assert len(calls) == 2 * 5
    assert passes == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("how", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_compiled(how):
    torch.manual_seed(1)
    config = lora(target_modules=["0", "2"], init_lora_weights=False, **how)
    plain = peft.get_peft_model(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)), config)
    fused, x = copy.deepcopy(plain), torch.randn(5, 8)
    fuse_peft(fused, strict=True)
    results = []
    for model in (plain, torch.compile(fused, backend="aot_eager", fullgraph=True), fused):
        y = model(x)
        gradients = torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])
        results.append((y, *gradients))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-4, atol=1e-5)


def test_data_parallel():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        plain, fused = pair(lora())
        loss, grads = loss_and_grads(plain)
        found, found_grads = loss_and_grads(nn.parallel.DistributedDataParallel(fused))
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(list(found_grads.values()), list(grads.values()), rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("gradients", [nullcontext, torch.no_grad, torch.inference_mode])
def test_generation(gradients):
    plain, fused = pair(lora(), decoder=True)
    with gradients():
        texts = [
            model.eval().generate(input_ids=tiny_batch(), max_new_tokens=5, do_sample=False) for model in (plain, fused)
        ]
    assert torch.equal(*texts)
    # What was prepared without gradients serves with them.
    assert_same_training(plain.train(), fused.train())


def test_active_adapters_as_a_tuple():
    torch.manual_seed(1)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(r=2, target_modules=["0"]))
    fuse_peft(model)
    x = torch.randn(3, 8)
    want = model(x)
    model.base_model.set_adapter(("default",))
    torch.testing.assert_close(model(x), want)


def test_the_norm_of_a_weight_that_peft_has_merged_into_is_made_anew():
    torch.manual_seed(1)
    how = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(**how, use_dora=True))
    model.add_adapter("plain", peft.LoraConfig(**how))
    plain = copy.deepcopy(model)
    fuse_peft(model)
    x = torch.randn(3, 8)
    for each in (model, plain):
        each(x)
        layer = each.base_model.model[0]
        layer.merge(adapter_names=["plain"])
        layer.merged_adapters.remove("plain")
    torch.testing.assert_close(model(x), plain(x))


def test_a_model_within_a_wrapper_is_fused():
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    wrapped = torch.compile(model, backend="eager")
    assert len(fuse_peft(wrapped, decoder=True).fused) == 14
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj, ours.Linear)
    unfuse_peft(wrapped)
    assert not isinstance(model.base_model.model.model.layers[0].mlp.up_proj, ours.Linear)
