"""GGUF files of the Llama architecture, as Hugging Face directories."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kernels.files import new_directory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OTHER_NAMES = {"gpt2": "gpt-2", "default": "gpt-2", "starcoder": "smollm"}
_TOKEN_CONTROL, _TOKEN_USER_DEFINED = 3, 4


def convert_gguf(path: str | Path, out_dir: str | Path) -> Path:
    """Dequantise a GGUF file of the Llama architecture to a Hugging Face directory; returns `out_dir`.

    Writes float32 `model.safetensors` (exactly the dequantised values), `config.json`, `generation_config.json` and a
    fast tokenizer with the GGUF's chat template. Rows of q_proj and k_proj are put back from llama.cpp's rotary order.
    A pad token equal to the end token is replaced by the unknown token, since padding with the end token would
    teach a trainer that masks pads never to stop.

    Supported: architecture `llama` without rope scaling, any quantisation the `gguf` package can dequantise, byte-level
    BPE with pre-tokenizer gpt-2, default, smollm, starcoder, llama-bpe or qwen2. Anything else raises ValueError, a
    missing file FileNotFoundError.
    """
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaForCausalLM

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {path} does not exist")
    reader = GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: GGUF architecture {architecture!r} is not supported; only 'llama' is")

    tokenizer = _gguf_tokenizer(meta, path)
    names = {tensor.name for tensor in reader.tensors}
    config = _gguf_config(meta, names, reader, path)
    state = _gguf_state(reader, config, path)

    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"{path}: GGUF file lacks tensors for {', '.join(missing[:5])}")
    for name, tensor in state.items():
        if name not in expected or expected[name].shape != tensor.shape:
            want = tuple(expected[name].shape) if name in expected else "no such tensor"
            raise ValueError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, the configuration wants {want}")

    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    with new_directory(out_dir) as staged:
        config.save_pretrained(staged)
        generation.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        save_file(state, staged / "model.safetensors", metadata={"format": "pt"})
    return Path(out_dir)


def _gguf_config(meta: dict[str, Any], names: set[str], reader: Any, path: Path) -> Any:
    from transformers import LlamaConfig

    # As llama.cpp reads it: a factor without a type is linear, 0 means none, and scale_linear is the factor's old name.
    rope = {name: meta.get(f"llama.rope.{name}") for name in ("scaling.type", "scaling.factor", "scale_linear")}
    factor = rope["scale_linear"] if rope["scaling.factor"] is None else rope["scaling.factor"]
    unscaled = rope["scaling.type"] == "none" or (rope["scaling.type"] in (None, "linear") and factor in (None, 0, 1))
    # This one scales the logits of attention, whatever the type.
    rope["scaling.attn_factor"] = meta.get("llama.rope.scaling.attn_factor")
    if not unscaled or rope["scaling.attn_factor"] not in (None, 1) or "rope_freqs.weight" in names:
        given = [f"llama.rope.{name} = {value!r}" for name, value in rope.items() if value is not None]
        given += ["rope_freqs.weight"] * ("rope_freqs.weight" in names)
        raise ValueError(f"{path}: GGUF rope scaling is not supported ({', '.join(given)})")
    try:
        hidden_size = meta["llama.embedding_length"]
        heads = meta["llama.attention.head_count"]
        head_dim = meta.get("llama.rope.dimension_count", hidden_size // heads)
        embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
        return LlamaConfig(
            vocab_size=int(embedding.shape[1]),
            hidden_size=hidden_size,
            intermediate_size=meta["llama.feed_forward_length"],
            num_hidden_layers=meta["llama.block_count"],
            num_attention_heads=heads,
            num_key_value_heads=meta.get("llama.attention.head_count_kv", heads),
            head_dim=meta.get("llama.attention.key_length", head_dim),
            max_position_embeddings=meta["llama.context_length"],
            rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
            rope_theta=meta.get("llama.rope.freq_base", 10000.0),
            tie_word_embeddings="output.weight" not in names,
            architectures=["LlamaForCausalLM"],
            dtype="float32",
        )
    except (KeyError, StopIteration) as error:
        raise ValueError(f"{path}: GGUF file lacks {error.args[0] if error.args else 'token_embd.weight'}") from error


def _gguf_state(reader: Any, config: Any, path: Path) -> dict[str, torch.Tensor]:
    import torch
    from gguf.quants import dequantize

    state = {}
    for tensor in reader.tensors:
        name = _GGUF_TOP.get(tensor.name)
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name):
            layer, part, kind = match.groups()
            if part in _GGUF_LAYER:
                name = f"model.layers.{layer}.{_GGUF_LAYER[part]}.{kind}"
        if name is None:
            raise ValueError(f"{path}: GGUF tensor {tensor.name} has no place in a Llama model")
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if "q_proj" in name:
            values = _unpermute(values, config.num_attention_heads)
        elif "k_proj" in name:
            values = _unpermute(values, config.num_key_value_heads)
        state[name] = values
    return state


def _unpermute(values: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two rotary halves of each head's rows; Hugging Face keeps one after the other."""
    rows = values.shape[0] // heads
    return values.view(heads, rows // 2, 2, -1).transpose(1, 2).reshape(values.shape).contiguous()


def pre_tokenizers() -> dict[str, Any]:
    """What splits a text before byte-level BPE, by llama.cpp's name of it. "llama-bpe" alone ignores merges, too."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    def split(digits: str) -> Any:
        pattern = Regex(_SPLIT.replace("{DIGITS}", digits))
        return Sequence([Split(pattern, behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])

    gpt2 = ByteLevel(add_prefix_space=False)
    smollm = Sequence([Digits(individual_digits=True), gpt2])
    return {"gpt-2": gpt2, "smollm": smollm, "llama-bpe": split("{1,3}"), "qwen2": split("")}


def _gguf_tokenizer(meta: dict[str, Any], path: Path) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(f"{path}: GGUF tokenizer model {kind!r} is not supported; only 'gpt2' (byte-level BPE) is")
    known = pre_tokenizers()
    if _OTHER_NAMES.get(pre, pre) not in known:
        allowed = ", ".join((*known, *_OTHER_NAMES))
        raise ValueError(f"{path}: GGUF pre-tokenizer {pre!r} is not supported; allowed: {allowed}")

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    core = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]],
            ignore_merges=pre == "llama-bpe",
        )
    )
    core.pre_tokenizer = known[_OTHER_NAMES.get(pre, pre)]
    core.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, types, strict=True))
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in typed if k == _TOKEN_CONTROL])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in typed if k == _TOKEN_USER_DEFINED])

    def token(name: str) -> str | None:
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    bos, eos, unk, pad = token("bos"), token("eos"), token("unknown"), token("padding")
    if bos is not None and meta.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        core.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, tokens.index(bos))]
        )
    if pad is None or pad == eos:
        pad = unk if unk not in (None, eos) else eos
    # bos, eos and unk only where the file has them: an absent name must stay unset, not become a new token.
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=meta["llama.context_length"],
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: value for name, value in special.items() if value is not None},
    )
