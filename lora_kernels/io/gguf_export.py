"""GGUF files for llama.cpp: whole models, and LoRA adapters that it applies to a model's GGUF.

A LoRA file has the tensors `NAME.lora_a` [R, K] and `NAME.lora_b` [N, R] for a weight `NAME` [N, K] of the model's
file, and one alpha: llama.cpp computes W + alpha / R · lora_b · lora_a, with R the rank of each pair.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_kernels.files import replacing
from lora_kernels.io.gguf import pre_tokenizers
from lora_kernels.io.peft import PREFIX, to_write
from lora_kernels.io.peft_embeddings import saved_embeddings
from lora_kernels.methods.apply import adapter_config
from lora_kernels.methods.lora import lora_modules
from lora_kernels.methods.registry import method_of
from lora_kernels.nn.wrappers import bare, state_dict

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

STORED = "stored"
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
DTYPES = (STORED, *_TYPES)

# The architecture in llama.cpp, and whether its rotary embedding turns neighbouring rows of a head.
_FAMILIES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed for GGUF: {', '.join(DTYPES)}")


def save_gguf_adapter(model: nn.Module, path: str | os.PathLike, dtype: str = STORED) -> None:
    """Writes the LoRA or AdaLoRA adapter in use to a GGUF file, which llama.cpp applies to the base model's.

    A file has one alpha. Where scaling · R differs between modules, as rank patterns make it, the difference goes into
    lora_b; AdaLoRA's lora_e goes into lora_a. Modules without ranks are left out.

    dtype: of the tensors: "stored" (the adapter's own), "float32", "float16", "bfloat16" or "q8_0", which needs ranks
        and inputs that are multiples of 32.

    Raises ValueError, with nothing written, for a model that is no Llama, Mistral, Qwen2 or Qwen3, and for what a LoRA
    file can't say: DoRA, modules_to_save, changed embeddings, an adapter on an output layer that shares the
    embedding's weight, virtual tokens.
    """
    check_dtype(dtype)
    network: Any = bare(model)
    names, config = _Names(network), adapter_config(network)
    if not method_of(config).has_lora_b:
        raise ValueError(
            f"a {type(config).__name__} was injected, which a GGUF adapter can't hold; allowed: LoRA, AdaLoRA"
        )
    whole = "a GGUF adapter holds LoRA matrices only; export the merged model"
    if in_full := [*network.lora_originals, *saved_embeddings(network, PREFIX)]:
        raise ValueError(f"{', '.join(in_full)}: trained or changed in full, and {whole}")
    layers = {name: layer for name, layer in lora_modules(network) if layer.r}
    if not layers:
        raise ValueError("no module has a rank left: there is no adapter to write")
    for name, layer in layers.items():
        if layer.lora_magnitude is not None:
            raise ValueError(f"{name} has DoRA's magnitudes, and {whole}")
        if layer.weight is network.get_input_embeddings().weight:
            raise ValueError(f"{name} has an adapter and shares its weight with the embedding, and {whole}")
    first = next(iter(layers.values()))
    alpha = first.scaling * first.r
    tensors = {}
    for name, layer in layers.items():
        key = f"{name}.weight"
        # Products in float32, rounded once; a file as stored has them in the dtype of the adapter.
        lora_a, lora_b = (to_write(f"{name}.{part}", getattr(layer, part)) for part in ("lora_a", "lora_b"))
        kind = lora_a.dtype if dtype == STORED else torch.float32
        lora_a = lora_a.float()
        if layer.lora_e is not None:
            lora_a = lora_a * to_write(f"{name}.lora_e", layer.lora_e).float()[:, None]
        lora_a, lora_b = lora_a.to(kind), (lora_b.float() * (layer.scaling * layer.r / alpha)).to(kind)
        tensors[f"{names[key]}.lora_a"] = lora_a
        tensors[f"{names[key]}.lora_b"] = names.rows(key, lora_b)

    import gguf

    writer = gguf.GGUFWriter(None, names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    _write(writer, path, tensors, dtype)


def save_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike, dtype: str = STORED
) -> None:
    """Writes a model without adapters, its tokenizer and chat template to a GGUF file for llama.cpp.

    The end tokens of the model's generation config end an answer there too. The context is at most the sliding window,
    since llama.cpp has none for these models.

    dtype: of the matrices: "stored" (each as it is in the model), "float32", "float16", "bfloat16" or "q8_0" (blocks of
        32 with a scale). Vectors are float32.

    Raises ValueError, with nothing written, for a model that is no Llama, Mistral, Qwen2 or Qwen3, for rotary
    embeddings other than default, linear and llama3, and for a tokenizer that llama.cpp would read otherwise.
    """
    check_dtype(dtype)
    model = bare(model)
    names = _Names(model)
    config = getattr(model, "adapter_config", None)
    if config is not None and method_of(config).peft_type is not None:
        raise ValueError(f"a {type(config).__name__} was injected into the model; merge it first")
    state = state_dict(model)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        del state["lm_head.weight"]
    tensors = {names[key]: names.rows(key, to_write(key, tensor)) for key, tensor in state.items()}

    import gguf

    writer = gguf.GGUFWriter(None, names.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    if name := Path(model.config._name_or_path).name:
        writer.add_name(name)
    tensors |= _add_sizes(writer, model.config)
    rows = len(model.get_input_embeddings().weight)
    writer.add_vocab_size(rows)
    stops = model.generation_config.eos_token_id
    _add_vocabulary(writer, tokenizer, rows, [stops] if isinstance(stops, int) else stops or [])
    _write(writer, path, tensors, dtype)


class _Names:
    """What llama.cpp calls the tensors of a model, by the names in its state dict, and in which order it keeps rows."""

    def __init__(self, model: Any) -> None:
        import gguf

        kind = type(model).__name__
        if kind not in _FAMILIES:
            raise ValueError(f"model is a {kind}, of which no GGUF can be written; allowed: {', '.join(_FAMILIES)}")
        self.architecture, interleaved = _FAMILIES[kind]
        config = model.config
        self._heads = (
            {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if interleaved else {}
        )
        self._map = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], config.num_hidden_layers)

    def __getitem__(self, key: str) -> str:
        name = self._map.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{key}: GGUF has no name for such a tensor of the architecture {self.architecture!r}")
        return name

    def rows(self, key: str, values: Tensor) -> Tensor:
        """`values` [N] or [N, K] with the two halves of each head's rows interleaved, where llama.cpp has them so."""
        heads = self._heads.get(key.split(".")[-2])
        return values if heads is None else values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_sizes(writer: Any, config: PretrainedConfig) -> dict[str, Tensor]:
    """The sizes of a model for llama.cpp; returns the tensors that its rotary embedding needs."""
    import gguf

    if config.hidden_act != "silu":
        raise ValueError(f"the model's hidden_act is {config.hidden_act!r}; allowed for GGUF: 'silu'")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    # Transformers before 5 has the two apart.
    rope = getattr(config, "rope_parameters", None) or {
        "rope_theta": config.rope_theta,
        **(getattr(config, "rope_scaling", None) or {}),
    }
    theta, kind = rope["rope_theta"], rope.get("rope_type", rope.get("type", "default"))
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        return {"rope_freqs.weight": plain / scaled}
    elif kind != "default":
        raise ValueError(f"the model's rope_type is {kind!r}; allowed for GGUF: 'default', 'linear', 'llama3'")
    return {}


def _add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int, stops: Collection[int]) -> None:
    """The tokenizer for llama.cpp. rows: of the model's embedding. stops: the tokens that end an answer."""
    import gguf

    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; allowed for GGUF: a fast one (tokenizer.json)")
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(tokens) >= rows:
        raise ValueError(f"the tokenizer has token {max(tokens)}, {tokens[max(tokens)]!r}, the embedding {rows} rows")
    sentencepiece = core["model"]["type"] == "BPE" and core["model"].get("byte_fallback", False)
    added = tokenizer.added_tokens_decoder
    texts, types = [], []
    for index in range(rows):
        text, kind = tokens.get(index, f"[PAD{index}]"), gguf.TokenType.NORMAL
        if index not in tokens:
            kind = gguf.TokenType.UNUSED
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
        elif sentencepiece and len(text) == len("<0x00>") and text.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        texts.append(text)
        types.append(kind)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        special = gguf.SpecialVocab(directory, load_merges=not sentencepiece)
    special.add_special_token = _ends(tokenizer)
    more = [stop for stop in stops if stop != special.special_token_ids.get("eos")]
    if len(more) > 2:
        raise ValueError(f"the generation config ends answers with {stops}; a GGUF file has room for 3 end tokens")
    special.special_token_ids |= dict(zip(("eot", "eom"), more, strict=False))

    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(core, texts))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(core))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def _ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether the tokenizer puts the begin token before a text, and the end token behind it."""
    bare, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for begins in (False, True):
        for ends in (False, True):
            if whole == bos * begins + bare + eos * ends:
                return {"bos": begins, "eos": ends}
    raise ValueError(
        f"the tokenizer makes {whole} of 'a', {bare} without special tokens; allowed for GGUF: the begin token before "
        "it, the end token behind it"
    )


def _pre_tokenizer(core: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level BPE tokenizer splits a text."""

    def plain(value: Any) -> Any:
        """Without trim_offsets, which changes no token."""
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items() if name != "trim_offsets"}
        return [plain(part) for part in value] if isinstance(value, list) else value

    known = pre_tokenizers()
    for name, splitter in known.items():
        same = plain(json.loads(splitter.__getstate__())) == plain(core["pre_tokenizer"])
        if same and bool(core["model"].get("ignore_merges")) == (name == "llama-bpe") and _plain_text(core):
            return name
    raise ValueError(
        f"the tokenizer splits texts by {json.dumps(core['pre_tokenizer'], ensure_ascii=False)}, normalises them by "
        f"{json.dumps(core['normalizer'])}, its model is a {core['model']['type']}; allowed for GGUF: SentencePiece's "
        f"BPE, and byte-level BPE that splits as {', '.join(known)}"
    )


