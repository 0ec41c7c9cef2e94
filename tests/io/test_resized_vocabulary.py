"""Adapters on models with added tokens: rows that no file of the base model holds, in PEFT's files and in ours."""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import VOCAB, perturb, tiny_model

from lora_kernels import (
    AdaLoRAConfig,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    adapters_disabled,
    add_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
    use_adapter,
)
from lora_kernels.methods.named import adapter_names

ROWS = VOCAB + 5
IDS = torch.tensor([[1, 5, VOCAB, VOCAB + 4, 7], [9, VOCAB + 2, 3, 3, VOCAB + 1]])
pytestmark = pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tied|same weight|tie_word|other embeddings).*")

# What is asked of PEFT and of us alike.
CONFIGS = {
    "lora": {"target_modules": ["q_proj"]},
    "head_adapted": {"target_modules": ["q_proj", "lm_head"]},
    "both_in_full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "input_in_full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.fixture(scope="module", params=["llama", "llama_tied", "gpt2"])
def base(request, tmp_path_factory):
    """The directory of a base model, and what resizes it with rows that `seed` decides."""
    kind, _, tied = request.param.partition("_")
    directory = tmp_path_factory.mktemp(request.param)
    model = tiny_model(kind, tied=bool(tied) or kind == "gpt2")
    model.save_pretrained(directory)

    def resized(seed, rows=ROWS):
        torch.manual_seed(seed)
        loaded = type(model).from_pretrained(directory)
        loaded.resize_token_embeddings(rows, mean_resizing=False)
        return loaded.eval()

    resized.kind = kind
    return resized


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def arguments(base, name):
    config = copy.deepcopy(CONFIGS[name])
    if base.kind == "gpt2":
        names = {"q_proj": "c_attn", "embed_tokens": "wte", "lm_head": "lm_head"}
        config = {key: [names[value] for value in values] for key, values in config.items()}
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_ours_is_read_by_both(base, name, tmp_path):
    assert (logits(base(1)) - logits(base(2))).abs().max() > 1e-3
    model = inject(base(1), LoRAConfig(r=2, **arguments(base, name)))
    perturb(model, 0.1)
    want = logits(model)
    with adapters_disabled(model):
        without = logits(model)
    save_adapter(model, tmp_path)
    assert_same(logits(peft.PeftModel.from_pretrained(base(2), tmp_path).eval()), want)
    again = load_adapter(base(2), tmp_path)
    assert_same(logits(again), want)
    with adapters_disabled(again):
        assert_same(logits(again), without)
    # Into a model that carries the adapter already, and merged.
    other = load_adapter(inject(base(3), LoRAConfig(r=2, **arguments(base, name))), tmp_path)
    assert_same(logits(other), want)
    with adapters_disabled(other):
        assert_same(logits(other), without)
    torch.testing.assert_close(logits(merge(other)), want, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_is_read(base, name, tmp_path):
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **arguments(base, name))
    theirs = peft.get_peft_model(base(1), config).eval()
    perturb(theirs, 0.1)
    theirs.save_pretrained(tmp_path)
    # With an adapter on the head alone PEFT leaves the input embeddings out.
    seed = 1 if name == "head_adapted" else 2
    ours = load_adapter(base(seed), tmp_path)
    assert_same(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "again")
    assert_same(logits(load_adapter(base(3), tmp_path / "again")), logits(theirs))


@pytest.mark.parametrize(
    "config",
    [PrefixConfig(num_virtual_tokens=2), PromptConfig(num_virtual_tokens=2), AdaLoRAConfig(init_r=3, target_r=2)],
)
def test_every_method_keeps_the_rows(base, config, tmp_path):
    model = inject(base(1), config)
    save_adapter(model, tmp_path)
    want = logits(model)
    assert_same(logits(load_adapter(base(2), tmp_path)), want)
    theirs = peft.PeftModel.from_pretrained(base(2), tmp_path).eval()
    assert_same(logits(theirs)[:, -IDS.shape[1] :], want)


def test_nothing_more_is_written_for_the_vocabulary_of_the_base(base, tmp_path):
    save_adapter(inject(base(1, VOCAB), LoRAConfig(r=2)), tmp_path)
    assert all("lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("rows", [VOCAB, ROWS + 3])
def test_another_vocabulary_is_refused_with_the_way_out(base, rows, tmp_path):
    save_adapter(inject(base(1), LoRAConfig(r=2)), tmp_path)
    model = base(2, rows)
    before = logits_of_known(model)
    with pytest.raises(ValueError, match=rf"model's has {rows}; call model.resize_token_embeddings\({ROWS}\)"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits_of_known(model), before) and not hasattr(model, "adapter_config")
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    assert_same(logits(load_adapter(model, tmp_path)), logits(base(1)))


@torch.no_grad()
def logits_of_known(model):
    return model(input_ids=IDS.clamp(max=VOCAB - 1)).logits


def test_a_second_adapter_can_not_change_the_embeddings_of_the_first(base, tmp_path):
    from lora_kernels.io.peft import add_saved_adapter

    save_adapter(inject(base(1), LoRAConfig(r=2)), tmp_path)
    model = inject(base(2), LoRAConfig(r=2))
    want = logits(model)
    with pytest.raises(ValueError, match="for its other adapters too"):
        add_saved_adapter(model, "second", tmp_path)
    assert adapter_names(model) == ["default"] and torch.equal(logits(model), want)
    same = inject(base(1), LoRAConfig(r=2))
    add_saved_adapter(same, "second", tmp_path)
    add_adapter(same, "third", LoRAConfig(r=2))
    with use_adapter(same, "second"):
        assert_same(logits(same), logits(base(1)))


@pytest.mark.parametrize("name", CONFIGS)
def test_changed_embeddings_of_the_same_vocabulary_are_kept(base, name, tmp_path):
    """A file of PEFT with rows that differ from the base model's, loaded, saved, and read by both."""
    changed = base(1, VOCAB)
    with torch.no_grad():
        changed.get_output_embeddings().weight[[3, 5, 7, 9]] += 0.1
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **arguments(base, name))
    theirs = peft.get_peft_model(changed, config).eval()
    perturb(theirs, 0.1)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours = load_adapter(base(1, VOCAB), tmp_path / "theirs")
    assert_same(logits_of_known(ours), logits_of_known(theirs))
    save_adapter(ours, tmp_path / "ours")
    again = load_adapter(base(1, VOCAB), tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(base(1, VOCAB), tmp_path / "ours").eval()
    for model in (again, read):
        assert_same(logits_of_known(model), logits_of_known(theirs))
    with adapters_disabled(again), adapters_disabled(ours):
        assert_same(logits_of_known(again), logits_of_known(ours))


@pytest.mark.parametrize("base_dtype, dtype", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_copies_in_another_precision_leave_the_base_alone(base, base_dtype, dtype, tmp_path):
    theirs = peft.get_peft_model(base(1, VOCAB).to(dtype), peft.LoraConfig(r=2, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = base(1, VOCAB).to(base_dtype)
    before = model.get_output_embeddings().weight.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other embeddings")
        load_adapter(model, tmp_path)
    assert torch.equal(model.get_output_embeddings().weight, before)
    save_adapter(model, tmp_path / "again")
    assert all("lora_" in key for key in load_file(tmp_path / "again" / "adapter_model.safetensors"))


def test_a_vocabulary_that_is_resized_after_inject_is_refused(base, tmp_path):
    model = inject(base(1, VOCAB), LoRAConfig(r=2, **arguments(base, "both_in_full")))
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    with pytest.raises(ValueError, match=rf"is \[{ROWS}, 32\] where .* \[{VOCAB}, 32\] in the base.* before inject"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["Musicgen", "MusicgenMelody"])
def test_a_text_encoder_beside_the_decoder(kind, tmp_path):
    """Their config has a vocabulary of each."""
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "vocab_size": 16}
    config = getattr(transformers, f"{kind}Config")(
        text_encoder=transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        audio_encoder=transformers.EncodecConfig(
            hidden_size=8, num_filters=4, codebook_size=16, codebook_dim=8, upsampling_ratios=[2, 2]
        ),
        decoder=getattr(transformers, f"{kind}DecoderConfig")(
            **part, num_codebooks=2, pad_token_id=15, bos_token_id=15
        ),
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    save_adapter(inject(model, LoRAConfig(r=2, target_modules=["q_proj"])), tmp_path)
    assert all("lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_an_unknown_base_is_said(base, tmp_path):
    model = inject(base(1), LoRAConfig(r=2))
    model.config._name_or_path = str(tmp_path / "gone")
    with pytest.warns(UserWarning, match="gone can't be read.*added to the embeddings are not in the files"):
        save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "gone")
