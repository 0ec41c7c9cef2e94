"""Forward + backward of one LoRA linear layer on the CPU, against its peers, as a ratio over the bare frozen linear.

    python benchmarks/bench_lora_linear.py --threads 2 --dtype bfloat16 --output result.json

All contenders run in one process, interleaved, in a new random order every round; the table has medians. The ratio of
a round divides by the bare linear of the same round, so that a busy machine slows both. Gradients: dx, and for the
adapters dlora_a and dlora_b.

  bare    F.linear with a frozen weight: what no adapter can beat
  ours    lora_kernels.lora_linear, float32 adapters, dropout 0.1
  addmm   three in-place addmm around the frozen products, adapters in the dtype of x, no dropout
  peft    PEFT's LoRA layer, float32 adapters, dropout 0.1

With --dora also, both without dropout, where the two compute the same (docs/kernels.md):

  dora       FusedLoRALinear(use_dora=True): the norms are computed in every forward
  peft-dora  PEFT's layer with use_dora=True

`pytest benchmarks/ --benchmark-only` runs the same contenders on one small layer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import in_fresh_process, interleave, peak_memory, write_report
from contenders import DROPOUT_P, SCALING, AddmmLoRA, peft_layer
from torch.nn import functional as F

from lora_kernels import FusedLoRALinear, lora_linear
from lora_kernels.testing import lora_inputs

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096)]
CONTENDERS = ("bare", "ours", "addmm", "peft")
DORA = ("dora", "peft-dora")


def make_step(contender: str, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> Callable[[], None]:
    """A function that runs one forward and backward of ``contender``."""
    inputs = lora_inputs(M, N, K, R, dtype, adapter_dtype=dtype if contender == "addmm" else torch.float32)
    x = inputs["x"].requires_grad_()
    weight = inputs["weight"]
    adapters = [inputs["lora_a"].requires_grad_(), inputs["lora_b"].requires_grad_()]
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(dtype)

    if contender == "bare":
        forward, parameters = lambda: F.linear(x, weight), []
    elif contender == "ours":
        forward, parameters = lambda: lora_linear(x, weight, *adapters, SCALING, dropout_p=DROPOUT_P), adapters
    elif contender == "addmm":
        forward, parameters = lambda: AddmmLoRA.apply(x, weight, *adapters), adapters
    else:
        if contender == "dora":
            linear = torch.nn.Linear(K, N, bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight)
            layer = FusedLoRALinear.from_linear(linear, R, SCALING * R, use_dora=True)
        elif contender == "peft-dora":
            layer = peft_layer(weight, R, lora_dropout=0.0, use_dora=True)
        else:
            layer = peft_layer(weight, R)
        forward, parameters = lambda: layer(x), [p for p in layer.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(forward(), [x, *parameters], dy)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-M", type=int, default=2048, help="tokens")
    parser.add_argument("-r", type=int, default=16, help="rank")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{N}x{K}" for N, K in SHAPES], help="out_features x in_features"
    )
    parser.add_argument("--dora", action="store_true", help="time DoRA layers too, ours and PEFT's")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory of a step")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", choices=CONTENDERS + DORA, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    if arguments.memory_of:
        make_step(arguments.memory_of, 64, 64, 64, arguments.r, dtype)()
        print(peak_memory(make_step(arguments.memory_of, arguments.M, *shapes[0], arguments.r, dtype)))
        return

    contenders = CONTENDERS + DORA * arguments.dora
    results = []
    print(f"{'out x in':>12} {'bare ms':>9} " + " ".join(f"{c:>9}" for c in contenders[1:]) + "   (ratio over bare)")
    for N, K in shapes:
        steps = {name: make_step(name, arguments.M, N, K, arguments.r, dtype) for name in contenders}
        times = interleave(steps, arguments.rounds, base="bare")
        result = {"N": N, "K": K, "contenders": times}
        line = f"{f'{N}x{K}':>12} {times['bare']['median_ms']:9.1f} "
        line += " ".join(f"{times[c]['ratio']:9.3f}" for c in contenders[1:])
        if sys.platform == "linux" and not arguments.no_memory:
            same = [f"--shapes={N}x{K}", f"-M{arguments.M}", f"-r{arguments.r}", f"--dtype={arguments.dtype}"]
            same.append(f"--threads={arguments.threads}")
            memory = {c: float(in_fresh_process(__file__, f"--memory-of={c}", *same)) for c in contenders}
            result["peak_mib"] = memory
            line += "   peak MiB: " + ", ".join(f"{c} {mib:.0f}" for c, mib in memory.items())
        results.append(result)
        print(line, flush=True)
    settings = {name: getattr(arguments, name) for name in ("M", "r", "dtype", "threads", "rounds")}
    write_report(arguments.output, results, **settings)


@pytest.mark.parametrize("contender", CONTENDERS + DORA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lora_linear(benchmark, contender: str, dtype: torch.dtype) -> None:
    benchmark(make_step(contender, 128, 192, 192, 16, dtype))


if __name__ == "__main__":
    main()
