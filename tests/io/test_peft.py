import json
import os
import random

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft_cases import assert_same_logits, load_with_peft, peft_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import logits, perturb, tiny_model
from torch import nn
from transformers import PretrainedConfig

from lora_kernels.io.peft import load_adapter, save_adapter, task_type
from lora_kernels.methods.lora import LoRAConfig, adapters_disabled, inject, lora_modules, merge

KINDS = ["llama", "gpt2", "qwen2"]
ATTENTION = {"llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def our_adapter(kind, directory, tied=False, std=0.1, **arguments):
    model = inject(tiny_model(kind, tied), LoRAConfig(**arguments))
    perturb(model, std)
    save_adapter(model, directory)
    want = logits(model)
    assert (want - logits(tiny_model(kind, tied))).abs().max() > 1e-3
    return want


CONFIGS = {
    "all_linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.5},
    "list_rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "regex": {"r": 4, "lora_alpha": 4, "target_modules": r".*\.(0|1)\..*(o_proj|c_fc|up_proj)"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {r".*\.0\..*(q_proj|c_attn)": 7, "q_proj|mlp.c_proj": 2},
        "alpha_pattern": {"up_proj|c_attn": 3, r"layers\.0\..*down_proj|c_fc": 6.5},
    },
    "excluded": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    "lm_head": {"r": 2, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
}


def arguments_for(kind, name):
    return {"target_modules": ATTENTION[kind]} | CONFIGS[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_what_we_save(kind, name, tmp_path):
    want = our_adapter(kind, tmp_path, **arguments_for(kind, name))
    model = load_with_peft(tiny_model(kind), tmp_path)
    assert_same_logits(logits(model), want)
    ours = inject(tiny_model(kind), LoRAConfig(**arguments_for(kind, name)))
    theirs = {n for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert theirs == {n for n, _ in lora_modules(ours)}
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)} == {
        layer.scaling for _, layer in lora_modules(ours)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_what_peft_saves(kind, name, tmp_path):
    want = peft_adapter(kind, tmp_path, **arguments_for(kind, name))
    model = load_adapter(tiny_model(kind), tmp_path)
    assert_same_logits(logits(model), want)
    # Saved again, and merged, it is still the same adapter.
    save_adapter(model, tmp_path / "again")
    assert_same_logits(logits(load_with_peft(tiny_model(kind), tmp_path / "again")), want)
    torch.testing.assert_close(logits(merge(model)), want, rtol=1e-5, atol=3e-5)


class Nested(nn.Module):
    """Paths of which one ends in another, as "fc" and "block.fc"."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.fc, self.proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8), "fc_2": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x):
        x = self.block["proj"](self.block["fc"](self.proj(self.fc(x))))
        for layer in self.layers:
            x = layer["fc_2"](layer["fc"](x))
        return x


PATTERNS = [
    *("fc", "proj", "block.fc", "^fc", "fc|proj", "fc.*", ".*", "1.fc"),
    *(r"layers\.1\..*", r".*\.fc", r"layers\.\d+\.fc_2"),
]


def scalings(model):
    if isinstance(model, peft.PeftModel):
        layers = [item for item in model.base_model.model.named_modules() if isinstance(item[1], LoraLayer)]
        return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers}
    return {name: (layer.r, layer.scaling) for name, layer in lora_modules(model)}


@pytest.mark.parametrize("seed", range(25))
def test_the_first_pattern_that_matches_counts_in_the_file_too(seed, tmp_path):
    draw = random.Random(seed)

    def patterns(values):
        return {pattern: draw.choice(values) for pattern in draw.sample(PATTERNS, draw.randint(1, 5))}

    arguments = {"r": 3, "lora_alpha": 6, "use_rslora": seed % 5 == 0, "target_modules": r".*(fc|proj|fc_2)"}
    arguments |= {"rank_pattern": patterns([1, 2, 4, 5]), "alpha_pattern": patterns([1, 8, 0.5, 20])}
    model = inject(Nested(), LoRAConfig(**arguments))
    perturb(model, 0.05)
    save_adapter(model, tmp_path)
    assert scalings(model) == scalings(peft.get_peft_model(Nested(), peft.LoraConfig(**arguments)))
    theirs, ours = load_with_peft(Nested(), tmp_path), load_adapter(Nested(), tmp_path)
    assert scalings(theirs) == scalings(ours) == scalings(model)
    save_adapter(ours, tmp_path / "again")
    assert scalings(load_adapter(model, tmp_path / "again")) == scalings(ours)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_is_saved", [True, False])
def test_sequence_classification_both_ways(head_is_saved, tmp_path):
    arguments = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["score"] if head_is_saved else []}
    want = our_adapter("llama_classifier", tmp_path / "ours", **arguments)
    assert_same_logits(logits(load_with_peft(tiny_model("llama_classifier"), tmp_path / "ours")), want)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["task_type"] == ("SEQ_CLS" if head_is_saved else None)

    want = peft_adapter("llama_classifier", tmp_path / "theirs", task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    assert "base_model.model.score.weight" in load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    model = load_adapter(tiny_model("llama_classifier"), tmp_path / "theirs")
    assert_same_logits(logits(model), want)
    assert list(model.lora_originals) == ["score"]


def test_a_tied_models_trained_embeddings_both_ways(tmp_path):
    arguments = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    with pytest.warns(UserWarning, match="no longer the same weight"):
        want = our_adapter("llama", tmp_path, tied=True, **arguments)
    assert_same_logits(logits(load_with_peft(tiny_model("llama", tied=True), tmp_path)), want)
    with pytest.warns(UserWarning, match="no longer the same weight"):
        model = load_adapter(tiny_model("llama", tied=True), tmp_path)
    assert_same_logits(logits(model), want)


def test_the_files_are_pefts(tmp_path):
    """Against what PEFT itself writes for the same adapter."""
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    peft_adapter("llama", tmp_path / "theirs", task_type="CAUSAL_LM", **config)
    our_adapter("llama", tmp_path / "ours", **config)
    shapes, metadata = [], []
    for side in ("theirs", "ours"):
        with safe_open(tmp_path / side / "adapter_model.safetensors", "pt") as file:
            shapes.append({k: (file.get_slice(k).get_shape(), file.get_slice(k).get_dtype()) for k in file.keys()})  # noqa: SIM118
            metadata.append(file.metadata())
    assert shapes[0] == shapes[1] and metadata[0] == metadata[1]
    theirs, ours = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours"))
    assert sorted(theirs.pop("target_modules")) == ours["target_modules"] == ["q_proj", "v_proj"]
    assert ours.keys() <= theirs.keys() | {"target_modules"}
    for key in ours.keys() & theirs.keys() - {"base_model_name_or_path"}:
        assert ours[key] == theirs[key], key


def test_gpt2_says_fan_in_fan_out(tmp_path):
    our_adapter("gpt2", tmp_path, r=2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_target_names_are_exact_where_short_ones_would_take_too_much(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)
            self.block = torch.nn.Sequential()
            self.block.proj = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.proj(self.block.proj(x))

    torch.manual_seed(0)
    base, x = Model().eval(), torch.randn(3, 4)
    start = {k: v.clone() for k, v in base.state_dict().items()}
    model = inject(base, LoRAConfig(r=2, init="both_gaussian", target_modules=r"proj"))
    save_adapter(model, tmp_path)
    fresh = Model().eval()
    fresh.load_state_dict(start)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert_same_logits(loaded(x), model(x))
    assert type(loaded.base_model.model.block.proj) is torch.nn.Linear


def test_a_bfloat16_base_has_a_float32_adapter_file(tmp_path):
    model = inject(tiny_model("llama").bfloat16(), LoRAConfig(r=2, target_modules=["q_proj"], init="both_gaussian"))
    save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = load_adapter(tiny_model("llama").bfloat16(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    wholly = model.bfloat16()
    save_adapter(wholly, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    q_proj = dict(lora_modules(wholly))["model.layers.0.self_attn.q_proj"]
    assert torch.equal(tensors[f"{Q_PROJ}.lora_A.weight"], q_proj.lora_a.float())


def test_loading_into_an_injected_model(tmp_path):
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    want = our_adapter("llama", tmp_path, **config)
    model = inject(tiny_model("llama"), LoRAConfig(**config))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert load_adapter(model, tmp_path) is model
    assert_same_logits(logits(model), want)
    assert all(a is b for a, b in zip(parameters, (p for p in model.parameters() if p.requires_grad), strict=True))
    for other, match in (
        ({"lora_alpha": 5}, "q_proj: the file has scaling 2 "),
        ({"use_rslora": True}, "use_rslora"),
        ({"r": 4, "lora_alpha": 8}, "q_proj.lora_A.weight has shape"),
        ({"target_modules": ["q_proj", "v_proj"]}, "missing .*v_proj.lora_A.weight"),
        ({"modules_to_save": []}, "unexpected base_model.model.lm_head.weight"),
    ):
        with pytest.raises(ValueError, match=match):
            load_adapter(inject(tiny_model("llama"), LoRAConfig(**config | other)), tmp_path)
    next(lora_modules(model))[1].merge()
    with pytest.raises(ValueError, match="unmerge"):
        load_adapter(model, tmp_path)


def test_trainable_and_the_random_state(tmp_path):
    our_adapter("llama", tmp_path, r=2, modules_to_save=["lm_head"])
    model = tiny_model("llama")
    before = torch.get_rng_state()
    load_adapter(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_a",
        "lora_b",
        "weight",
    }
    frozen = load_adapter(tiny_model("llama"), tmp_path, trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_lists_of_pefts_may_name_what_the_model_lacks(tmp_path):
    names = ["q_proj", "c_attn", "query"]
    want = peft_adapter("llama", tmp_path, r=2, target_modules=names, rank_pattern={"c_attn": 3, "v_proj": 1})
    assert_same_logits(logits(load_adapter(tiny_model("llama"), tmp_path)), want)


def edit(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"layers_to_transform": 0}, "layers_to_transform is 0"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"something_new": {"x": 1}}, "something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 0}, "r is 0"),
        ({"r": 5}, r"q_proj.lora_A.weight has shape \[2, 32\], the model needs \[5, 32\]"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["q_porj"]}, "'q_proj'"),
        ({"target_modules": ["v_proj", "q_proj"]}, "missing .*v_proj.lora_A.weight"),
        ({"modules_to_save": ["lm_head"]}, "missing base_model.model.lm_head.weight"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, match, tmp_path):
    our_adapter("llama", tmp_path, r=2, target_modules=["q_proj"])
    edit(tmp_path, **changes)
    assert_refused(tmp_path, match, ValueError)


def assert_refused(directory, match, error):
    model = tiny_model("llama")
    before, kinds = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    with pytest.raises(error, match=match):
        load_adapter(model, directory)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "change", ["missing", "unexpected", "shape", "truncated", "pickle", "absent", "no config", "not json"]
)
def test_files_that_do_not_fit_are_refused(change, tmp_path):
    our_adapter("llama", tmp_path, r=2, target_modules=["q_proj"])
    path, key = tmp_path / "adapter_model.safetensors", f"{Q_PROJ}.lora_B.weight"
    tensors, error, match = load_file(path), ValueError, key
    if change == "missing":
        del tensors[key]
        match = f"missing {key}"
    elif change == "unexpected":
        tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
        match = "unexpected base_model.model.lm_head.weight"
    elif change == "shape":
        tensors[key] = tensors[key].T.contiguous()
    save_file(tensors, path)
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
        match = "adapter_model.safetensors"
    elif change == "pickle":
        path.rename(tmp_path / "adapter_model.bin")
        error, match = FileNotFoundError, "pickle"
    elif change == "absent":
        path.unlink()
        error, match = FileNotFoundError, "adapter_model.safetensors"
    elif change == "no config":
        (tmp_path / "adapter_config.json").unlink()
        error, match = FileNotFoundError, "adapter_config.json"
    elif change == "not json":
        (tmp_path / "adapter_config.json").write_text("{")
        match = "adapter_config.json"
    assert_refused(tmp_path, match, error)


def test_saving_replaces_whole_files(tmp_path, monkeypatch):
    our_adapter("llama", tmp_path, r=2, target_modules=["q_proj"])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors"}

    def no_space(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(OSError, match="no space"):
            our_adapter("llama", tmp_path, r=3, target_modules=["v_proj"])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_can_not_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no adapter_config"):
        save_adapter(tiny_model("llama"), tmp_path)
    model = inject(tiny_model("llama"), LoRAConfig(modules_to_save=["lm_head"]))
    with adapters_disabled(model), pytest.raises(RuntimeError, match="adapters_disabled"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*embedding layers found:UserWarning", "ignore:.*tied.*:UserWarning")
@pytest.mark.parametrize("targets, embeddings", [(["lm_head", "q_proj"], "auto"), (["q_proj"], True)])
def test_copies_of_the_base_that_peft_writes_are_passed_over(tmp_path, targets, embeddings):
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    path = tmp_path / "adapter_model.safetensors"
    extra = [key for key in load_file(path) if "lora_" not in key]
    assert extra
    ours = load_adapter(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs))
    tensors = load_file(path)
    tensors[extra[-1]] *= 2
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="other embeddings than the base model"):
        changed = load_adapter(tiny_model("llama"), tmp_path)
    assert (logits(changed) - logits(theirs)).abs().max() > 1e-2
    assert_same_logits(logits(changed), logits(load_with_peft(tiny_model("llama"), tmp_path)))
    tensors["base_model.model.model.norm.weight"] = tiny_model("llama").model.norm.weight + 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match="unexpected base_model.model.model.norm.weight"):
        load_adapter(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize("name", ["lm_head", "model.norm"])
def test_a_second_copy_without_the_first_is_refused(name, tmp_path):
    our_adapter("llama", tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    path = tmp_path / "adapter_model.safetensors"
    tensors, second = load_file(path), f"base_model.model.{name}.modules_to_save.weight"
    first = tensors.pop("base_model.model.lm_head.weight")
    tensors[second] = first if name == "lm_head" else torch.full((32,), 2.0)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"unexpected {second}"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_a_decoder_that_is_called_conditional_generation_is_a_causal_lm():
    class TinyForConditionalGeneration(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.config = PretrainedConfig(is_encoder_decoder=encoder)

        prepare_inputs_for_generation = None

        def forward(self, input_ids, inputs_embeds, labels, decoder_input_ids, decoder_inputs_embeds): ...

    assert task_type(TinyForConditionalGeneration(False), []) == "CAUSAL_LM"
    assert task_type(TinyForConditionalGeneration(False), ["score"]) == "SEQ_CLS"
    assert task_type(TinyForConditionalGeneration(True), []) == "SEQ_2_SEQ_LM"
