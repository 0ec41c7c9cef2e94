"""Cross-entropy and log-probabilities over a large vocabulary without the [M, V] logits."""

from typing import Any

import torch
from torch import Tensor

from lora_kernels import backends
from lora_kernels.backends.cpu.cross_entropy import cross_entropy as cpu_cross_entropy
from lora_kernels.ops.cpu_only import is_fused
from lora_kernels.ops.frozen_linear import frozen_linear, frozen_linear_dx

IGNORE_INDEX = -100
_LOGITS_PER_CHUNK = 1 << 24


def _nll(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Any]:
    """-log softmax(softcap(scale * (rows @ weightᵀ + bias)))[target] [m] in float32 (float64 for float64 inputs) and,
    unless grad_dtype is None, its gradient with respect to `rows @ weightᵀ + bias` [m, V], rounded to it once."""
    needs_grad = grad_dtype is not None
    logits = frozen_linear(rows, weight, bias)
    if logit_softcap is None and is_fused(logits):
        logits = logits.to(grad_dtype or logits.dtype)
        nll = cpu_cross_entropy(logits, target, logit_scale, needs_grad)
        return nll, logits if needs_grad else None

    logits, target = logits.to(_accumulator(rows)), target[:, None]
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    slope = None
    if logit_softcap is not None:
        capped = logits.div_(logit_softcap).tanh_()
        slope = 1 - capped * capped if needs_grad else None
        logits = capped.mul_(logit_softcap)

    logits.sub_(logits.amax(1, keepdim=True))
    target_logit = logits.gather(1, target)
    probs = logits.exp_()
    norm = probs.sum(1, keepdim=True)
    nll = (norm.log() - target_logit).squeeze(1)
    if not needs_grad:
        return nll, None
    dlogits = probs.div_(norm)
    dlogits.scatter_add_(1, target, dlogits.new_full((), -1.0).expand_as(target))
    if slope is not None:
        dlogits.mul_(slope)
    if logit_scale != 1.0:
        dlogits.mul_(logit_scale)
    return nll, dlogits.to(grad_dtype)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[label], the gradients computed beside the loss, one chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_size: int,
        logit_scale: float, logit_softcap: float | None, grad_enabled: bool,
    ) -> Tensor:  # fmt: skip
        needs_hidden, needs_weight, needs_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        accumulate = _accumulator(hidden)
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=accumulate) if bias is not None and needs_bias else None
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_dtype = accumulate if needs_weight or needs_bias else hidden.dtype if needs_hidden else None

        for start in range(0, hidden.shape[0], chunk_size):
            rows = hidden[start : start + chunk_size]
            target = labels[start : start + chunk_size]
            nll, dlogits = _nll(rows, weight, bias, target, logit_scale, logit_softcap, grad_dtype)
            loss += nll.sum()
            if dbias is not None:
                dbias += dlogits.sum(0)
            if dweight is not None:
                dweight.addmm_(dlogits.t(), rows.to(accumulate))
            if dhidden is not None:
                frozen_linear_dx(dlogits.to(weight.dtype), weight, dhidden[start : start + chunk_size])
            del dlogits  # whose memory the next chunk's logits can then have

        ctx.save_for_backward(
            dhidden,
            dweight.to(weight.dtype) if dweight is not None else None,
            dbias.to(bias.dtype) if bias is not None and dbias is not None else None,
        )
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # dloss carries 1 / answer tokens: in 16 bits it would be off by up to 0.4 %, the same way for every gradient.
        grads = (None if grad is None else (grad.to(dloss.dtype) * dloss).to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None, None)


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(logits)[label] of each row. A row's gradient with respect to its own hidden state is kept from the
    forward pass; that of the weight mixes rows by their dlogprobs, so backward makes the logits again for it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_size: int,
        logit_scale: float, logit_softcap: float | None, grad_enabled: bool,
    ) -> Tensor:  # fmt: skip
        needs_hidden = grad_enabled and ctx.needs_input_grad[0]
        needs_head = grad_enabled and any(ctx.needs_input_grad[1:3])
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        logprobs = torch.empty(labels.shape, dtype=_accumulator(hidden), device=hidden.device)
        grad_dtype = hidden.dtype if needs_hidden else None
        for start in range(0, hidden.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            nll, dlogits = _nll(hidden[chunk], weight, bias, labels[chunk], logit_scale, logit_softcap, grad_dtype)
            logprobs[chunk] = nll.neg_()
            if dhidden is not None:
                frozen_linear_dx(dlogits.neg_(), weight, dhidden[chunk])
            del dlogits
        ctx.save_for_backward(dhidden, *((hidden, weight, bias, labels) if needs_head else ()))
        ctx.settings = (chunk_size, logit_scale, logit_softcap)
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, *head = ctx.saved_tensors
        dlogprobs = dlogprobs[:, None]
        dweight = dbias = None
        if head:
            hidden, weight, bias, labels = head
            chunk_size, logit_scale, logit_softcap = ctx.settings
            accumulate = _accumulator(hidden)
            dweight = torch.zeros_like(weight, dtype=accumulate) if ctx.needs_input_grad[1] else None
            dbias = torch.zeros_like(bias, dtype=accumulate) if ctx.needs_input_grad[2] else None
            for start in range(0, hidden.shape[0], chunk_size):
                chunk = slice(start, start + chunk_size)
                _, dlogits = _nll(hidden[chunk], weight, bias, labels[chunk], logit_scale, logit_softcap, accumulate)
                dlogits.mul_(-dlogprobs[chunk])
                if dweight is not None:
                    dweight.addmm_(dlogits.t(), hidden[chunk].to(accumulate))
                if dbias is not None:
                    dbias += dlogits.sum(0)
                del dlogits
            dweight = None if dweight is None else dweight.to(weight.dtype)
            dbias = None if dbias is None else dbias.to(bias.dtype)
        if dhidden is not None:
            dhidden = (dhidden.to(dlogprobs.dtype) * dlogprobs).to(dhidden.dtype)
        return dhidden, dweight, dbias, None, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, int]:
    """Summed cross-entropy of `softcap(logit_scale * (hidden @ lm_head_weightᵀ + bias))`, and how many labels it sums.

    Rows with label -100 are dropped before the projection, and at most `chunk_size` rows of logits exist at a time.
    The gradients are computed in the forward pass from the same logits, so nothing is recomputed and only tensors of
    the inputs' own shapes are kept. `softcap(z) = logit_softcap * tanh(z / logit_softcap)`.

    hidden [..., K], lm_head_weight [V, K], bias [V] or None: one floating dtype. labels [...]: int64, already aligned
    with `hidden` (the caller shifts). The softmax is float32 (float64 for float64 inputs), as is the returned scalar.
    chunk_size: rows, by default as many as make 2**24 logits. Gradients go to `hidden`, and to `lm_head_weight` and
    `bias` where they require them; no second derivatives.

    Raises ValueError where shapes, dtypes, labels or chunk_size do not fit or a tensor has no memory, TypeError in
    the transforms of torch.func and for tensors that are not dense memory (a DTensor, sparse).
    """
    index, *inputs = _answers(hidden, lm_head_weight, bias, labels, chunk_size)
    loss = _ChunkedCrossEntropy.apply(*inputs, logit_scale, logit_softcap, torch.is_grad_enabled())
    return loss, index.numel()


