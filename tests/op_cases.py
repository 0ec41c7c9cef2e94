"""Inputs of the ops of a decoder, and what their results are compared with."""

import torch
from torch import Tensor

from lora_kernels.testing import assert_close_to_reference


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype, contiguous: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = [3 * torch.randn(shape, generator=generator) for _ in range(count)]
    if not contiguous:
        made = [torch.stack([t, t], dim=-1)[..., 0] for t in made]
    return [t.to(dtype) for t in made]


def check(actual: list[Tensor], function, inputs: list[Tensor]) -> None:
    """Results and gradients `actual` by the tolerance rule; function(*inputs) is differentiable, the last is dy."""
    results = []
    for dtype in (inputs[0].dtype, torch.float64):
        *leaves, dy = [t.detach().to(dtype) for t in inputs]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for index, (a, eager, exact) in enumerate(zip(actual, *results, strict=True)):
        assert_close_to_reference(a, eager, exact, f"result {index}")
