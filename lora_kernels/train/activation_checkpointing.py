"""Activations that are computed again in backward, of whole layers of transformers' models."""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def enable_checkpointing(model: nn.Module) -> None:
    """Have transformers' layers recompute their activations in backward. Twice does no harm.

    Not by transformers' own switch, which acts in training mode only: the base model of DPO, PPO and reward models is
    in evaluation mode. Raises ValueError for a model without such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no layers that can recompute activations")
    for layer in layers:
        if not hasattr(layer.forward, "recomputing"):
            layer.forward = MethodType(_recomputing(layer.forward.__func__), layer)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        # Not reentrant: a reentrant checkpoint whose inputs need no gradient, as with frozen embeddings, yields none.
        return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)

    vars(wrapped)["recomputing"] = True
    return wrapped
