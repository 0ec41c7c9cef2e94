"""AdamW over all tensors at once in Triton: two or three launches a step, however many tensors, and no atomics.

With clipping: the sum of squares of each chunk of the gradients; then one small program that adds them up in their
order and works out every tensor's scalars; then the step, chunk by chunk. Without: the last two. Tables hold the
addresses. Tensors of another dtype of parameter or gradient take launches of their own. The formula is in
`reference.adamw_step`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.backends.addresses import adamw_columns, addresses
from lora_kernels.types import AdamWGroup

from . import configs
from .common import INTERPRETED, cast

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# A row of the table of tensors: the addresses of params .. masters in AdamWGroup's order, numel, group.
_COLUMNS = tl.constexpr(8)
_SCALARS = tl.constexpr(8)


@triton.jit
def _vector(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _norm_kernel(
    tensors_ptr, chunks_ptr, partials_ptr, first_chunk,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[chunk] = Σ grad² over a chunk."""
    chunk = first_chunk + tl.program_id(0)
    row = tensors_ptr + tl.load(chunks_ptr + 2 * chunk) * _COLUMNS
    start = tl.load(chunks_ptr + 2 * chunk + 1)
    left = tl.load(row + 6) - start
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    grad_ptr = _vector(tl.load(row + 1), start, GRAD, ALIGNED)
    sums = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, CHUNK, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < left, other=0.0).to(tl.float32)
        sums += grad * grad
    tl.store(partials_ptr + chunk, tl.sum(sums, 0))


@triton.jit
def _power(base, exponent, EXPONENT_BITS: tl.constexpr):
    result = tl.full(exponent.shape, 1.0, tl.float64)
    for _ in tl.static_range(EXPONENT_BITS):
        result = tl.where((exponent & 1) == 1, result * base, result)
        base *= base
        exponent >>= 1
    return result


@triton.jit
def _prepare_kernel(
    tensors_ptr, settings_ptr, scalars_ptr, partials_ptr, norm_ptr, max_norm_ptr, tensors, chunks,
    HAS_NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The norm and the clip factor, -1 where the norm isn't finite; then each tensor's scalars; steps are raised."""
    clip = tl.full((), 1.0, tl.float32)
    if HAS_NORM:
        sums = tl.zeros([BLOCK_C], tl.float64)
        for first in range(0, chunks, BLOCK_C):
            at = first + tl.arange(0, BLOCK_C)
            sums += tl.load(partials_ptr + at, mask=at < chunks, other=0.0).to(tl.float64)
        norm = tl.sqrt(tl.sum(sums, 0))
        tl.store(norm_ptr, norm.to(tl.float32))
        finite = norm < float("inf")
        clip = tl.where(finite, tl.minimum(tl.load(max_norm_ptr) / (norm + 1e-6), 1.0), -1.0).to(tl.float32)
    for first in range(0, tensors, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = t < tensors
        row = tensors_ptr + t * _COLUMNS
        setting = settings_ptr + tl.load(row + 7, mask=mask, other=0) * 5
        step_ptr = tl.load(row + 4, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
        clips = clip + tl.zeros([BLOCK_T], tl.float32)
        tl.store(step_ptr, step, mask=mask & (clips >= 0.0))
        lr = tl.load(setting)
        beta1 = tl.load(setting + 1)
        beta2 = tl.load(setting + 2)
        out = scalars_ptr + t * _SCALARS
        exponent = step.to(tl.int32)
        tl.store(out, clips, mask=mask)
        tl.store(out + 1, (1.0 - lr * tl.load(setting + 4)).to(tl.float32), mask=mask)
        tl.store(out + 2, (1.0 - beta1).to(tl.float32), mask=mask)
        tl.store(out + 3, beta2.to(tl.float32), mask=mask)
        tl.store(out + 4, (1.0 - beta2).to(tl.float32), mask=mask)
        tl.store(out + 5, (lr / (1.0 - _power(beta1, exponent, 24))).to(tl.float32), mask=mask)
        tl.store(out + 6, tl.sqrt(1.0 / (1.0 - _power(beta2, exponent, 24))).to(tl.float32), mask=mask)
        tl.store(out + 7, tl.load(setting + 3).to(tl.float32), mask=mask)


@triton.jit
def _step_kernel(
    tensors_ptr, chunks_ptr, scalars_ptr, first_chunk,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Clipping and the AdamW step of one chunk."""
    HAS_MASTER: tl.constexpr = PARAM.primitive_bitwidth < 32
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    start = tl.load(chunks_ptr + 2 * chunk + 1)
    row = tensors_ptr + tensor * _COLUMNS
    scalar = scalars_ptr + tensor * _SCALARS
    clip = tl.load(scalar)
    decay = tl.load(scalar + 1)
    weight1 = tl.load(scalar + 2)
    beta2 = tl.load(scalar + 3)
    weight2 = tl.load(scalar + 4)
    step_size = tl.load(scalar + 5)
    inv_sqrt_correction2 = tl.load(scalar + 6)
    eps = tl.load(scalar + 7)
    # Nothing is left to do where the norm wasn't finite.
    left = tl.where(clip >= 0.0, tl.load(row + 6) - start, 0)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    param_ptr = _vector(tl.load(row), start, PARAM, ALIGNED)
    grad_ptr = _vector(tl.load(row + 1), start, GRAD, ALIGNED)
    exp_avg_ptr = _vector(tl.load(row + 2), start, tl.float32, ALIGNED)
    exp_avg_sq_ptr = _vector(tl.load(row + 3), start, tl.float32, ALIGNED)
    master_ptr = _vector(tl.load(row + 5), start, tl.float32, ALIGNED)
    for offset in range(0, CHUNK, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        mask = at < left
        param = tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_MASTER:
            # A parameter that isn't its rounded master any more was set from outside, and that value counts.
            master = tl.load(master_ptr + at, mask=mask, other=0.0)
            param = tl.where(cast(master, PARAM).to(tl.float32) == param, master, param)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * clip
        exp_avg = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
        exp_avg += weight1 * (grad - exp_avg)
        exp_avg_sq = beta2 * tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0) + weight2 * grad * grad
        denominator = tl.sqrt_rn(exp_avg_sq) * inv_sqrt_correction2 + eps
        param = decay * param - tl.div_rn(step_size * exp_avg, denominator)
        tl.store(param_ptr + at, cast(param, PARAM), mask=mask)
        if HAS_MASTER:
            tl.store(master_ptr + at, param, mask=mask)
        tl.store(exp_avg_ptr + at, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=mask)


@functools.lru_cache(8)
def _chunks(numels: tuple[int, ...], kinds: tuple[Any, ...], chunk: int) -> tuple[Tensor, dict[Any, tuple[int, int]]]:
    """(tensor, start) of each chunk, tensors of one kind together, and each kind's first chunk and their number."""
    rows: list[tuple[int, int]] = []
    ranges = {}
    for kind in dict.fromkeys(kinds):
        first = len(rows)
        for tensor, (numel, other) in enumerate(zip(numels, kinds, strict=True)):
            if other == kind:
                rows += [(tensor, start) for start in range(0, numel, chunk)]
        ranges[kind] = (first, len(rows) - first)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2), ranges


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host doesn't wait for."""
    return table if INTERPRETED else table.pin_memory().to(device, non_blocking=True)


