"""How long Python takes to queue a layer's forward and backward pass on a GPU, without one: launches do nothing.

`python benchmarks/queueing.py [--rounds N] [--output FILE]` prints µs for bfloat16, dropout 0.1, a float32 adapter of
rank 16. Triton runs over tools/fake_cuda.py, CUDA C++ over the idle emulator; tensors come from torch's CPU allocator.

- Triton: `kernel[grid](...)`, its own launcher, which examines every argument.
- kept: what Triton compiled is found in Python and given to Triton's launcher, as where the extension is missing.
- extension: it is found and launched by the extension (`lora_kernels.backends.triton.common.Launcher`).
- CUDA C++: one call of the extension a pass.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import fake_cuda  # noqa: E402

SIZES = ((64, 576, 576), (512, 576, 576), (512, 1536, 576))
RANK, MULTIPROCESSORS = 16, 132


def measure(rounds: int, output: Path | None) -> None:
    fake_cuda.Device()
    import torch

    from lora_kernels import _simt
    from lora_kernels.backends.cuda import Kernels
    from lora_kernels.backends.triton import common, lora_linear
    from lora_kernels.bench.measure import interleave, write_report
    from lora_kernels.types import AdapterNeeds, Dropout, Layers, Needs, Projection

    torch.set_num_threads(1)
    _simt.set_idle(True)
    cuda = Kernels("_simt", "cpu", "")
    cuda._block_target = lambda x: 2 * MULTIPROCESSORS
    lora_linear._multiprocessors = lambda index: MULTIPROCESSORS
    launch, driver, way = common.Launcher.launch, common._driver(), ""

    def init(self, name, t):
        self.index, self.stream, self.device, self.family = 0, 0, contextlib.nullcontext(), "sm90"
        self.driver = driver if way == "extension" else None

    def launch_as_wanted(self, kernel, grid, args, constants):
        if way == "Triton":
            kernel[grid](*common._for_triton(args), **constants)
        else:
            launch(self, kernel, grid, args, constants)

    common.Launcher.__init__, common.Launcher.launch = init, launch_as_wanted

    def forward(name, backend, dy, x, h, layers):
        nonlocal way
        way = name
        backend.lora_linear_fwd(x, layers, dropout)

    def backward(name, backend, dy, x, h, layers):
        nonlocal way
        way = name
        backend.lora_linear_bwd([dy], x, [h], layers, dropout, needs)

    dropout, results = Dropout(0.1, torch.zeros(2, dtype=torch.int64)), {}
    needs = Needs(True, (AdapterNeeds(True, True),))
    backends = {"extension": lora_linear, "kept": lora_linear, "Triton": lora_linear, "CUDA C++": cuda}
    for M, N, K in SIZES:
        x, dy, h = torch.zeros(M, K).bfloat16(), torch.zeros(M, N).bfloat16(), torch.zeros(M, RANK)
        weight, lora_a, lora_b = torch.zeros(N, K).bfloat16(), torch.zeros(RANK, K), torch.zeros(N, RANK)
        layers = Layers([Projection(weight, lora_a, lora_b, 2.0)])
        steps = {
            f"{name}, {call.__name__}": partial(call, name, backend, dy, x, h, layers)
            for name, backend in backends.items()
            for call in (forward, backward)
        }
        for step in steps.values():
            step()
        timed = interleave(steps, rounds, "extension, forward")
        results[f"{M} x {K} -> {N}"] = timed
        print(f"{M} rows, {K} -> {N}: median and least of {rounds} rounds, µs")
        for name, times in timed.items():
            print(f"  {name:20} {1e3 * times['median_ms']:6.1f} {1e3 * times['min_ms']:6.1f}")
    if output:
        write_report(output, results, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; allowed: at least 1")
    if fake_cuda.is_there():
        measure(options.rounds, options.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        fake_cuda.build(Path(folder))
        environment = os.environ | fake_cuda.variables(Path(folder))
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


if __name__ == "__main__":
    main()
