"""Our kernels in Axolotl: `plugins: [lora_kernels.integrations.axolotl.FusePeft]` in its YAML.

By the interface of `axolotl.integrations.base.BasePlugin`: the class is named in the configuration, `register` sees
that before it is checked, `post_lora_load` the model with its adapter.
"""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin

from lora_kernels.integrations.peft import fuse_peft

# Axolotl's own kernels for LoRA, which it turns on by itself where nothing is said of them.
_THEIRS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class FusePeft(BasePlugin):
    """Applies `fuse_peft` to the model when its adapter is there, and logs what was fused.

    Axolotl's kernels for the same layers are turned off. Raises ValueError where the configuration asks for one.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        for name in _THEIRS:
            if cfg.get(name):
                raise ValueError(f"{name} is {cfg[name]!r}; allowed beside {type(self).__qualname__}: false")
            cfg[name] = False

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        logging.getLogger(__name__).info("%s", fuse_peft(model))
