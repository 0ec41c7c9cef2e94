"""Every fine-tuning method, in one record each: its code, its files, its settings, and what can be done with it.

Code is named and not imported, so that a command line can list the methods without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any, Literal

_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Method:
    """What the package knows of a method.

    Attributes:
        config: "module.Class" of its config, below `lora_kernels.methods`. The module has `inject(model, config,
            tokenizer)`, `merge(model)` and `adapters_disabled(model)`, and `training_hook(model, total_step)` where the
            method takes part in the steps of a training.
        files: the module of `lora_kernels.io` with `save_adapter(model, directory)` and `load_adapter(model, directory,
            trainable)`, and `save_as_lora(model, directory)` where its adapters can be written as plain LoRA.
        peft_type: what adapter_config.json says; None where the files are a whole model.
        lr: the peak learning rate that works with AdamW.
        settings: of a training run, those that this method takes and not every one does.
        defaults: values of settings that the user has left out.
        refuses: settings that all methods take but this one.
        renamed: {argument of the config's class: setting}, where they have other names; fixed: {argument: value}.
        described: settings that the files of an adapter hold, for a run that goes on from one; empty where none can.
        quantize: how the base model is loaded; dtype: the only one that the method can be trained in.
        has_lora_b: LoRA+ has a matrix to speed up, and merging may quantise.
        keeps_base: the model without what was trained is still there. named: a model may hold several adapters.
        graphed: a training step can be CUDA graphs.
    """

    config: str
    files: str
    lr: float
    peft_type: str | None = None
    settings: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    described: tuple[str, ...] = ()
    quantize: str | None = None
    dtype: Literal["float32"] | None = None
    has_lora_b: bool = False
    keeps_base: bool = True
    named: bool = False
    graphed: bool = False

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"{_PACKAGE}.{self.config.partition('.')[0]}")

    @property
    def config_name(self) -> str:
        return self.config.partition(".")[2]

    def make_config(self, settings: Mapping[str, Any]) -> Any:
        """The config that the settings of a run mean. Raises ValueError as its class does."""
        kind = getattr(self.module, self.config_name)
        values = {each.name: settings.get(self.renamed.get(each.name, each.name)) for each in fields(kind)}
        return kind(**{name: value for name, value in values.items() if value is not None}, **self.fixed)


_LORA = Method(
    config="lora.LoRAConfig",
    files="peft",
    peft_type="LORA",
    lr=2e-4,
    settings=("target", "exclude_modules", "init"),
    defaults={"target": "all-linear", "init": "default"},
    renamed={"target_modules": "target"},
    # Heads have trainers of their own: what PPO puts beside the policy is its value model's.
    fixed={"modules_to_save": ()},
    described=("r", "lora_alpha", "use_rslora"),
    has_lora_b=True,
    named=True,
    graphed=True,
)
_PROMPT = Method(
    config="prompt.PromptConfig",
    files="peft_prompt",
    peft_type="PROMPT_TUNING",
    lr=3e-2,
    settings=("init", "init_text"),
    defaults={"init": "vocab"},
    described=("num_virtual_tokens",),
)
# By the name that the trainers know it by. Schulman et al. 2025 find LoRA's best learning rate about ten times that of
# full fine-tuning; virtual tokens need far more (Lester et al. 2021 take 0.3 with Adafactor).
METHODS: Mapping[str, Method] = {
    "adalora": Method(
        config="adalora.AdaLoRAConfig",
        files="peft_adalora",
        peft_type="ADALORA",
        lr=1e-3,
        settings=(
            *("target", "exclude_modules", "init_r", "target_r", "tinit", "tfinal", "delta_t", "beta1", "beta2"),
            "orth_reg_weight",
        ),
        defaults={"target": "all-linear"},
        refuses=("use_rslora",),
        renamed={"target_modules": "target"},
        has_lora_b=True,
    ),
    "dora": replace(_LORA, fixed={**_LORA.fixed, "use_dora": True}),
    "full": Method(
        config="full.FullConfig",
        files="whole_model",
        lr=2e-5,
        settings=("target", "exclude_modules"),
        defaults={"target": "all"},
        renamed={"modules": "target"},
        dtype="float32",
        keeps_base=False,
        graphed=True,
    ),
    "lora": _LORA,
    "prefix": replace(
        _PROMPT,
        config="prefix.PrefixConfig",
        peft_type="PREFIX_TUNING",
        lr=5e-3,
        settings=(*_PROMPT.settings, "mlp_hidden"),
    ),
    "prompt": _PROMPT,
    "qlora": replace(_LORA, settings=(*_LORA.settings, "double_quant"), quantize="nf4"),
}


def method_of(config: Any) -> Method:
    """The method that a config belongs to. Raises TypeError for anything else."""
    kind = type(config)
    for method in METHODS.values():
        if f"{_PACKAGE}.{method.config}" == f"{kind.__module__}.{kind.__qualname__}":
            return method
    allowed = sorted({method.config_name for method in METHODS.values()})
    raise TypeError(f"config is a {kind.__qualname__}; allowed: {', '.join(allowed)}")


def settings_of(methods: Mapping[str, Any]) -> set[str]:
    """The settings that some of these methods take, and others may not."""
    return {name for method in methods for name in (*METHODS[method].settings, *METHODS[method].described)}
