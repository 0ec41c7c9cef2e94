"""What every op means, in plain torch, in any floating dtype including float64.

This file is the oracle that all backends are tested against, and the documentation of their arithmetic.
``lora_linear_fwd`` and ``lora_linear_bwd`` have the signatures that every backend has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

unavailable: str | None = None

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
    fixed = [torch.full_like(columns, word) for word in (offset & _MASK32, (offset >> 32) & _MASK32)]
    words = torch.stack(philox4x32(columns, rows, *fixed, key=(seed & _MASK32, (seed >> 32) & _MASK32)), dim=-1)
    lanes = torch.cat([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :K]
    return lanes >= dropout_threshold(dropout_p)


def dropout(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    """keep_mask ∘ x / (1 - p) for x [M, K]."""
    if dropout_p == 0.0:
        return x
    assert rng is not None
    # where, not a product: a dropped inf or nan must not leak.
    return torch.where(keep_mask(rng, dropout_p, *x.shape).to(x.device), x * dropout_scale(dropout_p), 0.0)


def _acc(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
    lora_e: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) ∘ e) Bᵀ and h = dropout(x) Aᵀ.

    x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R], bias [N], lora_e [R]. Accumulates in float32 (float64 for
    float64 inputs); y [M, N] is rounded once to the dtype of x, h [M, R] stays in the accumulation dtype.
    """
    h = dropout(_acc(x), dropout_p, rng) @ _acc(lora_a).T
    he = h if lora_e is None else h * _acc(lora_e)
    y = _acc(x) @ _acc(weight).T + scaling * (he @ _acc(lora_b).T)
    if bias is not None:
        y = y + _acc(bias)
    return y.to(x.dtype), h


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    lora_e: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx, dlora_a, dlora_b, dlora_e) of lora_linear_fwd, each None where ``needs`` says False.

    he = h ∘ e; dhe = scaling · dy B; dlora_b = scaling · dyᵀ he; dlora_e = Σ_m h ∘ dhe; dh = dhe ∘ e;
    dlora_a = dhᵀ dropout(x); dx = dy W + keep/(1-p) ∘ (dh A). The mask is drawn again from rng, never stored.
    """
    need_x, need_a, need_b, need_e = needs
    dy_acc = _acc(dy)
    e = None if lora_e is None else _acc(lora_e)
    dhe = scaling * (dy_acc @ _acc(lora_b))
    dh = dhe if e is None else dhe * e

    dx = dlora_a = dlora_b = dlora_e = None
    if need_x:
        dx = (dy_acc @ _acc(weight) + dropout(dh @ _acc(lora_a), dropout_p, rng)).to(x.dtype)
    if need_a:
        dlora_a = (dh.T @ dropout(_acc(x), dropout_p, rng)).to(lora_a.dtype)
    if need_b:
        dlora_b = (scaling * (dy_acc.T @ (h if e is None else h * e))).to(lora_b.dtype)
    if need_e and lora_e is not None:
        dlora_e = (h * dhe).sum(0).to(lora_e.dtype)
    return dx, dlora_a, dlora_b, dlora_e


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
) -> Tensor:
    """The eager version that people write, for x [..., K]: differentiable by torch, rounding after every operation.

    The low-rank branch runs in the dtype of lora_a, as PEFT's does; the base linear in the dtype of x. Same-dtype
    eager error, which the tolerance rule needs, is the error of this function.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1]).to(lora_a.dtype)
    h = dropout(flat, dropout_p, rng) @ lora_a.T
    if lora_e is not None:
        h = h * lora_e
    delta = scaling * (h @ lora_b.T)
    return (y + delta.reshape(y.shape)).to(x.dtype)
