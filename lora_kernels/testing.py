"""What the tests and benchmarks share: one tolerance rule and one maker of inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_close_to_reference(actual: Tensor, eager: Tensor, reference: Tensor, name: str) -> None:
    """max|actual - reference| ≤ 2·(max|eager - reference| + eps(dtype)·max|reference|), and all finite.

    ``reference`` is the float64 result and ``eager`` that of the plain torch version in the dtype of ``actual``, whose
    own rounding error sets the scale: a kernel may be at most twice as far off, plus two roundings of the result.
    """
    assert actual.shape == reference.shape, f"{name}: shape {list(actual.shape)}, expected {list(reference.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if reference.numel() == 0:
        return
    reference = reference.double()
    error = (actual.double() - reference).abs().max().item()
    eager_error = (eager.double() - reference).abs().max().item()
    allowed = 2 * (eager_error + torch.finfo(actual.dtype).eps * reference.abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (eager version: {eager_error:.3e})"


def lora_inputs(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = False,
    lora_e: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
    column_scale: bool = False,
) -> dict[str, Any]:
    """x, weight, lora_a, lora_b, bias, lora_e and column_scale (around 1, some negative) by name, of the sizes that a
    trained layer has, from a fixed seed of the device's generator."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    adapter_dtype = adapter_dtype or dtype
    inputs = {
        "x": normal(M, K, std=1.0, dtype=dtype),
        "weight": normal(N, K, std=K**-0.5, dtype=dtype),
        "lora_a": normal(R, K, std=K**-0.5, dtype=adapter_dtype),
        "lora_b": normal(N, R, std=R**-0.5, dtype=adapter_dtype),
        "bias": normal(N, std=1.0, dtype=dtype) if bias else None,
        "lora_e": normal(R, std=1.0, dtype=adapter_dtype) if lora_e else None,
        "column_scale": None,
    }
    if column_scale:
        scale = normal(N, std=0.3, dtype=torch.promote_types(dtype, torch.float32)).exp()
        scale[3::7] *= -1
        inputs["column_scale"] = scale
    return inputs
