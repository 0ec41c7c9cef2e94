"""Training and evaluation mode of a model's parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_kernels.methods.lora import lora_modules


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[nn.Module]:
    """Inside the `with` block all of `module` is in evaluation mode; afterwards each part is in the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, training in modes:
            part.training = training


def train_adapters(model: nn.Module, mode: bool = True) -> nn.Module:
    """Puts LoRA adapters in use into training mode (`mode`), and all else in `model` into evaluation mode.

    So lora_dropout acts, and nothing random of the base model does: no dropout of its own, be it a module or a number
    that a forward reads, no skipped layers, no noise of a router. Returns the model.
    """
    model.eval()
    for _, layer in lora_modules(model):
        layer.train(mode)
    return model