def _plain_text(core: Mapping[str, Any]) -> bool:
    """Whether the model is BPE over the text as it is, or over its composed form (NFC), as texts mostly are anyway."""
    normalizer = core["normalizer"]
    return core["model"]["type"] == "BPE" and (normalizer is None or normalizer["type"] == "NFC")


def _scores(core: Mapping[str, Any], texts: Collection[str]) -> list[float]:
    """SentencePiece's scores, by which llama.cpp merges: the earlier the merge that makes a token, the higher.

    ValueError where the merges were not made from scores. llama.cpp merges any two tokens that make a third one, so
    all pairs that make one must be there, next to each other.
    """
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in core["model"]["merges"]]
    made = [text for text, _ in itertools.groupby(left + right for left, right in merges)]
    cuts = ((text[:place], text[place:]) for text in made for place in range(1, len(text)))
    known = set(texts)
    splitter = core["pre_tokenizer"] or {"type": "Metaspace", "split": False}
    if (
        splitter["type"] != "Metaspace"
        or splitter["split"]
        or sorted(merges) != sorted(pair for pair in cuts if known.issuperset(pair))
    ):
        raise ValueError("the tokenizer has byte fallback and is not SentencePiece's BPE, the only such one in GGUF")
    ranks = {text: rank for rank, text in enumerate(made)}
    return [-float(ranks.get(text, len(made))) for text in texts]


def _write(writer: Any, path: str | os.PathLike, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Writes what was added to the writer, and these tensors, which are converted one by one."""
    import gguf
    import numpy as np

    kinds = {}
    for name, tensor in tensors.items():
        given = str(tensor.dtype).removeprefix("torch.")
        kind = "float32" if tensor.ndim == 1 else given if dtype == STORED else dtype
        if given not in _TYPES:
            raise ValueError(f"{name} is {given}; allowed for GGUF: {', '.join(_TYPES)}")
        kinds[name] = gguf.GGMLQuantizationType[_TYPES[kind]]
        try:
            size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name]))
        except ValueError as error:
            raise ValueError(f"dtype is {dtype!r}, but {name} has shape {list(tensor.shape)}: {error}") from None
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
    if gguf.GGMLQuantizationType.Q8_0 in kinds.values():
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with replacing(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            values = tensor.detach().cpu().float().contiguous().numpy()
            with np.errstate(over="ignore"):
                written = gguf.quantize(values, kinds[name])
            if written.dtype == np.float16 and not np.isfinite(written).all():
                raise ValueError(f"{name} has values that float16 can't hold; allowed: float32, bfloat16, q8_0")
            writer.write_tensor_data(written)
        writer.close()
