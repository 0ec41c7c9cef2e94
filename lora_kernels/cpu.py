"""The CPU backend of lora_linear: torch's matrix products for the frozen weight, C++ kernels for everything low-rank.

Per layer, forward and backward, the kernels read x twice and dy once, and add the low-rank terms to y and dx in place
while a block of rows is in cache. Dropout is drawn inside, in registers, from (seed, offset).

y and dx must be rounded once, after the low-rank term is in: a bfloat16 sum loses a term that is smaller than half a
unit of its last place. So the base product runs

- in float32, in place, for float32;
- in bfloat16 where this processor has it in hardware, with the low-rank term inside the same product:
  y = [x, h] [W, scaling · lora_b]ᵀ, and dx likewise;
- otherwise in float32 on converted blocks of rows. torch's own bfloat16 and float16 products are several times slower
  there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.reference import dropout_scale, dropout_threshold

ISA_ENVIRONMENT_VARIABLE = "LORA_KERNELS_CPU_ISA"

unavailable: str | None = None
try:
    from lora_kernels import _C
except ImportError as error:
    unavailable = f"the C++ extension lora_kernels._C can't be imported ({error})"
else:
    _DTYPES = {torch.float32: _C.FLOAT32, torch.bfloat16: _C.BFLOAT16, torch.float16: _C.FLOAT16}
    if isa := os.environ.get(ISA_ENVIRONMENT_VARIABLE):
        try:
            _C.set_isa(isa)
        except ValueError as error:
            unavailable = f"environment variable {ISA_ENVIRONMENT_VARIABLE}: {error}"

# Rows of x per float32 block of the base product. The block is still in cache when the low-rank term is added to it.
_BLOCK_ROWS = 512


@cache
def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu._is_avx512_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _launch(kernel: str, *, threshold: int | None = None, rng: Tensor | None = None, **arguments) -> None:
    """Call a kernel of _C. Tensors become addresses; this frame keeps them alive until the kernel has returned."""
    values = {
        name: 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    if threshold is not None:
        seed, offset = (0, 0) if rng is None else (v & 0xFFFFFFFFFFFFFFFF for v in rng.tolist())
        values.update(threshold=threshold, seed=seed, offset=offset)
    getattr(_C, kernel)(**values, num_threads=torch.get_num_threads())


def _check(x: Tensor, *adapters: Tensor | None) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"the cpu backend got x on {x.device}; it takes CPU tensors only")
    if x.dtype not in _DTYPES:
        raise ValueError(f"the cpu backend got x of {x.dtype}; it takes float32, bfloat16 and float16")
    for adapter in adapters:
        if adapter is not None and adapter.dtype not in (torch.float32, x.dtype):
            raise ValueError(f"adapter weights are {adapter.dtype}; allowed: torch.float32 and x's {x.dtype}")


def _row_blocks(M: int) -> Iterator[slice]:
    for start in range(0, M, _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, M))


def _low_rank_fwd(base: Tensor, bias: Tensor | None, h: Tensor, lora_b: Tensor, scaling: float, y: Tensor) -> None:
    """y = base + bias + scaling · h lora_bᵀ, rounded once; base may be y."""
    (M, N), R = y.shape, h.shape[1]
    _launch(
        "lora_b_fwd",
        base=base,
        base_dtype=_DTYPES[base.dtype],
        ld_base=base.stride(0),
        bias=bias,
        h=h,
        lora_b=lora_b,
        lora_b_dtype=_DTYPES[lora_b.dtype],
        scaling=scaling,
        y=y,
        y_dtype=_DTYPES[y.dtype],
        ld_y=y.stride(0),
        M=M,
        N=N,
        R=R,
    )


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
    """y = x Wᵀ + bias + scaling · ((dropout(x) Aᵀ) ∘ e) Bᵀ and h = dropout(x) Aᵀ; see reference.lora_linear_fwd.

    x [M, K] and y [M, N] are float32, bfloat16 or float16; adapters float32 or the dtype of x; h [M, R] is float32.
    Raises ValueError for other dtypes and for tensors that are not on the CPU.
    """
    _check(x, lora_a, lora_b, lora_e)
    (M, K), (N, R) = x.shape, lora_b.shape
    h = x.new_empty(M, R, dtype=torch.float32)
    _launch(
        "lora_a_fwd",
        x=x,
        x_dtype=_DTYPES[x.dtype],
        ld_x=x.stride(0),
        lora_a=lora_a,
        lora_a_dtype=_DTYPES[lora_a.dtype],
        h=h,
        M=M,
        K=K,
        R=R,
        threshold=dropout_threshold(dropout_p),
        rng=rng,
    )
    he = h if lora_e is None else h * lora_e.float()
    if x.dtype == torch.float32:
        y = F.linear(x, weight, bias)
        _low_rank_fwd(y, None, he, lora_b, scaling, y)
        return y, h
    if x.dtype == torch.bfloat16 and native_bfloat16():
        wide_weight = torch.cat([weight, (scaling * lora_b.float()).to(x.dtype)], dim=1)
        return F.linear(torch.cat([x, he.to(x.dtype)], dim=1), wide_weight, bias), h

    y = x.new_empty(M, N)
    weight32 = weight.float()
    bias32 = None if bias is None else bias.float()
    for rows in _row_blocks(M):
        _low_rank_fwd(x[rows].float() @ weight32.T, bias32, he[rows], lora_b, scaling, y[rows])
    return y, h


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
    """Gradients (dx, dlora_a, dlora_b, dlora_e) of lora_linear_fwd, None where ``needs`` says False.

    See reference.lora_linear_bwd for the formulas. dx is rounded once (twice where dropout
    hit it and bfloat16 is native), adapter gradients are accumulated in float32
    and rounded to their adapter's dtype. The result depends on torch.get_num_threads() but not on timing.
    """
    _check(x, lora_a, lora_b, lora_e)
    need_x, need_a, need_b, need_e = needs
    need_e = need_e and lora_e is not None
    (M, K), (N, R) = x.shape, lora_b.shape
    float32 = {"dtype": torch.float32, "device": x.device}

    dhe = torch.empty(M, R, **float32) if need_x or need_a or need_e else None
    dlora_b = torch.empty(N, R, **float32) if need_b else None
    if dhe is not None or dlora_b is not None:
        _launch(
            "lora_b_bwd",
            dy=dy,
            dy_dtype=_DTYPES[dy.dtype],
            ld_dy=dy.stride(0),
            h=h if lora_e is None else h * lora_e.float(),
            lora_b=lora_b,
            lora_b_dtype=_DTYPES[lora_b.dtype],
            scaling=scaling,
            dh=dhe,
            dlora_b=dlora_b,
            M=M,
            N=N,
            R=R,
        )
    dlora_e = (h * dhe).sum(0).to(lora_e.dtype) if need_e else None
    if dlora_b is not None:
        dlora_b = dlora_b.to(lora_b.dtype)

    if not (need_x or need_a):
        return None, None, dlora_b, dlora_e
    dh = dhe if lora_e is None else dhe * lora_e.float()

    native = x.dtype == torch.bfloat16 and native_bfloat16()
    in_blocks = need_x and x.dtype != torch.float32 and not native
    threshold = dropout_threshold(dropout_p)
    dx = dlora_a = weight32 = None
    if in_blocks:
        dx, weight32 = x.new_empty(M, K), weight.float()
    elif need_x and native:
        scaled_a = dropout_scale(dropout_p) * lora_a.float()
        dx = torch.cat([dy, dh.to(x.dtype)], dim=1) @ torch.cat([weight, scaled_a.to(x.dtype)])
    elif need_x:
        dx = dy @ weight
    # Without dropout, native's dx is complete.
    dx_in_kernel = None if native and not threshold else dx
    if dx_in_kernel is None and not need_a:
        return dx, None, dlora_b, dlora_e

    for rows in _row_blocks(M) if in_blocks else [slice(0, M)]:
        base = dy[rows].float() @ weight32 if in_blocks else dx_in_kernel
        block = torch.empty(R, K, **float32) if need_a else None
        _launch(
            "lora_a_bwd",
            x=x[rows],
            x_dtype=_DTYPES[x.dtype],
            ld_x=x.stride(0),
            dh=dh[rows],
            lora_a=lora_a,
            lora_a_dtype=_DTYPES[lora_a.dtype],
            dlora_a=block,
            base=base,
            base_dtype=_DTYPES[x.dtype if base is None else base.dtype],
            ld_base=0 if base is None else base.stride(0),
            dx=None if dx_in_kernel is None else dx_in_kernel[rows],
            ld_dx=K,
            M=rows.stop - rows.start,
            K=K,
            R=R,
            undo_dropped=native,
            first_row=rows.start,
            threshold=threshold,
            rng=rng,
        )
        dlora_a = block if dlora_a is None else dlora_a.add_(block)
    if dlora_a is not None:
        dlora_a = dlora_a.to(lora_a.dtype)
    return dx, dlora_a, dlora_b, dlora_e
