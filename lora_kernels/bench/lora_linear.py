"""Cases of lora_linear: one LoRA layer over a frozen weight, dense or NF4, what it costs as each size grows, and layers
that share their input, as q/k/v and gate/up do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import FusedLoRALinear
from lora_kernels.bench.cases import DROPOUT_P, LAYERS, SCALING, Case, Settings, missing, split
from lora_kernels.bench.measure import Step
from lora_kernels.bench.peers import AddmmLoRA, eager_lora, peft_layer, peft_nf4_layer
from lora_kernels.nn.lora_linear import open_group
from lora_kernels.testing import lora_inputs

# bare: F.linear with a frozen weight, which no adapter can beat. addmm has no dropout in any case, and adapters in the
# dtype of x. ours-nf4 and peft-nf4 have an NF4 weight.
CONTENDERS = ("bare", "ours", "eager", "compile", "addmm", "peft", "ours-nf4", "peft-nf4")
DORA = ("bare", "ours-dora", "peft-dora")
# ours: one call for all layers, as `fuse_decoder` has it; ours-apart: a call for each.
GROUP = ("bare", "ours", "ours-apart", "peft", "ours-nf4", "ours-nf4-apart")
# model -> (out of each layer, in) of q/k/v and of gate/up
GROUPS = {
    "SmolLM2-135M": [((576, 192, 192), 576), ((1536, 1536), 576)],
    "Llama-3.2-1B": [((2048, 512, 512), 2048), ((8192, 8192), 2048)],
    "Llama-3.1-8B": [((4096, 1024, 1024), 4096), ((14336, 14336), 4096)],
}
# Rows up to which a step is a forward without dropout, as in generation; from there on forward and backward.
FEW_ROWS = 16
M, R = 512, 16


def make_step(contender: str, M: int, N: int, K: int, R: int, dropout_p: float, dtype: torch.dtype) -> Step:
    """One forward, and backward where M > FEW_ROWS (dx, dlora_a and dlora_b), with float32 adapters."""
    train = M > FEW_ROWS
    inputs = lora_inputs(M, N, K, R, dtype, adapter_dtype=dtype if contender == "addmm" else torch.float32)
    x, weight = inputs["x"].requires_grad_(train), inputs["weight"]
    adapters = [inputs[name].requires_grad_(train) for name in ("lora_a", "lora_b")]
    layer: Any = None
    forward: Callable[[], Tensor]
    if contender == "bare":
        forward, adapters = functools.partial(F.linear, x, weight), []
    elif contender in ("eager", "compile"):
        function: Any = torch.compile(eager_lora, dynamic=False) if contender == "compile" else eager_lora
        forward = functools.partial(function, x, weight, *adapters, dropout_p)
    elif contender == "addmm":
        forward = functools.partial(AddmmLoRA.apply, x, weight, *adapters)
    elif contender == "peft-nf4":
        layer = peft_nf4_layer(weight, R, lora_dropout=dropout_p)
    elif contender.startswith("peft"):
        layer = peft_layer(weight, R, lora_dropout=dropout_p, use_dora=contender == "peft-dora")
    else:
        layer = _our_layer(contender, inputs, dropout_p)
    if layer is not None:
        layer.train(train)
        forward, adapters = functools.partial(layer, x), [p for p in layer.parameters() if p.requires_grad]
    if not train:
        return torch.no_grad()(forward)
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(dtype)
    return lambda: torch.autograd.grad(forward(), [x, *adapters], dy)


def _our_layer(contender: str, inputs: dict[str, Any], dropout_p: float) -> FusedLoRALinear:
    (N, K), (R, _) = inputs["weight"].shape, inputs["lora_a"].shape
    linear = torch.nn.Linear(K, N, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(inputs["weight"])
    quantize, use_dora = "nf4" if "nf4" in contender else None, contender == "ours-dora"
    layer = FusedLoRALinear.from_linear(linear, R, SCALING * R, dropout_p, quantize=quantize, use_dora=use_dora)
    if not use_dora:
        layer.lora_a.data, layer.lora_b.data = inputs["lora_a"], inputs["lora_b"]
    return layer


def group_step(
    contender: str,
    M: int,
    N: tuple[int, ...],
    K: int,
    R: int,
    dropout_p: float,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Step:
    """`make_step` for layers of out_features N over one x."""
    train = M > FEW_ROWS
    x = lora_inputs(M, 1, K, 1, dtype, device=device)["x"].requires_grad_(train)
    options: dict[str, Any] = {"adapter_dtype": torch.float32, "device": device}
    inputs = [lora_inputs(1, n, K, R, dtype, **options, seed=seed) for seed, n in enumerate(N)]
    weights = [tensors["weight"] for tensors in inputs]
    layers: list[Any] = [functools.partial(F.linear, weight=weight) for weight in weights]
    adapters = []
    if contender != "bare":
        if contender == "peft":
            layers = [peft_layer(weight, R, lora_dropout=dropout_p) for weight in weights]
        else:
            layers = [_our_layer(contender, tensors, dropout_p) for tensors in inputs]
        adapters = [p for layer in layers for p in layer.train(train).parameters() if p.requires_grad]

    def forward() -> list[Tensor]:
        group = open_group(layers) if contender in ("ours", "ours-nf4") else None
        ys = [layer(x) for layer in layers]
        if group is not None:
            group.close()
        return ys

    if not train:
        return torch.no_grad()(forward)
    generator = torch.Generator(device).manual_seed(1)
    dys = [torch.randn(M, n, generator=generator, device=device).to(dtype) for n in N]
    return lambda: torch.autograd.grad(forward(), [x, *adapters], dys)


def memory_step(contender: str, dtype: str, **sizes: Any) -> Step:
    """make_step for a process of its own, libraries warmed up at another size."""
    make_step(contender, **(sizes | {"M": 64, "N": 64, "K": 64}), dtype=getattr(torch, dtype))()
    return make_step(contender, **sizes, dtype=getattr(torch, dtype))


def why_not(contender: str, K: int, settings: Settings) -> str | None:
    """Why a contender does not run at these sizes, or None."""
    if contender == "compile":
        return "it compiles for longer than a quick run takes" if settings.quick else None
    if contender == "peft-nf4":
        # bitsandbytes' CPU kernels need whole blocks in a row.
        return missing("peft", "bitsandbytes") or (
            f"bitsandbytes needs K in blocks of 64, K is {K}" if K % 64 else None
        )
    return missing("peft") if contender.startswith("peft") else None


def case(
    M: int, N: int, K: int, R: int, dropout_p: float, settings: Settings, contenders: tuple[str, ...] = CONTENDERS
) -> Case:
    """The case of one layer; its floor is that of the frozen linear: forward, and dx where M > FEW_ROWS."""
    train = M > FEW_ROWS
    names, skipped = split({name: why_not(name, K, settings) for name in contenders})
    sizes: dict[str, Any] = {"M": M, "N": N, "K": K, "R": R, "dropout_p": dropout_p if train else 0.0}
    itemsize = settings.dtype.itemsize
    passes = 1 + train
    return Case(
        "lora_linear" if contenders is CONTENDERS else "DoRA",
        {"pass": "forward+backward" if train else "forward", **sizes},
        {name: functools.partial(make_step, name, **sizes, dtype=settings.dtype) for name in names},
        base="bare",
        flops=2.0 * passes * M * N * K,
        nbytes=float(passes * itemsize * (N * K + M * (N + K))),
        skipped=skipped,
    )


def group_case(M: int, N: tuple[int, ...], K: int, settings: Settings) -> Case:
    """The case of layers over one x, whose floor is that of the frozen layers, x read and dx written once."""
    train = M > FEW_ROWS
    names, skipped = split({name: why_not(name, K, settings) for name in GROUP})
    sizes: dict[str, Any] = {"M": M, "N": N, "K": K, "R": R, "dropout_p": DROPOUT_P if train else 0.0}
    passes, total = 1 + train, sum(N)
    return Case(
        "lora_linear_group",
        {"pass": "forward+backward" if train else "forward", **sizes, "N": "+".join(map(str, N))},
        {name: functools.partial(group_step, name, **sizes, dtype=settings.dtype) for name in names},
        base="bare",
        flops=2.0 * passes * M * total * K,
        nbytes=float(passes * settings.dtype.itemsize * (total * K + M * (total + K))),
        skipped=skipped,
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Each model's layers, then one size after the other from one layer: rows, rank, dropout."""
    small, large = LAYERS["SmolLM2-135M"], LAYERS["Llama-3.2-1B"]
    if settings.quick:
        for N, K in small:
            yield case(M, N, K, R, DROPOUT_P, settings)
        yield case(1, *small[0], R, 0.0, settings)
        yield group_case(M, *GROUPS["SmolLM2-135M"][0], settings)
        return
    for layers in LAYERS.values():
        for N, K in layers:
            yield case(M, N, K, R, DROPOUT_P, settings)
    for N, K in (small[0], large[0]):
        for rows in (1, 16, 128, 2048, 8192):
            yield case(rows, N, K, R, DROPOUT_P, settings)
        for rank in (8, 64, 256):
            yield case(M, N, K, rank, DROPOUT_P, settings)
        yield case(M, N, K, R, 0.0, settings)
        yield case(M, N, K, R, 0.0, settings, DORA)
    for model in ("SmolLM2-135M", "Llama-3.2-1B"):
        for widths, K in GROUPS[model]:
            for rows in (1, 64, M, 2048):
                yield group_case(rows, widths, K, settings)
