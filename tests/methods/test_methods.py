import copy
import re

import pytest
import torch
from tiny_models import logits, perturb, tiny_batch, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels import AdaLoRAConfig, FullConfig, PrefixConfig, PromptConfig
from lora_kernels.methods.lora import (
    LoRAConfig,
    adapters_disabled,
    inject,
    lora_modules,
    merge,
    trainable_summary,
)

ATTENTION = {f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkvo"}
MLP = {f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up", "down")}


def adapted(model):
    return {name for name, _ in lora_modules(model)}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llama_classifier"])
def test_all_linear_leaves_out_the_heads_and_starts_at_the_base_model(kind):
    model = tiny_model(kind)
    want = logits(model)
    heads = {"lm_head", "score"}
    linears = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    assert linears & heads
    assert inject(model, LoRAConfig(r=4)) is model
    assert adapted(model) == linears - heads
    torch.testing.assert_close(logits(model), want)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    # A classifier's head is trained in full.
    in_full = {"score.weight"} if kind == "llama_classifier" else set()
    assert trainable == {f"{n}.lora_{ab}" for n in linears - heads for ab in "ab"} | in_full


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["q_proj", "v_proj"], {n for n in ATTENTION if n.endswith(("q_proj", "v_proj"))}),
        (["layers.1.self_attn.q_proj", "lm_head"], {"model.layers.1.self_attn.q_proj", "lm_head"}),
        (r".*\.(self_attn|mlp)\..*_proj", ATTENTION | MLP),
        (r"model\.layers\.0\..*\.up_proj", {"model.layers.0.mlp.up_proj"}),
    ],
)
def test_targets(targets, expected):
    assert adapted(inject(tiny_model("llama"), LoRAConfig(r=2, target_modules=targets))) == expected


def test_a_suffix_starts_at_a_dot_and_a_regex_matches_the_whole_path():
    model = tiny_model("llama")
    for targets in (["proj"], r"self_attn", r"model\.layers"):
        with pytest.raises(ValueError, match="target_modules"):
            inject(model, LoRAConfig(target_modules=targets))


def test_exclude_modules():
    assert adapted(inject(tiny_model("llama"), LoRAConfig(exclude_modules=["self_attn.q_proj", "mlp.up_proj"]))) == {
        n for n in ATTENTION | MLP if not n.endswith(("q_proj", "up_proj"))
    }
    assert adapted(inject(tiny_model("llama"), LoRAConfig(exclude_modules=r".*\.mlp\..*"))) == ATTENTION


def test_rank_and_alpha_patterns():
    config = LoRAConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={r"layers\.1\..*q_proj": 9, "q_proj": 2},
        alpha_pattern={"self_attn.v_proj": 5.0},
        target_modules=["q_proj", "v_proj"],
    )
    layers = dict(lora_modules(inject(tiny_model("llama"), config)))
    assert [layers[f"model.layers.{i}.self_attn.q_proj"].r for i in (0, 1)] == [2, 9]
    assert layers["model.layers.1.self_attn.q_proj"].scaling == 8 / 3
    v_proj = layers["model.layers.0.self_attn.v_proj"]
    assert (v_proj.r, v_proj.scaling) == (4, 5.0 / 2)


def test_dropout_reaches_the_layers_and_follows_the_models_mode():
    model = inject(tiny_model("llama"), LoRAConfig(lora_dropout=0.5, init="both_gaussian"))
    assert not any(layer.training for _, layer in lora_modules(model))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    "config, words",
    [
        ({"target_modules": ["q_porj"]}, ["q_porj", "'q_proj'", "model.layers.*.self_attn.q_proj"]),
        ({"exclude_modules": ["q_porj"]}, ["exclude_modules", "'q_proj'"]),
        ({"modules_to_save": ["lm_haed"]}, ["modules_to_save", "'lm_head'"]),
        ({"target_modules": ["mlp"]}, ["model.layers.0.mlp", "LlamaMLP"]),
        ({"target_modules": ["embed_tokens"]}, ["model.embed_tokens", "Embedding"]),
        ({"target_modules": r"nothing"}, ["nothing", "model.layers.*.mlp.up_proj"]),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, ["no module for an adapter"]),
        ({"rank_pattern": {"q_porj": 2}}, ["rank_pattern", "q_porj"]),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, ["alpha_pattern", "v_proj"]),
        ({"modules_to_save": ["layers"]}, ["modules_to_save", "ModuleList"]),
        ({"modules_to_save": ["layers.0.mlp.act_fn"]}, ["modules_to_save", "act_fn"]),
        ({"modules_to_save": ["layers.0.mlp", "up_proj"]}, ["modules_to_save", "contains"]),
    ],
)
def test_a_refused_config_changes_nothing(config, words):
    model = tiny_model("llama")
    before, kinds = state(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)):
        inject(model, LoRAConfig(**config))
    assert_same_state(model, before)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "adapter_config")


