"""Our adapter directories by vLLM's rules, as its documentation and its errors state them; vLLM needs a GPU.

It reads of adapter_config.json `r`, `lora_alpha`, `target_modules`, which must be there, `use_rslora`, and refuses
`bias`, `use_dora` and `modules_to_save`. It doesn't know rank_pattern and alpha_pattern. Of the tensors it takes
`base_model.model.<path>.lora_A.weight` and `.lora_B.weight`, where the last name of the path is a linear layer's.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import logits, perturb, tiny_model

from lora_kernels import AdaLoRAConfig, LoRAConfig, inject, save_adapter

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def saved(directory, kind="llama", **arguments):
    """(adapter_config.json, the tensors, our logits)"""
    model = inject(tiny_model(kind), LoRAConfig(**arguments))
    perturb(model)
    save_adapter(model, directory)
    return *files(directory), logits(model)


def files(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "lora_dropout": 0.1},
        {"r": 5, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": r".*layers\.1\..*(k|up)_proj"},
    ],
)
def test_what_vllm_reads_gives_our_logits(tmp_path, kind, arguments):
    config, tensors, expected = saved(tmp_path, kind, **arguments)
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int) and config["target_modules"]
    assert config["bias"] == "none" and config["use_dora"] is False and config["modules_to_save"] is None
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    model = tiny_model(kind)
    assert (logits(model) - expected).abs().max() > 1e-3
    paths = {key.removesuffix(f".lora_{part}.weight") for key in tensors for part in "AB"} - tensors.keys()
    assert len(tensors) == 2 * len(paths)
    for path in paths:
        lora_a, lora_b = (tensors[f"{path}.lora_{part}.weight"] for part in "AB")
        prefix, _, name = path.partition("base_model.model.")
        assert prefix == "" and name.rpartition(".")[2] in LINEAR
        assert len(lora_a) == lora_b.shape[1] == config["r"]
        with torch.no_grad():
            model.get_submodule(name).weight += scaling * lora_b @ lora_a
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_what_vllm_can_t_do_is_said_where_it_looks(tmp_path):
    config, _, _ = saved(tmp_path / "dora", r=2, use_dora=True)
    assert config["use_dora"] is True
    config, _, _ = saved(tmp_path / "head", r=2, modules_to_save=["lm_head"])
    assert config["modules_to_save"] == ["lm_head"]
    model = inject(tiny_model("llama"), AdaLoRAConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1))
    save_adapter(model, tmp_path / "adalora")
    config, tensors = files(tmp_path / "adalora")
    assert config["peft_type"] == "ADALORA" and not any(key.endswith(".weight") for key in tensors)
