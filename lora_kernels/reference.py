"""What every op means, in plain torch, in any floating dtype including float64.

This file is the oracle that all backends are tested against, and the documentation of their arithmetic.
Its functions have the signatures that every backend has, see `lora_kernels.backends.contract`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels.types import (
    NF4,
    AdamWGroup,
    AdapterGradients,
    Dropout,
    Gradients,
    Layers,
    Needs,
    Outputs,
    Projection,
)

name = "reference"
unavailable: str | None = None
MAX_LAYERS = sys.maxsize

# NormalFloat4 (Dettmers et al. 2023, QLoRA, section 3 and appendix E), the values that bitsandbytes uses.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Below it the reciprocal of a block's largest magnitude would overflow; such a block is quantised as if it had it.
NF4_SMALLEST_ABSMAX = 1e-38
# Block scales that share one scale of their own under double quantisation.
ABSMAX_BLOCK = 256


# Philox4x32 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11). Seven rounds are
# the fewest that pass BigCrush (its Table 2); the usual ten only add a margin that a dropout mask has no use for.
PHILOX_ROUNDS = 7
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def _mulhilo(multiplier: int, counter: Tensor) -> tuple[Tensor, Tensor]:
    # 16-bit halves of the multiplier keep every product below 2**48, inside a signed 64-bit integer.
    low = counter * (multiplier & 0xFFFF)
    high = counter * (multiplier >> 16) + (low >> 16)
    return (high >> 16) & _MASK32, ((high << 16) | (low & 0xFFFF)) & _MASK32


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit random words, as int64, for each counter (c0, c1, c2, c3) of int64 tensors holding 32-bit values."""
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """The threshold t: an element is dropped iff its 16 random bits are below t, so with probability t/65536."""
    return min(round(dropout_p * 65536), 65535)


def dropout_scale(dropout_p: float) -> float:
    """1/(1-p) for the probability t/65536 that is really used, so that the expectation is exact."""
    return 65536 / (65536 - dropout_threshold(dropout_p))


