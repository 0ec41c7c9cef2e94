"""The optimizer's case: one LoRA+ step over the adapters of SmolLM2-135M, clipping included, against torch's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_kernels.bench.cases import Case, Settings
from lora_kernels.bench.measure import Step
from lora_kernels.optim import LoRAPlusAdamW

LAYERS = 30
# out_features, in_features of q, k, v, o, gate, up and down
LINEARS = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
# foreach and fused: clip_grad_norm_ and torch.optim.AdamW of that kind, in two groups
CONTENDERS = ("ours", "foreach", "fused")
LR, LR_RATIO, MAX_GRAD_NORM = 1e-4, 16, 1.0


def make_step(contender: str, layers: int, R: int) -> Step:
    """A function that clips and steps over fresh adapters with gradients of norm above max_grad_norm."""
    generator = torch.Generator().manual_seed(0)
    lora_a = [nn.Parameter(torch.randn(R, K, generator=generator)) for _ in range(layers) for _, K in LINEARS]
    lora_b = [nn.Parameter(torch.randn(N, R, generator=generator)) for _ in range(layers) for N, _ in LINEARS]
    parameters = [*lora_a, *lora_b]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-2
    groups = [{"params": lora_a, "lr": LR}, {"params": lora_b, "lr": LR * LR_RATIO}]
    if contender == "ours":
        return LoRAPlusAdamW(groups, lr=LR, lr_ratio=1, max_grad_norm=MAX_GRAD_NORM).step
    options: dict[str, Any] = {contender: True}
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **options)

    def step() -> None:
        # Scaled by this in place, the gradients have the norm 1 from the second round on: the same work.
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM, foreach=True)
        optimizer.step()

    return step


def cases(settings: Settings) -> Iterator[Case]:
    layers, R = 2 if settings.quick else LAYERS, 16
    elements = layers * R * sum(map(sum, LINEARS))
    yield Case(
        "adamw",
        {"tensors": 2 * layers * len(LINEARS), "elements": elements},
        {name: functools.partial(make_step, name, layers, R) for name in CONTENDERS},
        base="ours",
        # Parameter, gradient and two moments are read, the first and the moments written, all in float32; the norm
        # reads the gradient once more.
        nbytes=4.0 * 8 * elements,
    )
