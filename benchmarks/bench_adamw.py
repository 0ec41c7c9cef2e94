"""One LoRA+ optimizer step over the adapters of SmolLM2-135M on the CPU, against torch's, clipping included.

    python benchmarks/bench_adamw.py --threads 2 --output result.json

420 tensors: lora_a and lora_b (rank 16, float32) of q, k, v, o, gate, up and down in 30 layers, in two groups with
learning rates of their own. All contenders run in one process, interleaved, in a new random order every round; the
table has medians. The ratio of a round divides by ours of the same round, so that a busy machine slows both.

  ours     LoRAPlusAdamW with max_grad_norm
  foreach  clip_grad_norm_ and torch.optim.AdamW(foreach=True)
  fused    clip_grad_norm_ and torch.optim.AdamW(fused=True)

`pytest benchmarks/ --benchmark-only` runs the same contenders on one layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import interleave, write_report
from torch import nn

from lora_kernels.optim import LoRAPlusAdamW

LAYERS = 30
# out_features, in_features of q, k, v, o, gate, up and down
LINEARS = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
CONTENDERS = ("ours", "foreach", "fused")
LR, LR_RATIO, MAX_GRAD_NORM = 1e-4, 16, 1.0


def make_step(contender: str, layers: int, r: int) -> Callable[[], None]:
    """A function that clips and steps over fresh adapters with gradients of norm above max_grad_norm."""
    generator = torch.Generator().manual_seed(0)
    lora_a = [nn.Parameter(torch.randn(r, K, generator=generator)) for _ in range(layers) for _, K in LINEARS]
    lora_b = [nn.Parameter(torch.randn(N, r, generator=generator)) for _ in range(layers) for N, _ in LINEARS]
    parameters = [*lora_a, *lora_b]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-2
    groups = [{"params": lora_a, "lr": LR}, {"params": lora_b, "lr": LR * LR_RATIO}]
    if contender == "ours":
        return LoRAPlusAdamW(groups, lr=LR, lr_ratio=1, max_grad_norm=MAX_GRAD_NORM).step
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **{contender: True})

    def step() -> None:
        # Scaled by this in place, the gradients have the norm 1 from the second round on: the same work.
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM, foreach=True)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", type=int, default=16, help="rank")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = {contender: make_step(contender, LAYERS, arguments.r) for contender in CONTENDERS}
    results = interleave(steps, arguments.rounds, base="ours")
    print(f"{'':>8} {'median ms':>10} {'min ms':>8} {'over ours':>10}")
    for contender, times in results.items():
        print(f"{contender:>8} {times['median_ms']:10.2f} {times['min_ms']:8.2f} {times['ratio']:10.2f}")
    settings = {name: getattr(arguments, name) for name in ("r", "threads", "rounds")}
    settings |= {"tensors": 2 * LAYERS * len(LINEARS), "elements": LAYERS * arguments.r * sum(map(sum, LINEARS))}
    write_report(arguments.output, results, **settings)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_adamw(benchmark, contender: str) -> None:
    benchmark(make_step(contender, 1, 16))


if __name__ == "__main__":
    main()