def keep_mask(rng: Tensor, dropout_p: float, M: int, K: int) -> Tensor:
    """The dropout mask as a function of (seed, offset) and the element's row and column only.

    ``rng`` is int64 [2] = (seed, offset). One Philox call serves eight neighbours of a row: key = seed, counter =
    (k // 8, m, offset); lane j = k % 8 takes the low half of word j, or the high half of word j - 4.

    Returns bool [M, K] on the device of ``rng``, True where x is kept.
    """
    seed, offset = (int(v) for v in rng.tolist())
    columns = torch.arange((K + 7) // 8, device=rng.device).expand(M, -1)
    rows = torch.arange(M, device=rng.device).unsqueeze(1).expand_as(columns)
    low, high = (torch.full_like(columns, word) for word in (offset & _MASK32, (offset >> 32) & _MASK32))
    words = torch.stack(philox4x32(columns, rows, low, high, (seed & _MASK32, (seed >> 32) & _MASK32)), dim=-1)
    lanes = torch.cat([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :K]
    return lanes >= dropout_threshold(dropout_p)


def drop(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    """keep_mask ∘ x / (1 - p) for x [M, K]."""
    if dropout_p == 0.0:
        return x
    if rng is None:
        raise ValueError(f"rng is None with dropout_p {dropout_p}; allowed: int64 [2], a seed and an offset")
    # where, not a product: a dropped inf or nan must not leak.
    return torch.where(keep_mask(rng, dropout_p, *x.shape).to(x.device), x * dropout_scale(dropout_p), 0.0)


def widened(t: Tensor) -> Tensor:
    """t in the dtype of sums: float32, or float64 if it is that."""
    return t if t.dtype == torch.float64 else t.float()


def _dense(weight: Tensor | NF4, x: Tensor) -> Tensor:
    if not isinstance(weight, NF4):
        return widened(weight)
    return nf4_values(weight).to(widened(x).dtype)


def takes(x: Tensor) -> bool:
    """Whatever torch takes."""
    return True


def beats_torch(x: Tensor, weight: Tensor) -> bool:
    """It is torch."""
    return False


def lora_linear_fwd(x: Tensor, layers: Layers, dropout: Dropout | None) -> Outputs:
    """Of each layer, y = c ∘ (x Wᵀ + scaling · ((dropout(x) Aᵀ) ∘ e) Bᵀ) + bias and h = dropout(x) Aᵀ, where c is its
    column_scale and e its lora_e, each 1 where there is none. dropout(x) is one for all layers.

    x [M, K], weight [N, K] dense or NF4, lora_a [R, K], lora_b [N, R], bias [N], lora_e [R], column_scale [N] in the
    accumulation dtype. Accumulates in float32 (float64 for float64 inputs); y [M, N] is rounded once to the dtype of
    x, h [M, R] stays in the accumulation dtype.
    """
    dropped = _dropped(x, dropout)
    ys, hs = zip(*(_projection(x, dropped, layer) for layer in layers), strict=True)
    return Outputs(list(ys), list(hs))


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    return widened(x) if dropout is None else drop(widened(x), dropout.p, dropout.rng)


def _projection(x: Tensor, dropped: Tensor, layer: Projection) -> tuple[Tensor, Tensor]:
    h = dropped @ widened(layer.lora_a).T
    he = h if layer.lora_e is None else h * widened(layer.lora_e)
    y = widened(x) @ _dense(layer.weight, x).T + layer.scaling * (he @ widened(layer.lora_b).T)
    if layer.column_scale is not None:
        y = y * layer.column_scale
    if layer.bias is not None:
        y = y + widened(layer.bias)
    return y.to(x.dtype), h


def lora_linear_formula(x: Tensor, layers: Iterable[Projection], dropout_p: float) -> tuple[Tensor, ...]:
    """y of lora_linear_fwd for x [..., K] and each layer, in operations that torch differentiates, transforms and
    distributes itself. dropout(x), one for all layers, is drawn by torch."""
    dropped = torch.nn.functional.dropout(widened(x), dropout_p)
    return tuple(_projection(x, dropped, layer)[0] for layer in layers)


def lora_linear_bwd(
    dys: Sequence[Tensor], x: Tensor, hs: Sequence[Tensor], layers: Layers, dropout: Dropout | None, needs: Needs
) -> Gradients:
    """The gradients of lora_linear_fwd that `needs` asks for. dx is the sum of those of the layers, each rounded.

    dy is the gradient of what column_scale multiplies, where there is one: see column_scale_bwd. For each layer
    he = h ∘ e; dhe = scaling · dy B; dlora_b = scaling · dyᵀ he; dlora_e = Σ_m h ∘ dhe; dh = dhe ∘ e;
    dlora_a = dhᵀ dropout(x); dx = dy W + keep/(1-p) ∘ (dh A). The mask is drawn again from rng, never stored.
    """
    dxs, gradients = [], []
    for dy, h, layer, need in zip(dys, hs, layers, needs.layers, strict=True):
        wide_dy = widened(dy)
        e = None if layer.lora_e is None else widened(layer.lora_e)
        dhe = layer.scaling * (wide_dy @ widened(layer.lora_b))
        dh = dhe if e is None else dhe * e
        own = AdapterGradients()
        if needs.x:
            low_rank = dh @ widened(layer.lora_a)
            low_rank = low_rank if dropout is None else drop(low_rank, dropout.p, dropout.rng)
            dxs.append((wide_dy @ _dense(layer.weight, x) + low_rank).to(x.dtype))
        if need.lora_a:
            own.lora_a = (dh.T @ _dropped(x, dropout)).to(layer.lora_a.dtype)
        if need.lora_b:
            own.lora_b = (layer.scaling * (wide_dy.T @ (h if e is None else h * e))).to(layer.lora_b.dtype)
        if need.lora_e and layer.lora_e is not None:
            own.lora_e = (h * dhe).sum(0).to(layer.lora_e.dtype)
        gradients.append(own)
    return Gradients(sum(dxs[1:], dxs[0]) if needs.x else None, gradients)


def column_scale_bwd(
    dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dz = dy ∘ c and dc = Σ_m dy ∘ z for y = c ∘ z + bias, where z [M, N] was never stored: z = (y - bias) / c.

    dy and y [M, N], bias [N], c = column_scale [N] in the accumulation dtype, as dc is; dz has the dtype of dy. dc is
    None where y is. A column whose c is 0 has the gradient 0: its z can't be told from y.
    """
    dz = (widened(dy) * column_scale).to(dy.dtype)
    if y is None:
        return dz, None
    scaled = widened(y) if bias is None else widened(y) - widened(bias)
    return dz, scale_gradient((widened(dy) * scaled).sum(0), column_scale)


def scale_gradient(total: Tensor, column_scale: Tensor) -> Tensor:
    """Σ_m dy ∘ z of total = Σ_m dy ∘ (y - bias)."""
    return torch.where(column_scale == 0, 0.0, total / column_scale)


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    lora_e: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """The eager version that people write, for x [..., K]: differentiable by torch, rounding after every operation.

    The low-rank branch runs in the dtype of lora_a, as PEFT's does; the base linear in the dtype of x. Same-dtype
    eager error, which the tolerance rule needs, is the error of this function.
    """
    y = torch.nn.functional.linear(x, weight, None if column_scale is not None else bias)
    flat = x.reshape(-1, x.shape[-1]).to(lora_a.dtype)
    h = drop(flat, dropout_p, rng) @ lora_a.T
    if lora_e is not None:
        h = h * lora_e
    delta = scaling * (h @ lora_b.T)
    y = (y + delta.reshape(y.shape)).to(x.dtype)
    if column_scale is None:
        return y
    y = y * column_scale.to(x.dtype)
    return y if bias is None else y + bias


@cache
def dynamic_code() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type (Dettmers 2015, 1511.04561), sorted, float32, on the CPU.

    Seven decades below 1; decade i has 2^i means of neighbours on an even grid over [0.1, 1], either sign; then 0
    and 1. Double quantisation stores block scales in it.
    """
    values = [0.0, 1.0]
    for i in range(7):
        grid = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        decade = (10.0 ** (i - 6) * ((grid[:-1] + grid[1:]) / 2)).tolist()
        values += decade + [-value for value in decade]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def nf4_code(device: torch.device | str = "cpu") -> Tensor:
    """NF4_CODE as float32 [16]."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


def _midpoints(code: Tensor) -> Tensor:
    return (code[:-1] + code[1:]) / 2


def _in_blocks(t: Tensor, block_size: int) -> Tensor:
    """t flat, padded with zeros to whole blocks: [blocks, block_size]."""
    flat = t.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)


def quantize_nf4(weight: Tensor, block_size: int, double_quant: bool) -> NF4:
    """NF4 of weight [N, K], whose elements must be finite (see the op for the checks).

    scale = max |w| over the block; code = the number of NF4_CODE's midpoints below w · (1 / scale), so that a tie
    goes down. Under double quantisation the scales, less their mean, are quantised likewise to dynamic_code() in
    blocks of 256.
    """
    device = weight.device
    blocks = _in_blocks(weight.float(), block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp(min=NF4_SMALLEST_ABSMAX))[:, None]
    codes = torch.bucketize(scaled, _midpoints(nf4_code(device)))
    codes = codes.reshape(-1)[: weight.numel()].to(torch.uint8)
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=7).view(-1, 2)
    packed = (pairs[:, 0] << 4) | pairs[:, 1]
    if not double_quant:
        return NF4(packed, absmax, None, None, block_size, tuple(weight.shape))
    offset = absmax.mean()
    centred = _in_blocks(absmax - offset, ABSMAX_BLOCK)
    absmax_scale = centred.abs().amax(1)
    scaled = centred * (1.0 / absmax_scale.clamp(min=NF4_SMALLEST_ABSMAX))[:, None]
    absmax_codes = torch.bucketize(scaled, _midpoints(dynamic_code().to(device)))
    absmax_codes = absmax_codes.reshape(-1)[: absmax.numel()].to(torch.uint8)
    return NF4(packed, absmax_codes, absmax_scale, offset, block_size, tuple(weight.shape))


def nf4_absmax(weight: NF4) -> Tensor:
    """The blocks' scales in float32, [blocks]; double quantisation undone."""
    if weight.absmax_scale is None or weight.absmax_offset is None:
        return weight.absmax
    codes = dynamic_code().to(weight.absmax.device)[weight.absmax.int()]
    return codes * weight.absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: codes.numel()] + weight.absmax_offset


def nf4_values(weight: NF4) -> Tensor:
    """The dense weight [N, K] in float32."""
    N, K = weight.shape
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).reshape(-1)[: N * K]
    values = nf4_code(codes.device)[codes.int()]
    scales = nf4_absmax(weight)[:, None]
    return (_in_blocks(values, weight.block_size) * scales).reshape(-1)[: N * K].view(N, K)


def dequantize_nf4(weight: NF4, out: Tensor) -> None:
    """Writes the dense weight to out [N, K]: NF4_CODE[code] · scale in float32, rounded once to the dtype of out."""
    out.copy_(nf4_values(weight))


def adamw_step(groups: Sequence[AdamWGroup], max_grad_norm: float | None, cache: dict[str, Any]) -> Tensor | None:
    """One step of AdamW (Loshchilov & Hutter 2019) in place, torch.optim.AdamW's formula, on clipped gradients.

    norm = ‖all gradients together‖₂; g = grad · min(1, max_grad_norm / (norm + 1e-6)); t = step + 1;
    exp_avg = β₁ exp_avg + (1 - β₁) g; exp_avg_sq = β₂ exp_avg_sq + (1 - β₂) g²;
    param = (1 - lr · weight_decay) param - lr / (1 - β₁ᵗ) · exp_avg / (√(exp_avg_sq / (1 - β₂ᵗ)) + eps).

    Computed in the dtype of exp_avg. A float16 or bfloat16 parameter is its rounded master; where it isn't any more,
    somebody has set it, and that value replaces the master's. The gradients are read only. ``cache`` belongs to the
    backend: the caller passes the same dict, empty at first, to every step over the same tensors.

    Returns norm, a scalar float32 tensor (float64 beside float64 gradients), or None where max_grad_norm is None and
    nothing is clipped. Where the norm is not finite nothing changes, steps included.
    """
    grad_norm, clip = None, 1.0
    if max_grad_norm is not None:
        squares = [widened(grad).square().sum() for group in groups for grad in group.grads]
        grad_norm = torch.stack(squares).sum().sqrt()
        if not torch.isfinite(grad_norm):
            return grad_norm
        clip = min(1.0, max_grad_norm / (grad_norm.item() + 1e-6))
    for group in groups:
        tensors = zip(*group[:6], strict=True)
        for param, grad, exp_avg, exp_avg_sq, step, master in tensors:
            step += 1
            t = step.item()
            g = grad.to(exp_avg.dtype) * clip
            exact = param if master is None else torch.where(master.to(param.dtype) == param, master, param.float())
            exp_avg.lerp_(g, 1 - group.beta1)
            exp_avg_sq.mul_(group.beta2).addcmul_(g, g, value=1 - group.beta2)
            denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - group.beta2**t)).add_(group.eps)
            exact = exact * (1 - group.lr * group.weight_decay)
            exact.addcdiv_(exp_avg, denominator, value=-group.lr / (1 - group.beta1**t))
            param.copy_(exact)
            if master is not None:
                master.copy_(exact)
    return grad_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) ∘ (offset + weight) over the last dimension, in float32 or wider, rounded once."""
    wide = widened(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (offset + widened(weight))
    return y.to(x.dtype)


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """dx and dweight of `rms_norm`, with r = 1 / sqrt(mean(x²) + eps) and g = dy ∘ (offset + weight):

    dx = r (g - x r · mean(g ∘ x r)) and dweight = Σ dy ∘ x r over all rows.
    """
    wide = widened(x)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    g = widened(dy) * (offset + widened(weight))
    dx = r * (g - wide * r * (g * wide * r).mean(-1, keepdim=True))
    dweight = (widened(dy) * wide * r).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y = x ∘ cos + [-x₂, x₁] ∘ sin with the halves x₁ and x₂ of the last dimension, for x [B, H, T, D] and cos and sin
    [B or 1, T, D], in float32 or wider, rounded once."""
    wide = widened(x)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * widened(cos).unsqueeze(1) + turned * widened(sin).unsqueeze(1)).to(x.dtype)


