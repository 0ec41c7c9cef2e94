"""Cross-entropy on the CPU, by a C++ kernel that writes the gradient over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.backends.cpu.extension import kernels, threads


def cross_entropy(logits: Tensor, target: Tensor, scale: float, with_gradient: bool) -> Tensor:
    """-log softmax(scale · logits)[target] [M], float32, of contiguous logits [M, V] and target [M], int64 from 0 to
    V - 1. Its gradient is written over the logits, if asked for."""
    nll = logits.new_empty(target.shape, dtype=torch.float32)
    kernels.cross_entropy(
        logits=logits, target=target, scale=scale, with_gradient=with_gradient, nll=nll, num_threads=threads()
    )
    return nll
