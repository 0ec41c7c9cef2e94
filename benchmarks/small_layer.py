"""What a small layer costs, where Python counts for more than arithmetic: ratios to peers in one interleaved run.

`python benchmarks/small_layer.py [--rounds N] [--output FILE]`, on one thread:

- a training step (forward and backward) of a 64×64 layer for 64 rows in float32, r = 8, over PEFT's layer;
- one row of 576×576 in bfloat16 without gradients, over torch's frozen layer;
- a training step of query, key and value, 64 rows of 576 in float32, as one group over three calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear
from lora_kernels.bench.measure import interleave, write_report
from lora_kernels.bench.peers import peft_layer
from lora_kernels.nn.lora_linear import open_group

RANK = 8


def training_step(forward: Callable[[Tensor], list[Tensor]], x: Tensor) -> Callable[[], None]:
    dys = [torch.randn_like(y) for y in forward(x)]
    return lambda: torch.autograd.backward(forward(x), dys)


def small_layer(dropout_p: float) -> dict[str, Callable[[], None]]:
    linear, x = nn.Linear(64, 64, bias=False), torch.randn(64, 64, requires_grad=True)
    ours = FusedLoRALinear.from_linear(linear, RANK, 2 * RANK, dropout_p)
    peft = peft_layer(linear.weight.detach(), RANK, lora_dropout=dropout_p)
    return {"ours": training_step(lambda x: [ours(x)], x), "PEFT": training_step(lambda x: [peft(x)], x)}


def one_row() -> dict[str, Callable[[], None]]:
    linear, x = nn.Linear(576, 576, dtype=torch.bfloat16), torch.randn(1, 576, dtype=torch.bfloat16)
    ours = FusedLoRALinear.from_linear(linear, RANK, 2 * RANK).eval()
    return {"ours": torch.no_grad()(lambda: ours(x)), "torch's frozen layer": torch.no_grad()(lambda: linear(x))}


def group() -> dict[str, Callable[[], None]]:
    layers = [FusedLoRALinear(576, N, RANK, 2 * RANK, 0.1) for N in (576, 192, 192)]
    x = torch.randn(64, 576, requires_grad=True)

    def together(x: Tensor) -> list[Tensor]:
        opened = open_group(layers)
        try:
            return [layer(x) for layer in layers]
        finally:
            opened.close()

    return {
        "one group": training_step(together, x),
        "three calls": training_step(lambda x: [layer(x) for layer in layers], x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=301)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; allowed: at least 1")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = {
        "64 rows of 64×64, dropout 0.1": small_layer(0.1),
        "64 rows of 64×64, no dropout": small_layer(0.0),
        "1 row of 576×576, bfloat16, no gradients": one_row(),
        "64 rows of 576: query, key and value": group(),
    }
    results = {}
    for case, steps in cases.items():
        for step in steps.values():
            step()
        ours, peer = steps
        results[case] = interleave(steps, options.rounds, peer)
        times = {name: 1e3 * each["median_ms"] for name, each in results[case].items()}
        print(f"{case}: {ours} {times[ours]:.0f} µs, {peer} {times[peer]:.0f}: {results[case][ours]['ratio']:.2f}")
    if options.output:
        write_report(options.output, results, rounds=options.rounds)


if __name__ == "__main__":
    main()
