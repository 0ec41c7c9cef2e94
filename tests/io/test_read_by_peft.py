"""What PEFT makes of our files where a model isn't called as a language model is, and where it looks for experts."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from tiny_models import perturb, tiny_model
from transformers import conversion_mapping

from lora_kernels import AdaLoRAConfig, LoRAConfig, inject, load_adapter, save_adapter

transformers.logging.set_verbosity_error()
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
AUDIO = {
    **{"vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
SIZES = {
    **{"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}


def whisper():
    config = transformers.WhisperConfig(**AUDIO, num_mel_bins=8, max_source_positions=20, max_target_positions=40)
    return transformers.WhisperForConditionalGeneration(config)


def speech_to_text():
    sizes = {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 40, "max_target_positions": 40}
    return transformers.Speech2TextForConditionalGeneration(transformers.Speech2TextConfig(**AUDIO, **sizes))


def blip():
    text = {**SIZES, "sep_token_id": 2, "max_position_embeddings": 64}
    config = transformers.BlipConfig(text_config=text, vision_config={**EYES, "patch_size": 14})
    return transformers.BlipForConditionalGeneration(config)


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**AUDIO, max_position_embeddings=64))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, max_position_embeddings=64))


CASES = {
    "whisper": (whisper, {"input_features": torch.ones(1, 8, 40), "decoder_input_ids": IDS}, None),
    "speech_to_text": (speech_to_text, {"input_features": torch.ones(1, 40, 8), "decoder_input_ids": IDS}, None),
    "blip": (blip, {"input_ids": IDS, "pixel_values": torch.ones(1, 3, 28, 28)}, None),
    "bert": (bert, {"input_ids": IDS}, None),
    "bart": (bart, {"input_ids": IDS, "decoder_input_ids": IDS}, "SEQ_2_SEQ_LM"),
    "llama": (lambda: tiny_model("llama"), {"input_ids": IDS}, "CAUSAL_LM"),
}
AUTO = {None: "AutoPeftModel", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM", "CAUSAL_LM": "AutoPeftModelForCausalLM"}


@pytest.mark.parametrize("kind", CASES)
def test_the_task_type_is_one_that_peft_can_call_the_model_by(kind, tmp_path):
    make, inputs, task = CASES[kind]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    kind_of_model = type(make())
    model = inject(kind_of_model.from_pretrained(tmp_path / "base").eval(), LoRAConfig(r=2))
    perturb(model, 0.1)
    with torch.no_grad():
        want = model(**inputs).logits
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == task
    base = kind_of_model.from_pretrained(tmp_path / "base")
    loaded = [
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
        getattr(peft, AUTO[task]).from_pretrained(str(tmp_path / "adapter"), local_files_only=True),
    ]
    for theirs in loaded:
        with torch.no_grad():
            torch.testing.assert_close(theirs.eval()(**inputs).logits, want, rtol=1e-4, atol=1e-5)


def mixture(kind):
    own = {
        "deepseek_v3": {
            **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
            **{"first_k_dense_replace": 1, "moe_intermediate_size": 32, "num_key_value_heads": 4},
        },
        "qwen2_moe": {
            **{"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            "shared_expert_intermediate_size": 32,
        },
        "minimax": {"num_key_value_heads": 2, "num_local_experts": 4, "block_size": 8},
        "llama": {"num_key_value_heads": 2},
    }[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **own)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rewritten_by_peft(model, directory):
    """Whether PEFT puts the adapters of the file elsewhere, or refuses to."""
    config = peft.LoraConfig.from_pretrained(directory)
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return True
    return bool(config.target_parameters)


TARGETS = [
    "all-linear",
    ["q_a_proj", "q_proj"],
    ["down_proj"],
    r".*layers\.0.*(up_proj|gate_proj|k_proj)",
    ["gate_proj"],
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen2_moe", "minimax", "llama"])
def test_save_says_which_adapters_peft_takes_for_experts(kind, targets, tmp_path):
    base = mixture(kind)
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    if isinstance(targets, list):
        targets = [name for name in targets if name in names]
    model = inject(mixture(kind), LoRAConfig(r=2, target_modules=targets or ["q_proj"], init="both_gaussian"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_adapter(model, tmp_path)
    assert bool(said) == rewritten_by_peft(base, tmp_path)
    for warning in said:
        assert kind in str(warning.message) and "_proj" in str(warning.message)
    with torch.no_grad():
        assert torch.equal(load_adapter(base, tmp_path)(IDS).logits, model(IDS).logits)


def test_adalora_as_plain_lora_says_so_too(tmp_path):
    model = inject(mixture("deepseek_v3"), AdaLoRAConfig(init_r=2, target_r=2, target_modules=["up_proj", "q_a_proj"]))
    save_adapter(model, tmp_path / "adalora")
    with pytest.warns(UserWarning, match=r"adapters on model.layers.\*.mlp.up_proj, .* of a deepseek_v3"):
        save_adapter(model, tmp_path / "lora", as_lora=True)


def test_pefts_table_of_mixtures_is_where_we_look_for_it():
    assert conversion_mapping._MODEL_TO_CONVERSION_PATTERN["deepseek_v3"] == "qwen2_moe"
