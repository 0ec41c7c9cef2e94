"""Models whose embeddings share a weight in other ways than Llama's: what is trained is used, and survives a reload."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from tiny_models import perturb
from torch import nn

from lora_kernels import AdaLoRAConfig, LoRAConfig, adapters_disabled, inject, load_adapter, merge, save_adapter

transformers.logging.set_verbosity_error()
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
T5 = {
    **{"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    "decoder_start_token_id": 0,
}
BART = {
    **{"vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
}
STACK = {
    **{"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
}
MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "umt5": lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)),
    "switch": lambda: transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**T5, num_experts=2, expert_capacity=64)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**BART)),
    "t5gemma": lambda: transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(encoder=STACK, decoder={**STACK, "cross_attention_hidden_size": 32}, vocab_size=60)
    ),
}
WITH_SHARED = [kind for kind in MODELS if kind != "t5gemma"]


def model_of(kind):
    torch.manual_seed(7)
    return MODELS[kind]().eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, decoder_input_ids=IDS).logits


def path_of(model, module):
    return next(name for name, other in model.named_modules() if other is module)


def paths_of(model, parameter):
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]


def flags(model):
    configs = [model.config, getattr(model.config, "encoder", None), getattr(model.config, "decoder", None)]
    return [getattr(config, "tie_word_embeddings", None) for config in configs]


def adapted(kind, how):
    model = model_of(kind)
    embeddings, head = path_of(model, model.get_input_embeddings()), path_of(model, model.get_output_embeddings())
    inner = r".*\.(v_proj|v)"
    config = {
        "inner layers": {"target_modules": inner},
        "adapter on the head": {"target_modules": [head]},
        "head": {"target_modules": inner, "modules_to_save": [head]},
        "embeddings": {"target_modules": inner, "modules_to_save": [embeddings]},
        "head and embeddings": {"target_modules": inner, "modules_to_save": [embeddings, head]},
    }[how]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject(model, LoRAConfig(r=2, **config))
    perturb(model, 0.1)
    return model


@pytest.mark.parametrize("how", ["inner layers", "adapter on the head", "head", "embeddings", "head and embeddings"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:.*no longer the same weight")
def test_a_merged_model_is_the_same_after_a_reload(kind, how, tmp_path):
    model = adapted(kind, how)
    want = logits(model)
    assert (want - logits(model_of(kind))).abs().max() > 1e-3 * want.abs().max()
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_adapter(model_of(kind), tmp_path / "adapter")), want, rtol=0, atol=0)
    in_peft = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "adapter").eval()
    scale = want.abs().max().item()
    torch.testing.assert_close(logits(in_peft), want, rtol=0, atol=3e-5 * scale)

    merge(model)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=3e-5 * scale)
    merged = logits(model)
    model.save_pretrained(tmp_path / "merged")
    reloaded = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(reloaded), merged, rtol=0, atol=1e-6 * scale)
    if how == "inner layers":
        assert flags(reloaded) == flags(model) == flags(model_of(kind))
        shared = [len({id(p) for p in m.parameters()}) for m in (model, model_of(kind))]
        assert shared[0] == shared[1]


@pytest.mark.parametrize("kind", WITH_SHARED)
@pytest.mark.filterwarnings("error:.*no longer the same weight")
def test_a_shared_embedding_is_trained_where_it_is_used(kind, tmp_path):
    """T5's `shared` is never called: training a copy of it alone would change nothing."""
    base = model_of(kind)
    shared = path_of(base, base.shared if hasattr(base, "shared") else base.model.shared)
    model = inject(copy.deepcopy(base), LoRAConfig(r=2, target_modules=r".*\.(v_proj|v)", modules_to_save=[shared]))
    weight = model.get_submodule(shared).weight
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert weight.grad.abs().max() > 0
    used = paths_of(model, weight)
    assert used == paths_of(base, base.get_submodule(shared).weight)
    assert model.config.tie_word_embeddings is base.config.tie_word_embeddings

    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    want = logits(model)
    assert not torch.allclose(want, logits(base))
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(base))
    save_adapter(model, tmp_path)
    again = load_adapter(model_of(kind), tmp_path)
    assert torch.equal(logits(again), want)
    # It goes on training as one weight.
    assert paths_of(again, again.get_submodule(shared).weight) == used
    assert again.config.tie_word_embeddings is base.config.tie_word_embeddings
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, again)]
    assert trained[0] == trained[1]
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), want)


