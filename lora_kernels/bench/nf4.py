"""Cases of NF4: the codec, and the frozen linear layer without an adapter."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import quantize_nf4
from lora_kernels.bench.cases import LAYERS, Case, Settings, missing, split
from lora_kernels.bench.measure import Step
from lora_kernels.ops.frozen_linear import frozen_linear
from lora_kernels.testing import lora_inputs

FEW, MANY = (1, 4), (16, 128, 512, 2048)
SHAPES = [*LAYERS["SmolLM2-135M"][::2], LAYERS["Llama-3.2-1B"][0], LAYERS["Llama-3.1-8B"][0]]
# bits of an element and its share of a block's float32 scale, in bytes
PACKED_BYTES = 0.5 + 4 / 64


def codec_step(contender: str, work: str, N: int, K: int, dtype: torch.dtype) -> Step:
    """work: quantize, dequantize, or dequantize-into a given tensor, which bitsandbytes can't on a CPU."""
    weight = lora_inputs(1, N, K, 1, dtype)["weight"]
    if contender == "bnb":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        quantize = functools.partial(quantize_4bit, weight, quant_type="nf4")
        return quantize if work == "quantize" else functools.partial(dequantize_4bit, *quantize())
    if work == "quantize":
        return functools.partial(quantize_nf4, weight)
    out = torch.empty(N, K, dtype=dtype) if work == "dequantize-into" else None
    return functools.partial(quantize_nf4(weight).dequantize, out=out)


def codec_case(work: str, N: int, K: int, settings: Settings) -> Case:
    names, skipped = split({"ours": None, "bnb": missing("bitsandbytes")})
    steps = {name: functools.partial(codec_step, name, work, N, K, settings.dtype) for name in names}
    nbytes = N * K * (PACKED_BYTES + settings.dtype.itemsize)
    return Case(f"nf4-{work}", {"N": N, "K": K}, steps, base="ours", nbytes=nbytes, skipped=skipped)


def linear_step(contender: str, M: int, N: int, K: int, dtype: torch.dtype) -> Step:
    """Forward, and dx where M is not in FEW, of the frozen layer; dense: torch's, ours-dense: `frozen_linear`."""
    inputs = lora_inputs(M, N, K, 1, dtype)
    x, weight = inputs["x"].requires_grad_(M not in FEW), inputs["weight"]
    dy = torch.ones(M, N, dtype=dtype)
    ours = quantize_nf4(weight)
    if contender == "grouped":
        return _grouped_step(x, dy, ours)
    if contender == "bnb" and M == 1:
        # In eval() it repacks the weight for its own kernel of one row.
        import bitsandbytes as bnb

        forward = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
        forward.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        forward = forward.to("cpu").eval()
    elif contender == "bnb":
        import bitsandbytes as bnb

        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")

        def forward(x: Tensor) -> Tensor:
            return bnb.matmul_4bit(x, packed.t(), quant_state=state)
    elif contender == "ours":

        def forward(x: Tensor) -> Tensor:
            return frozen_linear(x, ours)
    else:
        dense, linear = ours.dequantize(), F.linear if contender == "dense" else frozen_linear

        def forward(x: Tensor) -> Tensor:
            return linear(x, dense)

    if M in FEW:
        return torch.no_grad()(lambda: forward(x))
    return lambda: torch.autograd.grad(forward(x), x, dy)


def _grouped_step(x: Tensor, dy: Tensor, weight) -> Step:
    """grouped-nf4-gemm, as a mixture of one expert."""
    import cpu_grouped

    (M, K), N, threads = x.shape, dy.shape[1], torch.get_num_threads()
    x, experts, scales = x.detach(), weight.packed.view(1, N, K // 2), weight.absmax.view(1, N, K // 64)

    def step() -> None:
        cpu_grouped.gemv_nf4_grouped_cpu(x, experts, scales, [M], [0], threads=threads)
        if M not in FEW:
            cpu_grouped.dgrad_nf4_grouped_cpu(dy, experts, scales, [M], [0], threads=threads)

    return step


def linear_case(M: int, N: int, K: int, settings: Settings) -> Case:
    grouped = missing("cpu_grouped") and "not installed: grouped-nf4-gemm"
    if settings.dtype != torch.float32 or K % 64:
        grouped = "it takes float32 and K in blocks of 64"
    many = None if M in FEW else "with a gradient it is dense"
    reasons = {"dense": None, "ours": None, "ours-dense": many, "bnb": missing("bitsandbytes"), "grouped": grouped}
    names, skipped = split(reasons)
    passes, itemsize = 1 + (M not in FEW), settings.dtype.itemsize
    return Case(
        "nf4-linear",
        {"pass": "forward+dx" if passes == 2 else "forward", "M": M, "N": N, "K": K},
        {name: functools.partial(linear_step, name, M, N, K, settings.dtype) for name in names},
        base="dense",
        flops=2.0 * passes * M * N * K,
        nbytes=passes * (PACKED_BYTES * N * K + itemsize * M * (N + K)),
        skipped=skipped,
    )


def cases(settings: Settings) -> Iterator[Case]:
    shapes = SHAPES[:1] if settings.quick else SHAPES
    for N, K in shapes:
        for work in ("quantize", "dequantize", "dequantize-into"):
            yield codec_case(work, N, K, settings)
        for M in (1, 128) if settings.quick else (*FEW, *MANY):
            yield linear_case(M, N, K, settings)
