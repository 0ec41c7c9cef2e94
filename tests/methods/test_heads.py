"""Heads of models for classification, question answering and the like: trained, saved, and read by PEFT."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from tiny_models import perturb, tiny_model
from torch import nn

from lora_kernels import (
    AdaLoRAConfig,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    inject,
    load_adapter,
    save_adapter,
    trainable_summary,
)
from lora_kernels.methods.heads import task_heads
from lora_kernels.methods.lora import lora_modules, plan

_TEXT = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
_BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 61,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "eos_token_id": 9}  # fmt: skip
_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
        "patch_size": 4}  # fmt: skip
_AUDIO = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
          "conv_dim": [16], "conv_kernel": [4], "conv_stride": [4], "num_feat_extract_layers": 1,
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}  # fmt: skip
_WHISPER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 61,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4,
            "max_source_positions": 8, "classifier_proj_size": 8, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
_T5 = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "eos_token_id": 9,
       "decoder_start_token_id": 0}  # fmt: skip
IDS = torch.tensor([[3, 4, 5, 9], [6, 7, 8, 9]])
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 80, generator=torch.Generator().manual_seed(0))
MEL = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))

# class -> (settings of its config, input, heads, PEFT's task type)
CASES = {
    "BertForSequenceClassification": (_TEXT, IDS, {"classifier"}, "SEQ_CLS"),
    "RobertaForSequenceClassification": (_TEXT, IDS, {"classifier"}, "SEQ_CLS"),
    "DistilBertForSequenceClassification": (
        {"vocab_size": 61, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}, IDS,
        {"pre_classifier", "classifier"}, "SEQ_CLS",
    ),
    "LlamaForSequenceClassification": (_TEXT, IDS, {"score"}, "SEQ_CLS"),
    "DebertaV2ForSequenceClassification": (_TEXT, IDS, {"pooler", "classifier"}, "SEQ_CLS"),
    "BartForSequenceClassification": (_BART, IDS, {"classification_head"}, None),
    "GPT2ForTokenClassification": (
        {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2}, IDS, {"classifier"}, "TOKEN_CLS",
    ),
    "BertForTokenClassification": (_TEXT, IDS, {"classifier"}, "TOKEN_CLS"),
    "BertForQuestionAnswering": (_TEXT, IDS, {"qa_outputs"}, "QUESTION_ANS"),
    "LlamaForQuestionAnswering": (_TEXT, IDS, {"qa_outputs"}, "QUESTION_ANS"),
    "T5ForQuestionAnswering": (_T5, IDS, {"qa_outputs"}, "QUESTION_ANS"),
    "BertForMultipleChoice": (_TEXT, IDS[None], {"classifier"}, None),
    "BertForNextSentencePrediction": (_TEXT, IDS, {"cls"}, None),
    "ViTForImageClassification": (_VIT, PIXELS, {"classifier"}, None),
    "Wav2Vec2ForSequenceClassification": (_AUDIO, SOUND, {"projector", "classifier"}, None),
    "Wav2Vec2ForCTC": ({**_AUDIO, "vocab_size": 11}, SOUND, {"lm_head"}, None),
    "WhisperForAudioClassification": (_WHISPER, MEL, {"projector", "classifier"}, None),
}  # fmt: skip


def fresh(kind, seed):
    """The same base model each time, under a head of its own."""
    settings = {"num_labels": 2 if "Question" in kind or "NextSentence" in kind else 3, **CASES[kind][0]}
    if "MultipleChoice" in kind:
        del settings["num_labels"]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for head in CASES[kind][2]:
            for parameter in model.get_submodule(head).parameters():
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def outputs(model, kind):
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    found = model(**{base.main_input_name: CASES[kind][1]}).to_tuple()[:2]
    return [each for each in found if isinstance(each, torch.Tensor) and each.is_floating_point()]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_the_head_is_trained_saved_and_read_by_peft(kind, tmp_path):
    _, _, heads, task = CASES[kind]
    model = fresh(kind, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stays random")
        inject(model, LoRAConfig(r=2))
    assert set(model.lora_originals) == heads
    assert all(parameter.requires_grad for head in heads for parameter in model.get_submodule(head).parameters())
    assert f"trained in full: {', '.join(model.lora_originals)}" in str(trainable_summary(model))
    assert list(lora_modules(model))
    perturb(model, 0.1)
    want = outputs(model, kind)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task and set(config["modules_to_save"]) == heads
    assert_same(outputs(load_adapter(fresh(kind, 2), tmp_path), kind), want)
    theirs = peft.PeftModel.from_pretrained(fresh(kind, 2), tmp_path).eval()
    assert_same(outputs(theirs, kind), want)


@pytest.mark.parametrize("kind", [kind for kind, (*_, task) in CASES.items() if task])
def test_what_peft_trains_for_a_task_is_read(kind, tmp_path):
    *_, task = CASES[kind]
    torch.manual_seed(3)
    targets = ["q_lin", "query", "query_proj", "q_proj", "c_attn", "q"]
    config = peft.LoraConfig(r=2, target_modules=targets, task_type=task, init_lora_weights=False)
    theirs = peft.get_peft_model(fresh(kind, 1), config).eval()
    perturb(theirs, 0.1)
    theirs.save_pretrained(tmp_path)
    # PEFT leaves DeBERTa's pooler out.
    base = fresh(kind, 1 if "Deberta" in kind else 2)
    assert_same(outputs(load_adapter(base, tmp_path), kind), outputs(theirs, kind))


def test_modules_to_save_decide_where_they_are_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inject(fresh("BertForSequenceClassification", 1), LoRAConfig(modules_to_save=()))
    assert not model.classifier.weight.requires_grad and model.lora_originals == {}
    with pytest.warns(UserWarning, match="classifier of BertForSequenceClassification: neither trained nor in"):
        model = inject(fresh("BertForSequenceClassification", 1), LoRAConfig(modules_to_save=["pooler"]))
    assert list(model.lora_originals) == ["bert.pooler"] and not model.classifier.weight.requires_grad


def test_a_language_model_has_no_head_to_train():
    for kind in ("llama", "gpt2"):
        assert plan(tiny_model(kind), LoRAConfig()).modules_to_save == ()
    settings = {**_TEXT, "is_decoder": True}
    assert plan(transformers.BertForMaskedLM(transformers.BertConfig(**settings)), LoRAConfig()).modules_to_save == ()


def test_a_classifier_of_another_class():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = nn.Linear(4, 4), nn.Linear(4, 2)

    model = inject(Net(), LoRAConfig(r=2))
    assert list(model.lora_originals) == ["classifier"] and model.classifier.weight.requires_grad


def test_heads_that_are_not_trained_by_default_are_named():
    """Of another kind of task, such that PEFT's format can't name, and parameters."""
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    with pytest.warns(UserWarning, match="decode_head of SegformerForSemanticSegmentation"):
        model = inject(
            transformers.SegformerForSemanticSegmentation(config), LoRAConfig(r=2, target_modules=["q_proj"])
        )
    assert model.lora_originals == {}

    # Every other LayerNorm's path ends in "norm" too.
    config = transformers.PoolFormerConfig(depths=[1] * 4, hidden_sizes=[8] * 4)
    assert task_heads(transformers.PoolFormerForImageClassification(config)) == (("classifier",), ("norm",))


def test_adalora_trains_the_head_too(tmp_path):
    kind = "BertForSequenceClassification"
    model = inject(fresh(kind, 1), AdaLoRAConfig(init_r=3, target_r=2, target_modules=["query"]))
    perturb(model, 0.1)
    save_adapter(model, tmp_path)
    want = outputs(model, kind)
    assert_same(outputs(load_adapter(fresh(kind, 2), tmp_path), kind), want)
    assert_same(outputs(peft.PeftModel.from_pretrained(fresh(kind, 2), tmp_path).eval(), kind), want)


@pytest.mark.parametrize("config", [PrefixConfig(), PromptConfig()])
def test_virtual_tokens_are_for_language_models(config):
    model = fresh("LlamaForSequenceClassification", 1)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification; allowed: a Hugging Face causal"):
        inject(model, config)


class Vgg(nn.Module):
    """With a head of several layers."""

    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(1)
        self.q_proj = nn.Linear(4, 4)
        self.classifier = head or nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.classifier(self.q_proj(x))


@pytest.mark.parametrize(
    "targets", [["classifier.0"], ["q_proj", "classifier.2"], r"classifier\.\d*[02]", r"(q_proj|classifier\.0)"]
)
def test_a_head_that_is_a_target_gets_an_adapter(targets, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inject(Vgg(), LoRAConfig(r=2, target_modules=targets, init="both_gaussian"))
    assert model.lora_originals == {} and any(name.startswith("classifier.") for name, _ in lora_modules(model))
    save_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    assert_same(load_adapter(Vgg(), tmp_path)(x), model(x))


@pytest.mark.parametrize("targets", [["q_proj", "score"], r".*\.q_proj|score", ["score"]])
def test_a_head_of_transformers_that_is_a_target_gets_an_adapter(targets):
    model = inject(fresh("LlamaForSequenceClassification", 1), LoRAConfig(r=2, target_modules=targets))
    assert model.lora_originals == {} and "score" in dict(lora_modules(model))


def test_a_target_that_a_head_has_too_leaves_it_trained_in_full():
    model = inject(fresh("RobertaForSequenceClassification", 1), LoRAConfig(r=2, target_modules=["query", "dense"]))
    assert list(model.lora_originals) == ["classifier"]


def test_a_list_of_heads_is_not_trained_by_default():
    with pytest.warns(UserWarning, match="classifier of Vgg: neither trained nor in"):
        model = inject(Vgg(nn.ModuleList([nn.Linear(4, 2)])), LoRAConfig(r=2, target_modules=["q_proj"]))
    assert model.lora_originals == {}


def test_a_second_head_beside_the_output_embeddings_is_named():
    config = transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, num_labels=1)
    with pytest.warns(UserWarning, match="^multiple_choice_head of GPT2DoubleHeadsModel: neither") as seen:
        inject(transformers.GPT2DoubleHeadsModel(config), LoRAConfig(r=2, target_modules=["c_attn"]))
    assert all(warning.filename == __file__ for warning in seen if "neither" in str(warning.message))
    head = nn.DataParallel(tiny_model("llama").lm_head)
    model = tiny_model("llama")
    model.lm_head = head
    assert task_heads(model) == ((), ())