def test_injecting_twice_is_refused():
    model = inject(tiny_model("llama"), LoRAConfig())
    with pytest.raises(ValueError, match="already carries"):
        inject(model, LoRAConfig())
    inject(merge(model), LoRAConfig())


@pytest.mark.parametrize(
    "name, value",
    [
        ("r", 0),
        ("lora_alpha", -1),
        ("lora_dropout", 1),
        ("init", "olora"),
        ("target_modules", []),
        ("target_modules", "q_proj["),
        ("target_modules", ["q_proj", 3]),
        ("exclude_modules", [""]),
        ("modules_to_save", "lm_head"),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"(": 4}),
    ],
)
def test_config_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        LoRAConfig(**{name: value})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("modules_to_save", [(), ("lm_head",)])
def test_disabled_adapters_give_the_base_logits_exactly(kind, modules_to_save):
    model = tiny_model(kind)
    base = logits(model)
    inject(model, LoRAConfig(r=3, init="both_gaussian", modules_to_save=modules_to_save))
    perturb(model)
    trained = logits(model)
    assert (trained - base).abs().max() > 0.05
    with adapters_disabled(model):
        assert torch.equal(logits(model), base)
        with adapters_disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), trained)
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert torch.equal(logits(model), trained)


def test_modules_to_save_are_trained_on_a_copy():
    model = tiny_model("llama_classifier")
    score = model.score
    inject(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    assert type(model.score) is nn.Linear and model.score is not score
    assert model.score.weight.requires_grad and not score.weight.requires_grad
    before = score.weight.clone()
    model(input_ids=tiny_batch()).logits.sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert torch.equal(score.weight, before) and not torch.equal(model.score.weight, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merge_gives_a_plain_model_with_the_same_logits(kind, tmp_path):
    model = tiny_model(kind, tied=True)
    kinds = {name: type(module) for name, module in model.named_modules()}
    base = logits(model)
    inject(model, LoRAConfig(r=4, init="both_gaussian"))
    perturb(model, 0.05)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    want = logits(model)
    assert merge(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not hasattr(model, "adapter_config") and not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert (want - base).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model)


def test_merge_leaves_the_model_alone_if_one_layer_overflows():
    model = inject(tiny_model("llama").half(), LoRAConfig(init="both_gaussian"))
    layers = list(lora_modules(model))
    nn.init.constant_(layers[-1][1].lora_a, 1e6)
    before = state(model)
    with pytest.raises(ValueError, match=layers[-1][0]):
        merge(model)
    assert_same_state(model, before)


@pytest.mark.parametrize("how", ["modules_to_save", "adapter"])
def test_a_trained_head_of_a_tied_model_survives_save_pretrained(how, tmp_path):
    model = tiny_model("llama", tied=True)
    embedding = model.model.embed_tokens.weight.clone()
    if how == "modules_to_save":
        with pytest.warns(UserWarning, match="no longer the same weight"):
            inject(model, LoRAConfig(modules_to_save=["lm_head"]))
    else:
        inject(model, LoRAConfig(target_modules=["q_proj", "lm_head"]))
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    perturb(model, 0.05)
    want = logits(model)
    if how == "adapter":
        with pytest.warns(UserWarning, match="no longer the same weight"):
            merge(model)
    else:
        merge(model)
    model.tie_weights()
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_model_gets_float32_adapters_and_moves_to_another_dtype():
    model = inject(tiny_model("llama").bfloat16(), LoRAConfig(init="both_gaussian", modules_to_save=["lm_head"]))
    assert {layer.lora_a.dtype for _, layer in lora_modules(model)} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    with adapters_disabled(model.float()):
        assert logits(model).dtype == torch.float32


def test_a_deep_copy_is_independent():
    model = inject(tiny_model("llama"), LoRAConfig(init="both_gaussian", modules_to_save=["lm_head"]))
    base_logits = logits(tiny_model("llama"))
    want = logits(model)
    other = copy.deepcopy(model)
    perturb(other)
    assert torch.equal(logits(model), want)
    with adapters_disabled(other):
        assert torch.equal(logits(other), base_logits)
        assert torch.equal(logits(model), want)


def test_summary_counts_tied_weights_once():
    model = tiny_model("llama", tied=True)
    total = sum(p.numel() for p in set(model.parameters()))
    inject(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    summary = trainable_summary(model)
    adapters = 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert (summary.trainable, summary.total, summary.adapted_modules) == (adapters, total + adapters, 4)
    assert f"{adapters:,} of" in str(summary) and "4 modules" in str(summary)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=2),
        AdaLoRAConfig(init_r=4, target_r=2),
        FullConfig(),
        PrefixConfig(num_virtual_tokens=2),
        PromptConfig(num_virtual_tokens=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_what_has_no_values_is_not_saved(config, tmp_path):
    model = lora_kernels.inject(tiny_model("llama"), config).to("meta")
    with pytest.raises(ValueError, match="on meta, has no memory"):
        lora_kernels.save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.rglob("*.*"))
