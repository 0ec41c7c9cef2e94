"""Cases of causal attention with grouped-query heads: SmolLM2-135M's, rows of several lengths, against torch's."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lora_kernels.bench.cases import Case, Settings
from lora_kernels.bench.measure import Step
from lora_kernels.ops.attention import causal_attention

# torch: the keys and values of each group copied for its query heads first; torch-gqa: torch sees to that.
CONTENDERS = ("torch", "torch-gqa", "ours")
H, KV, D = 9, 3, 64
TOKENS = 2048


def _repeated(t: Tensor, group: int) -> Tensor:
    return t.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)


def _forward(contender: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if contender == "ours":
        return causal_attention(q, k, v)
    if contender == "torch-gqa":
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(q, _repeated(k, group), _repeated(v, group), is_causal=True)


def make_step(contender: str, B: int, T: int, dtype: torch.dtype) -> Step:
    """One forward and backward over the transposed views that a decoder has; it returns dq, dk and dv."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(B, T, n, D, generator=generator).to(dtype).transpose(1, 2) for n in (H, KV, KV, H))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    return lambda: torch.autograd.grad(_forward(contender, *leaves), leaves, dout)


def cases(settings: Settings) -> Iterator[Case]:
    tokens, lengths = (TOKENS // 4, (128, 512)) if settings.quick else (TOKENS, (128, 512, 2048))
    for T in lengths:
        B = tokens // T
        yield Case(
            "attention",
            {"pass": "forward+backward", "B": B, "H": H, "KV": KV, "T": T, "D": D},
            {name: functools.partial(make_step, name, B, T, settings.dtype) for name in CONTENDERS},
            base="torch",
            # Two products forward and five backward, each of half a square.
            flops=7.0 * B * H * T * T * D,
        )
