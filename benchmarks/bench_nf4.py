"""NF4 weights on the CPU: the codec, the frozen linear layer, and a QLoRA training step, against their peers.

    python benchmarks/bench_nf4.py --threads 2 --output result.json

All contenders of a row run in one process, interleaved, in a new random order every round; medians. Each row states its
floor (the bytes that must be read or written at this machine's measured bandwidth, or the operations at its measured
rate of matrix products, whichever takes longer) and our time over it.

  codec     ours and bitsandbytes' quantize_4bit and dequantize_4bit; "into" writes to a given tensor,
            which bitsandbytes can't on a CPU
  forward   few rows: torch's linear on the dense weight, ours, bitsandbytes (matmul_4bit, and Linear4bit in eval()),
            grouped-nf4-gemm where it is installed (float32 only)
  f+b       forward and the gradient of x: the same, in training
  --step    one QLoRA step of SmolLM2-135M, r=16 on all linear layers, dropout 0.1, 4 x 512 tokens, each contender in a
            process of its own: tokens/s and peak memory, ours and PEFT on bitsandbytes
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import in_fresh_process, interleave, peak_memory, product_rate, read_bandwidth, write_report
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import quantize_nf4
from lora_kernels.ops.lora_linear import frozen_linear
from lora_kernels.testing import lora_inputs

SHAPES = [(576, 576), (1536, 576), (2048, 2048), (4096, 4096)]
FEW, MANY = (1, 4), (16, 64, 128, 512, 2048)
STEP_CONTENDERS = ("ours", "peft+bnb")
BATCH, LENGTH, R, DROPOUT_P = 4, 512, 16, 0.1


def codec_steps(N: int, K: int, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], object]]]:
    weight = lora_inputs(1, N, K, 1, dtype)["weight"]
    ours, out = quantize_nf4(weight), torch.empty(N, K, dtype=dtype)
    steps = {
        "quantize": {"ours": lambda: quantize_nf4(weight)},
        "dequantize": {"ours": ours.dequantize},
        "dequantize into": {"ours": lambda: ours.dequantize(out=out)},
    }
    bnb = _bitsandbytes()
    if bnb is not None:
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
        steps["quantize"]["bnb"] = lambda: bnb.functional.quantize_4bit(weight, quant_type="nf4")
        steps["dequantize"]["bnb"] = lambda: bnb.functional.dequantize_4bit(packed, state)
        steps["dequantize into"]["bnb"] = lambda: bnb.functional.dequantize_4bit(packed, state)
    return steps


def _bitsandbytes():
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def linear_steps(M: int, N: int, K: int, dtype: torch.dtype, backward: bool) -> dict[str, Callable[[], object]]:
    inputs = lora_inputs(M, N, K, 1, dtype)
    x, ours = inputs["x"], quantize_nf4(inputs["weight"])
    dense = ours.dequantize()
    dy = torch.ones(M, N, dtype=dtype)

    def step(forward: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        if backward:
            leaf = x.clone().requires_grad_()
            return lambda: torch.autograd.grad(forward(leaf), leaf, dy)
        return torch.no_grad()(lambda: forward(x))

    steps = {"dense": step(lambda x: F.linear(x, dense)), "ours": step(lambda x: frozen_linear(x, ours))}
    bnb = _bitsandbytes()
    if bnb is not None:
        packed, state = bnb.functional.quantize_4bit(inputs["weight"], quant_type="nf4")
        steps["bnb"] = step(lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state))
        if not backward and N % 32 == 0 and K % 64 == 0:
            layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(inputs["weight"], requires_grad=False, quant_type="nf4")
            steps["bnb eval"] = step(layer.to("cpu").eval())
    grouped = _grouped_nf4_gemm() if dtype == torch.float32 and K % 64 == 0 else None
    if grouped is not None:
        experts, scales = ours.packed.view(1, N, K // 2), ours.absmax.view(1, N, K // 64)
        threads = torch.get_num_threads()

        def both() -> None:
            grouped.gemv_nf4_grouped_cpu(x, experts, scales, [M], [0], threads=threads)
            if backward:
                grouped.dgrad_nf4_grouped_cpu(dy, experts, scales, [M], [0], threads=threads)

        steps["grouped"] = both
    return steps


def _grouped_nf4_gemm():
    try:
        import cpu_grouped
    except ImportError:
        return None
    return cpu_grouped if cpu_grouped.cpu_kernels_available() else None


def train_step(contender: str, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """One forward, backward and AdamW step on random tokens, all of them in the loss, and the number of tokens."""
    from transformers import AutoModelForCausalLM

    from lora_kernels.io.models import smollm2_dir

    torch.manual_seed(0)
    directory = smollm2_dir()
    ids = torch.randint(1000, (BATCH, LENGTH))
    if contender == "ours":
        from lora_kernels import LoRAConfig, inject
        from lora_kernels.io.models import load_model
        from lora_kernels.train.sft import AnswerLoss

        model, _ = load_model(str(directory), str(dtype).removeprefix("torch."), quantize="nf4")
        inject(model, LoRAConfig(r=R, lora_alpha=2 * R, lora_dropout=DROPOUT_P))
        loss = AnswerLoss(model.train())

        def compute() -> Tensor:
            return loss(ids, ids)["loss"] / ids.numel()
    else:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantization, dtype=dtype)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=DROPOUT_P, target_modules="all-linear")
        model = get_peft_model(model, config).train()

        def compute() -> Tensor:
            return model(input_ids=ids, labels=ids).loss

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        compute().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, ids.numel()


def measure_step(contender: str, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    step, tokens = train_step(contender, dtype)
    mib = peak_memory(step)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_s": tokens / sorted(seconds)[len(seconds) // 2], "peak_mib_above_model": mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shapes", nargs="+", default=[f"{N}x{K}" for N, K in SHAPES], help="out x in features")
    parser.add_argument("--rows", nargs="+", type=int, default=[*FEW, *MANY], help="rows of x")
    parser.add_argument("--step", action="store_true", help="also a training step of SmolLM2-135M (minutes)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--step-of", choices=STEP_CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if arguments.step_of:
        print(json.dumps(measure_step(arguments.step_of, dtype, rounds=3)))
        return

    bandwidth, rate = read_bandwidth(), product_rate(dtype)
    print(f"{arguments.dtype}, {arguments.threads} threads: reads {bandwidth:.0f} GB/s, multiplies {rate:.0f} GFLOP/s")
    results = []

    def row(work: str, N: int, K: int, M: int | None, steps: dict, base: str, floor_ms: float) -> None:
        times = interleave(steps, arguments.rounds, base)
        over = times["ours"]["median_ms"] / floor_ms
        others = ", ".join(f"{name} {t['median_ms']:.3g} ms ({t['ratio']:.2f})" for name, t in times.items())
        name = f"{work} {N}x{K}" + ("" if M is None else f" M={M}")
        print(f"{name:>28}: {others}; floor {floor_ms:.3g} ms, ours {over:.2f} times that", flush=True)
        results.append({"work": work, "N": N, "K": K, "M": M, "floor_ms": floor_ms, "contenders": times})

    itemsize = torch.empty(0, dtype=dtype).element_size()
    for N, K in (tuple(map(int, shape.split("x"))) for shape in arguments.shapes):
        packed_bytes, dense_bytes = N * K * (0.5 + 4 / 64), N * K * itemsize
        for work, steps in codec_steps(N, K, dtype).items():
            row(work, N, K, None, steps, "ours", (packed_bytes + dense_bytes) / bandwidth / 1e6)
        for M in arguments.rows:
            backward = M not in FEW
            bytes_of = packed_bytes + M * (N + K) * itemsize
            times = 1e3 * bytes_of / bandwidth / 1e9, 2e3 * M * N * K / rate / 1e9
            steps = linear_steps(M, N, K, dtype, backward)
            row("f+b" if backward else "forward", N, K, M, steps, "dense", max(times) * (1 + backward))
    if arguments.step:
        common = (f"--dtype={arguments.dtype}", f"--threads={arguments.threads}")
        for contender in STEP_CONTENDERS:
            result = json.loads(in_fresh_process(__file__, f"--step-of={contender}", *common))
            print(f"QLoRA step, {contender}: {result}", flush=True)
            results.append({"work": "step", "contender": contender, **result})
    settings = {name: getattr(arguments, name) for name in ("dtype", "threads", "rounds")}
    write_report(arguments.output, results, **settings, read_gb_per_s=bandwidth, product_gflop_per_s=rate)


@pytest.mark.parametrize("contender", ["dense", "ours", "bnb"])
@pytest.mark.parametrize("M", [1, 64])
def test_nf4_linear(benchmark, contender: str, M: int) -> None:
    steps = linear_steps(M, 192, 192, torch.float32, backward=M > 1)
    if contender not in steps:
        pytest.skip("not installed")
    benchmark(steps[contender])


if __name__ == "__main__":
    main()
