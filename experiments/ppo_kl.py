"""PPO with and without the KL penalty: the score rises, and without it the policy drifts (Ziegler et al. 2019).

SmolLM2-135M-Instruct, fine-tuned to reply to the RLHF demo's orders in good and bad ways, is rewarded by the demo's
rule. A run that was killed goes on where it was: its files are in outputs/ppo_kl/. results/ppo_kl.json and .png
hold score and KL of every rollout.

    python experiments/ppo_kl.py [--steps 20] [--seeds 0 1 2] [--kl-coefs 0.05 0]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import EXAMPLES, RESULTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_kernels.files import replacing, write_json
from lora_kernels.train.config import PPOConfig, SFTConfig
from lora_kernels.train.metrics import METRICS
from lora_kernels.train.ppo.trainer import run_ppo
from lora_kernels.train.sft import run_sft

OUTPUT = Path("outputs/ppo_kl")
COMMON = {
    "model": "smollm2-135m",
    "chat_template": str(EXAMPLES / "demo_template.jinja"),
    "dtype": "float32",
    "max_length": 128,
    "r": 8,
}
COLUMNS = {"score": "objective/scores", "kl": "objective/kl", "entropy": "objective/entropy"}


def fine_tune() -> str:
    """The directory of the SFT adapter that all runs start from."""
    directory = OUTPUT / "sft"
    data = {"data": str(EXAMPLES / "rlhf_sft.jsonl"), "output_dir": str(directory)}
    run_sft(SFTConfig(**COMMON, **data, max_steps=20, batch_size=8, lr=1.5e-3, save_steps=5, resume=directory.exists()))
    return str(directory)


def train(adapter: str, kl_coef: float, seed: int, steps: int) -> list[dict[str, float]]:
    """The metrics of one run."""
    directory = OUTPUT / f"kl_{kl_coef:g}_seed_{seed}"
    config = PPOConfig(
        **COMMON,
        data=str(EXAMPLES / "rlhf_prompts.jsonl"),
        output_dir=str(directory),
        adapter=adapter,
        reward=f"{EXAMPLES / 'rlhf_rule.py'}:score",
        max_steps=steps,
        rollout_size=16,
        batch_size=8,
        max_new_tokens=24,
        temperature=1.0,
        # One pass over a rollout, in two optimizer steps: a second pass would cost as much again, and give less.
        ppo_epochs=1,
        minibatches=2,
        lr=5e-4,
        lr_scheduler="constant",
        kl_coef=kl_coef,
        seed=seed,
        eval_prompts=24,
        eval_steps=steps,
        save_steps=5,
        resume=directory.exists(),
    )
    run_ppo(config)
    return [json.loads(line) for line in (directory / METRICS).read_text(encoding="utf-8").splitlines()]


def plot(results: dict[str, dict[str, Any]], output: Path) -> None:
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("score", "score of the rule"), ("kl", "KL to the SFT policy, nats a reply"))
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for color, (kl_coef, runs) in zip(("#0072B2", "#D55E00", "#009E73"), results.items(), strict=False):
            for values in runs[name]:
                axes.plot(range(1, len(values) + 1), values, color=color, alpha=0.3, linewidth=1)
            means = [statistics.mean(column) for column in zip(*runs[name], strict=True)]
            axes.plot(range(1, len(means) + 1), means, color=color, linewidth=2, label=f"kl_coef {kl_coef}")
        axes.set(title=title, xlabel="rollout")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.05, 0.0])
    arguments = parser.parse_args()
    adapter = fine_tune()
    results: dict[str, dict[str, Any]] = {}
    for kl_coef in arguments.kl_coefs:
        runs = [train(adapter, kl_coef, seed, arguments.steps) for seed in arguments.seeds]
        columns = {**COLUMNS, "eval_score": "eval_score"}
        values = {name: [[r[key] for r in run if key in r] for run in runs] for name, key in columns.items()}
        results[f"{kl_coef:g}"] = values
        write_json(RESULTS / "ppo_kl.json", results)
    plot(results, RESULTS / "ppo_kl.png")
    print("| kl_coef | score before | after | KL at the end | entropy at the end |\n|---|---|---|---|---|")
    for kl_coef, runs in results.items():
        before, after = ([scores[at] for scores in runs["eval_score"]] for at in (0, -1))
        ends = ([values[-1] for values in runs[name]] for name in ("kl", "entropy"))
        cells = (f"{statistics.mean(v):.2f} ± {statistics.pstdev(v):.2f}" for v in (before, after, *ends))
        print(f"| {kl_coef} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
