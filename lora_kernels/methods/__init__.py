"""Fine-tuning methods behind one interface: what is put into a model, what of it is trainable, how it is merged.

A method is a module of this package and a record in `lora_kernels.methods.registry`, which says what belongs to it.
`model.adapter_config` is the config that was injected.
"""

from __future__ import annotations

from lora_kernels.lazy import exports
from lora_kernels.methods.registry import METHODS

_APPLY = ("adapter_config", "adapters_disabled", "inject", "merge", "training_hook")
_HOME = {method.config_name: method.config.partition(".")[0] for method in METHODS.values()}
__getattr__, __dir__ = exports(__name__, {**_HOME, **dict.fromkeys(_APPLY, "apply"), "trainable_summary": "lora"})
