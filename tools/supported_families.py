"""Tiny models of transformers' families, for tools/supported_models.py: the sizes that make each small.

A causal language model is made from its configuration class. `SIZES` gives the value of every field by that name which
the class has; `FIELDS` what a family needs besides, or instead. `OTHERS` are models of other kinds, by class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 128
# Longer than the window of the families that have one.
WINDOW, LENGTH = 16, 24

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Only where the class has a value of its own for it.
PARTS: dict[str, Any] = {
    "layer_types": ["full_attention", "full_attention"],
    # Mixtures of experts.
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "num_dense_layers": 1,
    # Multi-head latent attention.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    # Linear attention and state spaces.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_dt_rank": 8,
    "ssm_state_size": 16,
    "state_size": 8,
    "time_step_rank": 8,
    "n_groups": 1,
    # Other names of the sizes above.
    "d_model": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "rotary_dim": 8,
    "ffn_dim": 128,
    "dff": 128,
    "d_inner": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DECODER = {"is_decoder": True}
_LINEAR_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_MLA = {"head_dim": 8, "num_key_value_heads": 4}
_GEMMA4 = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
}
FIELDS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "bart": {},
    "beam": {},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {},
    "biogpt": {},
    "bitnet": {},
    "blenderbot": {},
    "blenderbot-small": {},
    "bloom": {},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "camembert": {**_DECODER, "max_position_embeddings": 130},
    "codegen": {},
    "cohere": {},
    "cohere2": {},
    "cohere2_moe": {},
    "cohere_compass_text": {
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cpmant": {"dim_head": 16, "dim_ff": 128, "prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    "ctrl": {},
    "cwm": {},
    "data2vec-text": {**_DECODER, "max_position_embeddings": 130},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {**_MLA, "head_dim": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 8,
    },
    "diffllama": {},
    "doge": {},
    "dots1": {"moe_intermediate_size": 64, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"pyramid_num_routed": [-1, 4], "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "electra": {**_DECODER, "embedding_size": 64},
    "emu3": {},
    "ernie": _DECODER,
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_k": 2},
    "exaone4": {"sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone_moe": {},
    "falcon": {"num_kv_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_expand": 1},
    "falcon_mamba": {},
    "flex_olmo": {},
    "flint": {},
    "fuyu": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3": {},
    "gemma3_text": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n": {},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_assistant": {},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {},
    "gemma4_unified_assistant": {},
    "gemma4_unified_text": {},
    "git": {},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "got_ocr2": {},
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_neox": {},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "gptj": {},
    "granite": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"shared_intermediate_size": 64},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": [2, 2]},
    "hy_v3": {},
    "hy_v4": {},
    "hyperclovax": {},
    "inkling2_text": {},
    "inkling_text": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        "use_mamba_kernels": False,
    },
    "jetmoe": {"kv_channels": 16},
    "kimi_linear": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2": {"block_ff_dim": 128, "block_multiple_of": 16, "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {},
    "llama": {},
    "llama4": {},
    "llama4_text": {
        **{"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
        **{"interleave_moe_layer_step": 2, "attention_chunk_size": 64},
    },
    "longcat_flash": {
        **{"num_layers": 1, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64, "zero_expert_num": 2, "moe_topk": 2},
        **_MLA,
    },
    "mamba": {},
    "mamba2": {"num_heads": 8, "chunk_size": 16, "expand": 2, "head_dim": 16, "state_size": 16},
    "marian": {},
    "mbart": {},
    "megatron-bert": _DECODER,
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": {"num_key_value_heads": 4},
    "minimax": {"layer_types": ["full_attention", "linear_attention"], "block_size": 16},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "mllama": {},
    "modernbert-decoder": {"local_attention": WINDOW},
    "moshi": {},
    "moss_transcribe_diarize": {},
    "mpt": {},
    "musicgen": {},
    "musicgen_melody": {},
    "mvp": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo_hybrid": _LINEAR_LAYERS,
    "olmoe": {},
    "openai-gpt": {},
    "opt": {"word_embed_proj_dim": 32},
    "pegasus": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phi4_multimodal": {},
    "phimoe": {},
    "plbart": {},
    "prophetnet": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5": {},
    "qwen3_5_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_5_text": _LINEAR_LAYERS,
    "qwen3_moe": {},
    "qwen3_next": _LINEAR_LAYERS,
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 32, "block_types": ["recurrent", "attention"]},
    "reformer": {**_DECODER, "axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8},
    "rembert": _DECODER,
    "roberta": {**_DECODER, "max_position_embeddings": 130},
    "roberta-prelayernorm": {**_DECODER, "max_position_embeddings": 130},
    "roc_bert": {**_DECODER, "pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "roformer": _DECODER,
    "rwkv": {"attention_hidden_size": 64, "context_length": 128},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "trocr": {},
    "vaultgemma": {},
    "whisper": {},
    "xglm": {"attention_heads": 4},
    "xlm": {},
    "xlm-roberta": {**_DECODER, "max_position_embeddings": 130},
    "xlm-roberta-xl": {**_DECODER, "max_position_embeddings": 130},
    "xlnet": {},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "xmod": {**_DECODER, "max_position_embeddings": 130, "default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {
        **{
            "num_hidden_layers": 3,
            "layer_types": None,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "n_mamba_heads": 2,
        },
        **{"use_mamba_kernels": False, "attention_hidden_size": 128, "attention_head_dim": 32},
    },
    "zamba2": {
        **{"num_mem_blocks": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1},
        **{"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "attention_head_dim": 32},
        **{"attention_hidden_size": 128, "kv_channels": 16},
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"]},
}


_TEXT = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0},
}
_DECODER_PART = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_T5 = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "decoder_start_token_id": 0,
}
_SEQ2SEQ = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48},
    **{"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
_BART = {**_SEQ2SEQ, "max_position_embeddings": 64}
_VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 28, "patch_size": 14},
}
_SPEECH = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8)},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    "mask_time_prob": 0.0,
}
_GEMMA_PART = {**_DECODER_PART, "head_dim": 8, "query_pre_attn_scalar": 8}
_IMAGE_TOKEN = 88
_MERGED_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN_TOKENS = {"image_token_id": 88, "video_token_id": 89, "vision_start_token_id": 86, "vision_end_token_id": 87}
# name: (class, fields of its configuration, name of its inputs)
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "albert": ("AlbertForMaskedLM", {**_TEXT, "embedding_size": 16}, "text"),
    "bert (masked)": ("BertForMaskedLM", _TEXT, "text"),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False},
        "text",
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        "text",
    ),
    "electra (tokens)": ("ElectraForTokenClassification", {**_TEXT, "embedding_size": 16}, "text"),
    "esm": ("EsmForMaskedLM", {**_TEXT, "mask_token_id": 4}, "text"),
    "longformer": ("LongformerForMaskedLM", {**_TEXT, "attention_window": 4}, "text"),
    "modernbert": ("ModernBertForMaskedLM", _TEXT, "text"),
    "mpnet": ("MPNetForMaskedLM", _TEXT, "text"),
    "roberta (classes)": ("RobertaForSequenceClassification", {**_TEXT, "max_position_embeddings": 66}, "text"),
    "t5 (encoder)": ("T5EncoderModel", _T5, "text"),
    "bart (seq2seq)": ("BartForConditionalGeneration", _BART, "pair"),
    "blenderbot (seq2seq)": ("BlenderbotForConditionalGeneration", _BART, "pair"),
    "led": (
        "LEDForConditionalGeneration",
        {**_SEQ2SEQ, **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 64)}
        | {"attention_window": 4},
        "pair",
    ),
    "longt5": ("LongT5ForConditionalGeneration", _T5, "pair"),
    "m2m_100": ("M2M100ForConditionalGeneration", _BART, "pair"),
    "marian (seq2seq)": ("MarianMTModel", _BART, "pair"),
    "mbart (seq2seq)": ("MBartForConditionalGeneration", _BART, "pair"),
    "mt5": ("MT5ForConditionalGeneration", _T5, "pair"),
    "pegasus (seq2seq)": ("PegasusForConditionalGeneration", _BART, "pair"),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", {**_T5, "num_experts": 2}, "pair"),
    "t5": ("T5ForConditionalGeneration", _T5, "pair"),
    "t5 (gated)": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "pair",
    ),
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        {
            **{"encoder": _GEMMA_PART, "decoder": {**_GEMMA_PART, "cross_attention_hidden_size": 32}},
            "vocab_size": VOCABULARY,
        },
        "pair",
    ),
    "umt5": ("UMT5ForConditionalGeneration", _T5, "pair"),
    "beit": ("BeitForImageClassification", _VISION, "image"),
    "deit": ("DeiTForImageClassification", _VISION, "image"),
    "dinov2": (
        "Dinov2ForImageClassification",
        {name: value for name, value in _VISION.items() if name != "intermediate_size"},
        "image",
    ),
    "vit": ("ViTForImageClassification", _VISION, "image"),
    "clip": ("CLIPModel", {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 16}, "text and image"),
    "siglip": ("SiglipModel", {"text_config": _TEXT, "vision_config": _VISION}, "text and image"),
    "blip": (
        "BlipForConditionalGeneration",
        {
            "text_config": {**_TEXT, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2},
            "vision_config": _VISION,
        },
        "text and image",
    ),
    "gemma3 (image)": (
        "Gemma3ForConditionalGeneration",
        {
            **{"text_config": {**_DECODER_PART, "head_dim": 8}, "vision_config": {**_VISION, "vision_use_head": False}},
            **{"mm_tokens_per_image": 4, "image_token_index": _IMAGE_TOKEN},
        },
        "text with image",
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_DECODER_PART},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": _IMAGE_TOKEN,
        },
        "text with image",
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma", **_DECODER_PART, "head_dim": 8},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
            **{"image_token_index": _IMAGE_TOKEN, "projection_dim": 32},
        },
        "text with image and suffix",
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**_DECODER_PART, "rope_parameters": _MERGED_ROPE},
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14},
            **_QWEN_TOKENS,
        },
        "text with patches",
    ),
    "whisper (seq2seq)": (
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40},
        "spectrogram",
    ),
    "hubert": ("HubertForCTC", _SPEECH, "sound"),
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH, "sound"),
}


def build(family: str) -> tuple[Any, dict[str, Any]]:
    """(model with random weights, inputs of its forward)."""
    import transformers

    generator = torch.Generator().manual_seed(4)
    if family not in OTHERS:
        model = transformers.AutoModelForCausalLM.from_config(config_of(family))
        return model, {"input_ids": _tokens(generator, 2, LENGTH), "use_cache": False}
    name, fields, inputs = OTHERS[family]
    kind = getattr(transformers, name)
    return kind(kind.config_class(**fields)), _inputs(inputs, generator)


def _tokens(generator: torch.Generator, rows: int, length: int) -> Tensor:
    return torch.randint(3, 80, (rows, length), generator=generator)


def _inputs(kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids, decoder_ids = _tokens(generator, 2, 12), _tokens(generator, 2, 9)
    if kind == "text":
        return {"input_ids": ids}
    if kind == "pair":
        return {"input_ids": ids, "decoder_input_ids": decoder_ids}
    if kind == "image":
        return {"pixel_values": random(2, 3, 28, 28)}
    if kind == "text and image":
        return {"input_ids": ids, "pixel_values": random(2, 3, 28, 28)}
    if kind == "spectrogram":
        return {"input_features": random(2, 8, 40), "decoder_input_ids": decoder_ids}
    if kind == "sound":
        return {"input_values": random(2, 400)}
    ids = ids[:1]
    # An image of four tokens.
    ids[0, 3:7] = _IMAGE_TOKEN
    if kind == "text with image":
        return {"input_ids": ids, "pixel_values": random(1, 3, 28, 28)}
    if kind == "text with image and suffix":
        # As PaliGemma's processor marks them: a prefix that sees all of itself, and the suffix to learn. Without the
        # marks, a token sees later ones too when the model is run, but not when it is traced (transformers 5.23).
        suffix = (torch.arange(12) >= 9).long()[None]
        return {"input_ids": ids, "pixel_values": random(1, 3, 28, 28), "token_type_ids": suffix}
    ids[0, 2], ids[0, 7] = 86, 87
    return {
        "input_ids": ids,
        "pixel_values": random(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == _IMAGE_TOKEN).int(),
    }


def config_of(family: str) -> Any:
    """The configuration of a tiny causal language model."""
    from transformers import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[family], FIELDS[family])


def _tiny(kind: Any, changes: dict[str, Any]) -> Any:
    defaults = kind()
    default = defaults.to_dict()
    fields = {name: value for name, value in SIZES.items() if _takes(kind, default, name)}
    fields |= {
        name: value
        for name, value in PARTS.items()
        if default.get(kind.attribute_map.get(name, name)) is not None and _takes(kind, default, name)
    }
    for name in kind.sub_configs:
        if (part := getattr(defaults, name)) is not None:
            fields[name] = _tiny(type(part), changes.get(name, {}))
    # None leaves a field to the class.
    own = {name: value for name, value in changes.items() if name not in kind.sub_configs}
    return kind(**{name: value for name, value in (fields | own).items() if value is not None})


def _takes(kind: Any, default: dict[str, Any], name: str) -> bool:
    """Whether the class has a field of that name, or of one that it maps to, and not only a property."""
    name = kind.attribute_map.get(name, name)
    found = getattr(kind, name, None)
    return name in default and not (isinstance(found, property) and found.fset is None)