def chunked_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """log softmax(softcap(logit_scale * (hidden @ lm_head_weightᵀ + bias)))[label] of each label, 0 where it is -100.

    Arguments, limits and errors as for `chunked_cross_entropy`, whose loss is -sum of these; a sampling temperature is
    `logit_scale` = 1 / temperature. Returns float32 (float64 for float64 inputs) shaped like labels. With gradients
    off, only the log-probabilities are kept; else one row of hidden's size and dtype for each label as well. Where
    `lm_head_weight` or `bias` require gradients, backward makes the logits a second time.
    """
    index, *inputs = _answers(hidden, lm_head_weight, bias, labels, chunk_size)
    logprobs = _ChunkedLogprobs.apply(*inputs, logit_scale, logit_softcap, torch.is_grad_enabled())
    return logprobs.new_zeros(labels.numel()).index_copy(0, index, logprobs).view(labels.shape)


def _answers(
    hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, int]:
    """The flat index of each label to predict, then hidden, weight, bias and labels of these rows, and the chunk."""
    backends.check_memory(hidden=hidden, lm_head_weight=lm_head_weight, labels=labels, bias=bias)
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must be {list(hidden.shape[:-1])} like hidden without its last dim, got {list(labels.shape)}"
        )
    if lm_head_weight.ndim != 2 or lm_head_weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"lm_head_weight must be [V, {hidden.shape[-1]}], got {list(lm_head_weight.shape)}")
    if hidden.dtype != lm_head_weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"hidden and lm_head_weight must share a floating dtype, got {hidden.dtype} and {lm_head_weight.dtype}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if chunk_size is None:
        chunk_size = max(1, _LOGITS_PER_CHUNK // lm_head_weight.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")

    labels = labels.reshape(-1)
    index = labels.ne(IGNORE_INDEX).nonzero().squeeze(1)
    labels = labels.index_select(0, index)
    # Our kernel looks at none of them. Elsewhere torch does, and a look from here would wait for the device.
    if labels.is_cpu and labels.numel():
        low, high = (int(label) for label in labels.aminmax())
        last = lm_head_weight.shape[0] - 1
        if low < 0 or high > last:
            raise ValueError(f"labels must be {IGNORE_INDEX} or from 0 to {last}, got {low} to {high}")
    answers = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
    return index, answers, lm_head_weight, bias, labels, chunk_size