def test_adalora_trains_a_shared_embedding_too(tmp_path):
    config = AdaLoRAConfig(init_r=2, target_r=2, target_modules=["q"], modules_to_save=["shared"])
    model = inject(model_of("t5"), config)
    perturb(model, 0.1)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    save_adapter(model, tmp_path)
    again = load_adapter(model_of("t5"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.encoder.embed_tokens.weight is again.shared.weight is again.lm_head.weight


def test_copies_that_peft_trained_apart_stay_apart(tmp_path):
    names = ["shared", "embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=names)
    theirs = peft.get_peft_model(model_of("t5"), config).eval()
    perturb(theirs, 0.1)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no longer the same weight"):
        ours = load_adapter(model_of("t5"), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert ours.encoder.embed_tokens.weight is not ours.decoder.embed_tokens.weight

    together = inject(model_of("t5"), LoRAConfig(r=2, lora_alpha=8, target_modules=["q"], modules_to_save=["shared"]))
    before = logits(together)
    with pytest.raises(ValueError, match="shared.weight and .*embed_tokens.weight differ, and are one weight there"):
        load_adapter(together, tmp_path)
    assert torch.equal(logits(together), before)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = self.second = nn.Linear(8, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_layer_under_two_names_is_announced():
    model = Twice()
    model.other = nn.Linear(8, 8)
    with pytest.warns(
        UserWarning, match="first: the same layer is used at second too, where .* is not trained"
    ) as seen:
        inject(model, LoRAConfig(r=2))
    assert all(warning.filename == __file__ for warning in seen)
    assert type(model.second) is nn.Linear
    assert not model.second.weight.requires_grad


def test_a_layer_under_two_names_is_trained_in_full_as_one(tmp_path):
    def fresh():
        model = Twice()
        model.other = nn.Linear(8, 8)
        return model

    model, x = fresh(), torch.randn(2, 8)
    base, original = model(x), model.first
    with pytest.warns(UserWarning, match="second too, where it is trained with it, which PEFT does not do"):
        inject(model, LoRAConfig(r=2, modules_to_save=["first"]))
    assert model.first is model.second is not original
    perturb(model, 0.1)
    with adapters_disabled(model):
        assert model.first is model.second is original and torch.equal(model(x), base)
    assert not torch.allclose(model(x), base)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="is trained with it"):
        assert torch.equal(load_adapter(fresh(), tmp_path)(x), model(x))


class Shared(nn.Module):
    """As transformers 4 builds T5: the very embedding is in the encoder too, and the output layer has its weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.shared = nn.Embedding(12, 8)
        self.encoder = nn.ModuleDict({"embed": self.shared, "q": nn.Linear(8, 8)})
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.shared.weight

    def forward(self, ids):
        return self.lm_head(self.encoder["q"](self.encoder["embed"](ids)))


@pytest.mark.filterwarnings("ignore:.*is trained with it")
@pytest.mark.filterwarnings("error:.*no longer the same weight")
def test_one_embedding_at_two_places_stays_one(tmp_path):
    model = Shared()
    base = model(IDS)
    inject(model, LoRAConfig(r=2, target_modules=["q"], modules_to_save=["shared"]))
    assert tuple(model.lora_originals) == ("shared", "lm_head")
    assert model.shared is model.encoder["embed"] and model.shared.weight is model.lm_head.weight
    perturb(model, 0.1)
    want = model(IDS)
    save_adapter(model, tmp_path)
    again = load_adapter(Shared(), tmp_path)
    assert torch.equal(again(IDS), want) and again.shared.weight is again.lm_head.weight
    with adapters_disabled(model):
        assert torch.equal(model(IDS), base)
    torch.testing.assert_close(merge(model)(IDS), want)


def test_merging_a_tied_t5_is_refused_where_transformers_would_tie_it_again(monkeypatch):
    model, inner = adapted("t5", "adapter on the head"), adapted("t5", "inner layers")
    before = logits(model)
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ValueError, match="transformers 4.57.1 makes them one again when it loads a t5 model"):
        merge(model)
    assert torch.equal(logits(model), before)
    merge(inner)


def test_only_weights_that_came_apart_are_split():
    class Tied(transformers.BartForConditionalGeneration):
        def __init__(self, config):
            super().__init__(config)
            self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)
            self.g.weight = self.f.weight

    model = Tied(transformers.BartConfig(**BART))
    with pytest.warns(UserWarning, match="no longer the same weight") as seen:
        merge(inject(model, LoRAConfig(r=2, target_modules=["lm_head"], init="both_gaussian")))
    assert [w.filename for w in seen if "no longer" in str(w.message)] == [__file__]
    assert model.f.weight is model.g.weight
    assert model.model.shared.weight is not model.lm_head.weight
    assert model.config.tie_word_embeddings is False


class Repeated(transformers.PreTrainedModel):
    """As Zamba: the second block has the weights of the first, which `_tied_weights_keys` says of the block alone."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))
        self._tied_weights_keys = {config.key: "first"}
        self.post_init()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("key", ["second", r"sec\w+\.(?!rotary)"])
@pytest.mark.filterwarnings("ignore:.*no longer the same weight")
def test_all_weights_of_a_tied_block_are_saved_when_one_comes_apart(key, tmp_path):
    torch.manual_seed(1)
    model = Repeated(transformers.PretrainedConfig(tie_word_embeddings=True, key=key)).eval()
    nn.init.normal_(model.first[1].weight)
    assert model.first[1].weight is model.second[1].weight
    perturb(inject(model, LoRAConfig(r=2)), 0.1)
    x = torch.randn(3, 8)
    want = model(x)
    merge(model).save_pretrained(tmp_path)
    torch.testing.assert_close(Repeated.from_pretrained(tmp_path)(x), want, rtol=1e-5, atol=1e-6)
