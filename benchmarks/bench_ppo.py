"""Peak memory of PPO with all roles on one base, beside SFT and beside a base for each role, on SmolLM2-135M.

    python benchmarks/bench_ppo.py [--output FILE]

Each run is a process of its own: the model is loaded and trained for two steps on rows of the same lengths. "copies"
keeps two further bases in memory, those of a reference and a value model in a layout without named adapters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import in_fresh_process, peak_memory, write_report

from lora_kernels.io.models import load_model
from lora_kernels.train.config import PPOConfig, SFTConfig

CONTENDERS = ("sft", "ppo", "copies")
ROWS, NEW_TOKENS, COPIES = 8, 24, 2
PROMPT, ANSWER = "Name three things that one sees in a kitchen.", " a pot, a pan, a spoon" * 3


def run(contender: str, method: str, dtype: str) -> None:
    common = {"model": "smollm2-135m", "method": method, "dtype": dtype, "r": 8, "max_steps": 2, "batch_size": ROWS}
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data.jsonl"
        data.write_text((json.dumps({"prompt": PROMPT, "completion": ANSWER}) + "\n") * 2 * ROWS)
        common |= {"data": str(data), "output_dir": f"{directory}/out"}
        if contender == "sft":
            from lora_kernels.train.sft import run_sft

            run_sft(SFTConfig(**common), progress=False)
            return
        from lora_kernels.train.ppo import run_ppo

        quantize = "nf4" if method == "qlora" else None
        copies = [load_model("smollm2-135m", dtype, quantize)[0] for _ in range(COPIES if contender == "copies" else 0)]
        for tensor in (tensor for copy in copies for tensor in (*copy.parameters(), *copy.buffers())):
            # Weights that nothing has read are not in memory yet.
            tensor.data = tensor.data.clone()

        def reward(prompts: list[Any], responses: list[str]) -> list[float]:
            return [float(len(text)) for text in responses]

        config = PPOConfig(
            **common,
            reward="bench_ppo:reward",
            rollout_size=ROWS,
            rollout_batch_size=ROWS,
            max_new_tokens=NEW_TOKENS,
            ppo_epochs=1,
            eval_prompts=0,
        )
        run_ppo(config, progress=False, reward=reward)
        del copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(peak_memory(lambda: run(*arguments.memory_of, arguments.dtype)))
        return
    results = []
    for method in ("lora", "qlora"):
        peaks = {
            contender: float(in_fresh_process(__file__, "--dtype", arguments.dtype, "--memory-of", contender, method))
            for contender in CONTENDERS
        }
        ratios = ", ".join(f"{name} {mib:.0f} MiB ({mib / peaks['sft']:.2f})" for name, mib in peaks.items())
        print(f"{method}: {ratios}", flush=True)
        results.append({"method": method, "peak_mib": peaks})
    write_report(arguments.output, results, rows=ROWS, new_tokens=NEW_TOKENS, dtype=arguments.dtype)


if __name__ == "__main__":
    main()
