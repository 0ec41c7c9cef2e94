"""The records of the fine-tuning methods say what is there, and what the settings of a run mean."""

import dataclasses
import importlib

import pytest

from lora_kernels import AdaLoRAConfig, FullConfig, LoRAConfig, PrefixConfig, PromptConfig
from lora_kernels.methods.registry import METHODS, method_of
from lora_kernels.train.adapter import method_config
from lora_kernels.train.config import SFTConfig, TrainConfig

LORA = {"r": 3, "lora_alpha": 5.0, "lora_dropout": 0.25, "use_rslora": True, "init": "gaussian"}
TARGETS = {"target": "q_proj, v_proj", "exclude_modules": r".*\.0\..*"}
NAMED = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"}
ADALORA = {
    **{"init_r": 7, "target_r": 4, "tinit": 1, "tfinal": 2, "delta_t": 3},
    **{"beta1": 0.5, "beta2": 0.75, "orth_reg_weight": 0.125, "lora_alpha": 5.0, "lora_dropout": 0.25},
}
TOKENS = {"num_virtual_tokens": 3, "init": "text", "init_text": "red"}
# {method: (settings of a run, the config that they mean)}
MEANT = {
    "lora": ({**LORA, **TARGETS}, LoRAConfig(**LORA, **NAMED, modules_to_save=())),
    "qlora": ({**LORA, **TARGETS, "double_quant": True}, LoRAConfig(**LORA, **NAMED, modules_to_save=())),
    "dora": ({**LORA, **TARGETS}, LoRAConfig(**LORA, **NAMED, modules_to_save=(), use_dora=True)),
    "adalora": ({**ADALORA, **TARGETS}, AdaLoRAConfig(**ADALORA, **NAMED)),
    "full": (TARGETS, FullConfig(["q_proj", "v_proj"], r".*\.0\..*")),
    "prefix": ({**TOKENS, "mlp_hidden": 6}, PrefixConfig(**TOKENS, mlp_hidden=6)),
    "prompt": (TOKENS, PromptConfig(**TOKENS)),
}


def names(config_class):
    return {field.name for field in dataclasses.fields(config_class)}


@pytest.mark.parametrize("name", METHODS)
def test_a_record_names_what_is_there(name):
    method = METHODS[name]
    config_class = getattr(method.module, method.config_name)
    files = importlib.import_module(f"lora_kernels.io.{method.files}")
    assert (
        callable(method.module.inject) and callable(method.module.merge) and callable(method.module.adapters_disabled)
    )
    assert callable(files.save_adapter) and callable(files.load_adapter)
    assert {*method.settings, *method.refuses, *method.described, *method.renamed.values()} <= names(TrainConfig)
    assert {*method.renamed, *method.fixed} <= names(config_class)
    assert method.defaults.keys() <= {*method.settings}


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_a_run_mean_a_config(name):
    settings, config = MEANT[name]
    assert method_config(SFTConfig(model="m", data="d", method=name, **settings)) == config
    assert method_of(config).config == METHODS[name].config


def test_other_configs_belong_to_no_method():
    class LoRAConfig:
        pass

    with pytest.raises(TypeError, match="config is a .*LoRAConfig; allowed: AdaLoRAConfig, FullConfig, LoRAConfig"):
        method_of(LoRAConfig())