def rotary_bwd(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """dx of `rotary`: dy ∘ cos - [-s₂, s₁] with the halves s₁ and s₂ of dy ∘ sin."""
    return rotary(dy, cos, -sin.roll(sin.shape[-1] // 2, dims=-1))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = gate ∘ sigmoid(gate) ∘ up, in float32 or wider, rounded once."""
    wide = widened(gate)
    return (wide * wide.sigmoid() * widened(up)).to(gate.dtype)


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate = dy ∘ up ∘ s (1 + gate (1 - s)) and dup = dy ∘ gate ∘ s, with s = sigmoid(gate)."""
    wide, d = widened(gate), widened(dy)
    s = wide.sigmoid()
    return (d * widened(up) * s * (1 + wide * (1 - s))).to(gate.dtype), (d * wide * s).to(up.dtype)


def cross_entropy(logits: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    """-log softmax(scale · logits)[target] [M] for logits [M, V] and target [M], in float32 or wider."""
    z = scale * widened(logits)
    return z.logsumexp(1) - z.gather(1, target.unsqueeze(1)).squeeze(1)


def cross_entropy_bwd(logits: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    """The gradient of the sum of `cross_entropy`: scale · (softmax(scale · logits) - onehot(target))."""
    onehot = torch.nn.functional.one_hot(target, logits.shape[1])
    return (scale * ((scale * widened(logits)).softmax(1) - onehot)).to(logits.dtype)


def _causal_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale · q kᵀ [B, H, T, T], -∞ for the keys after a row's own, with a key head for each query head."""
    scores = scale * q @ k.transpose(-2, -1)
    # Made from the scores, so that it is a DTensor where they are.
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """o = softmax(scale · q kᵀ + causal mask) v, in float32 or wider, rounded once; q [B, H, T, D], k and v
    [B, KV, T, D], each of these for H / KV query heads in a row."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (widened(t).repeat_interleave(group, dim=1) for t in (k, v))
    return (_causal_scores(widened(q), wide_k, scale).softmax(-1) @ wide_v).to(q.dtype)


def causal_attention_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `causal_attention`. With p the softmax, o = p v and dp = dout vᵀ:

    ds = p ∘ (dp - Σ dout ∘ o over the row); dq = scale · ds k; dk = scale · dsᵀ q and dv = pᵀ dout, summed over the
    query heads that share them.
    """
    KV, group = k.shape[1], q.shape[1] // k.shape[1]
    wide_q, d = widened(q), widened(dout)
    wide_k, wide_v = (widened(t).repeat_interleave(group, dim=1) for t in (k, v))
    p = _causal_scores(wide_q, wide_k, scale).softmax(-1)
    ds = p * (d @ wide_v.transpose(-2, -1) - (d * (p @ wide_v)).sum(-1, keepdim=True))
    dk, dv = (
        t.reshape(t.shape[0], KV, group, *t.shape[2:]).sum(2)
        for t in (scale * ds.transpose(-2, -1) @ wide_q, p.transpose(-2, -1) @ d)
    )
    return (scale * ds @ wide_k).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
