"""The peers' layers, and the formulations that they use, over one frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.bench.cases import DROPOUT_P, SCALING


def eager_lora(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float) -> Tensor:
    """LoRA as one writes it down in torch, the low-rank branch in the dtype of the adapters."""
    h = F.linear(F.dropout(x, dropout_p).to(lora_a.dtype), lora_a)
    return F.linear(x, weight) + SCALING * F.linear(h, lora_b).to(x.dtype)


class AddmmLoRA(torch.autograd.Function):
    """The usual fused formulation: no dropout, and the low-rank products added in place by addmm."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b):
        h = x @ lora_a.T
        ctx.save_for_backward(x, h, weight, lora_a, lora_b)
        return F.linear(x, weight).addmm_(h, lora_b.T, alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):
        x, h, weight, lora_a, lora_b = ctx.saved_tensors
        dh = SCALING * (dy @ lora_b)
        dx = (dy @ weight).addmm_(dh, lora_a)
        return dx, None, dh.T @ x, SCALING * (dy.T @ h)


def peft_layer(weight: Tensor, R: int, **options) -> torch.nn.Module:
    """PEFT's layer over a frozen weight [N, K], with float32 adapters; `options` of its LoraConfig."""
    N, K = weight.shape
    model = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False, device="meta"))
    model[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    return _inject(model, R, **options)


def bitsandbytes_linear(weight: Tensor) -> torch.nn.Module:
    """bitsandbytes' layer over its NF4 of a weight [N, K]."""
    import bitsandbytes as bnb

    N, K = weight.shape
    linear = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    # It quantises on the way to the device.
    return linear.to(weight.device)


def peft_nf4_layer(weight: Tensor, R: int, **options) -> torch.nn.Module:
    """The same over bitsandbytes' NF4 of the weight."""
    model: Any = torch.nn.Sequential(bitsandbytes_linear(weight))
    model.is_loaded_in_4bit = True
    return _inject(model, R, **options)


def _inject(model: torch.nn.Module, R: int, **options) -> torch.nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    options = {"lora_dropout": DROPOUT_P} | options
    config = LoraConfig(r=R, lora_alpha=int(SCALING * R), target_modules=["0"], **options)
    layer = inject_adapter_in_model(config, model)[0]
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return layer.train()