def adamw_step(groups: Sequence[AdamWGroup], max_grad_norm: float | None, cache: dict[str, Any]) -> Tensor | None:
    """One AdamW step over all tensors, in place, gradients clipped; see reference.adamw_step.

    Parameters and gradients are float32, bfloat16 or float16, on one device. Arithmetic is float32. Nothing
    synchronises, so a CUDA graph can't hold it: the addresses of the gradients are read on the host. Raises ValueError
    for another dtype or device.
    """
    params, grads, _ = adamw_columns(groups, cache)
    device = params[0].device
    for grad in grads:
        if grad.device != device or grad.dtype not in _DTYPES:
            raise ValueError(
                f"the triton backend got a gradient of {grad.dtype} on {grad.device}; it takes float32, bfloat16 and "
                f"float16 on {device}"
            )
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("parameters: are on cpu; the triton backend takes CPU tensors only with TRITON_INTERPRET=1")
    config = configs.ADAMW
    rows = [cache["pointers"], addresses("the gradient of parameter", grads), *cache["states"]]
    numels = [param.numel() for param in params]
    rows += [numels, [index for index, group in enumerate(groups) for _ in group.params]]
    kinds = [(param.dtype, grad.dtype) for param, grad in zip(params, grads, strict=True)]
    aligned = all(value % 16 == 0 for column in (*rows[:4], rows[5], numels) for value in column)

    chunks, ranges = _chunks(tuple(numels), tuple(kinds), config["CHUNK"])
    table = torch.cat([torch.tensor(rows, dtype=torch.int64).T.reshape(-1), chunks.reshape(-1)])
    table = _upload(table, device)
    tensors, chunk_table = table[: 8 * len(params)], table[8 * len(params) :]
    numbers = [value for group in groups for value in group[6:]]
    settings = _upload(torch.tensor([*numbers, max_grad_norm or 0.0], dtype=torch.float64), device)
    scalars = torch.empty(len(params), 8, dtype=torch.float32, device=device)
    clips = max_grad_norm is not None
    partials = torch.empty(len(chunks), dtype=torch.float32, device=device) if clips else None
    grad_norm = torch.empty((), dtype=torch.float32, device=device) if clips else None

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        sizes = {name: config[name] for name in ("CHUNK", "BLOCK", "num_warps")}
        for (_, grad_dtype), (first, count) in ranges.items():
            if clips and count:
                _norm_kernel[(count,)](tensors, chunk_table, partials, first, _DTYPES[grad_dtype], aligned, **sizes)
        _prepare_kernel[(1,)](
            tensors, settings, scalars, partials, grad_norm, settings[-1:], len(params), len(chunks),
            clips, config["BLOCK_T"], config["BLOCK_C"], num_warps=config["num_warps"],
        )  # fmt: skip
        for (param_dtype, grad_dtype), (first, count) in ranges.items():
            if count:
                dtypes = (_DTYPES[param_dtype], _DTYPES[grad_dtype])
                _step_kernel[(count,)](tensors, chunk_table, scalars, first, *dtypes, aligned, **sizes)
    return grad_norm
