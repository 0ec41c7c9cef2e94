"""The plugin, against the interface that Axolotl documents: the package pins other versions of torch and PEFT."""

import importlib
import logging
import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_batch, tiny_model

from lora_kernels import unfuse_peft

NAME = "lora_kernels.integrations.axolotl"


@pytest.fixture
def plugin(monkeypatch):
    """As Axolotl makes it, of the name in the configuration."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {"register": lambda self, cfg: None})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME).FusePeft()
    del sys.modules[NAME]


def test_the_adapted_model_is_fused_and_the_report_logged(plugin, caplog):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        want = model(tiny_batch()).logits
        with caplog.at_level(logging.INFO):
            plugin.post_lora_load({}, model)
        torch.testing.assert_close(model(tiny_batch()).logits, want)
    assert "14 LoRA layers fused" in caplog.text
    unfuse_peft(model)


def test_axolotls_own_kernels_are_turned_off(plugin):
    cfg = {"adapter": "lora", "lora_o_kernel": False}
    plugin.register(cfg)
    assert cfg == {"adapter": "lora", **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)}
    with pytest.raises(ValueError, match="lora_qkv_kernel is True; allowed beside FusePeft: false"):
        plugin.register({"lora_qkv_kernel": True})
