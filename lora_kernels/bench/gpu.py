"""What `benchmarks/gpu_check.py` measures of whole models and of rounding, on the device that it is given."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import NF4Linear, lora_linear
from lora_kernels.bench.cases import SCALING
from lora_kernels.bench.peers import AddmmLoRA, bitsandbytes_linear, peft_layer
from lora_kernels.bench.train import SMOLLM2_135M, adapted, step_of
from lora_kernels.bench.train import R as RANK
from lora_kernels.models.fuse import fuse_decoder

# name -> (settings of its LlamaConfig, rows of a batch, tokens of a row)
MODELS = {
    "SmolLM2-135M": (SMOLLM2_135M, 4, 512),
    "Llama-3.2-1B": (
        SMOLLM2_135M
        | dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8), 4, 1024,
    ),
}  # fmt: skip
TINY_MODELS = {
    "tiny": (
        SMOLLM2_135M
        | dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
               num_key_value_heads=1), 1, 8,
    )
}  # fmt: skip
STEPS = ("frozen", "ours-lora", "ours-qlora", "ours-lora-graphs", "ours-qlora-graphs", "peft-lora", "peft-qlora")
SMALL_UPDATE = 1e-3


def random_model(settings: dict[str, int], device: str) -> nn.Module:
    """A Llama with random bfloat16 weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**settings))
    finally:
        torch.set_default_dtype(previous)


def _replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, make(child))


def _quantised(contender: str, base: Any) -> Any:
    """A copy of the model, its linear layers in NF4 where the contender has them so."""
    model = copy.deepcopy(base)
    if contender.startswith("ours-qlora"):
        _replace_linears(model, NF4Linear.from_linear)
    elif contender == "peft-qlora":
        _replace_linears(model, lambda linear: bitsandbytes_linear(linear.weight.data))
        model.is_loaded_in_4bit = True
    return model


def training_step(contender: str, base: Any, batch: int, length: int, rounds: int) -> dict[str, float]:
    """The median over `rounds` of one training step of `base` adapted anew, as `lora_kernels.bench.train` has it:
    {"ms", "tokens_per_s", "peak_mib"}; the peak is that of torch's allocator, 0 on a CPU, without `base` itself. It
    counts the steps before those that are timed where there are graphs, whose memory no allocator sees used later."""
    device = next(base.parameters()).device
    on_gpu = device.type == "cuda"
    # Of the contender before, which else would be freed during the step.
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    torch.manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (batch, length), device=device)
    model = _quantised(contender, base)
    if contender.startswith("ours"):
        # As the trainers do.
        fuse_decoder(model)
    step = step_of(contender, adapted(contender, model))

    def seconds() -> float:
        start = time.perf_counter()
        step(ids)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    has_graphs = contender.endswith("-graphs")
    if on_gpu and has_graphs:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        seconds()
    if on_gpu and not has_graphs:
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds() for _ in range(rounds))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else 0.0
    return {"ms": 1e3 * median, "tokens_per_s": ids.numel() / median, "peak_mib": peak}


def small_updates(M: int, N: int, K: int, device: str, contenders: list[str]) -> dict[str, float]:
    """How much of a small update arrives in y: ⟨y - x Wᵀ, Δ⟩ / ⟨Δ, Δ⟩, which should be 1, for Δ = s x Aᵀ Bᵀ with
    ‖s B A‖ = `SMALL_UPDATE` ‖W‖, in bfloat16 with float32 adapters and without dropout."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(M, K, device=device, generator=generator).bfloat16()
    weight = (torch.randn(N, K, device=device, generator=generator) / K**0.5).bfloat16()
    lora_a = torch.randn(RANK, K, device=device, generator=generator) / K**0.5
    lora_b = torch.randn(N, RANK, device=device, generator=generator)
    lora_b *= SMALL_UPDATE * weight.double().norm() / (SCALING * lora_b.double() @ lora_a.double()).norm()
    base = x.double() @ weight.double().T
    delta = SCALING * (x.double() @ lora_a.double().T) @ lora_b.double().T

    def forward(contender: str) -> Tensor:
        if contender == "addmm":
            return AddmmLoRA.apply(x, weight, lora_a.bfloat16(), lora_b.bfloat16())
        if contender == "addmm, the term first":
            return delta.bfloat16().addmm_(x, weight.T)
        if contender == "unsloth":
            from lora_kernels.bench.unsloth_peer import unsloth_layer

            return unsloth_layer(weight, lora_a, lora_b)(x)
        if contender == "peft":
            layer = peft_layer(weight, RANK).eval()
            adapters = dict(layer.named_parameters())
            for name, value in (("lora_A", lora_a), ("lora_B", lora_b)):
                next(t for key, t in adapters.items() if name in key).data.copy_(value)
            return layer(x)
        return lora_linear(x, weight, lora_a, lora_b, SCALING)

    with torch.no_grad():
        found = {name: forward(name).double() - base for name in contenders}
    return {name: ((term * delta).sum() / (delta * delta).sum()).item() for name, term in found.items()}


def training_steps(
    device: str, models: dict[str, tuple], skipped: dict[str, str], rounds: int, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """{model: {contender: result of `training_step`}}; what fails is {"failed": why}. `keep` is given what is known
    after each."""
    report: dict[str, Any] = {}
    for name, (settings, batch, length) in models.items():
        base = random_model(settings, device)
        report[name] = {"batch": batch, "length": length}
        for contender in (contender for contender in STEPS if contender not in skipped):
            try:
                report[name][contender] = training_step(contender, base, batch, length, rounds)
            except Exception as error:
                report[name][contender] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            keep(report)
    return report
