"""SFT, a reward model and PPO on SmolLM2-135M-Instruct, whose replies to orders become the kind that a rule calls good.

SFT learns replies that are good and bad in equal shares, the reward model learns from pairs which of two is better, and
PPO makes the policy give the better ones. The rule (rlhf_rule.py) chose the pairs; beyond that no stage sees it. In the
end a table compares the policy before and after PPO, on orders that are in no training file: reward, rule, KL,
and some replies.

    python examples/demo_rlhf.py [--output-dir outputs/demo_rlhf] [--method qlora|lora] [--steps 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rlhf_rule import score

from lora_kernels.files import replacing, write_json
from lora_kernels.train.config import PPOConfig, RewardConfig, SFTConfig
from lora_kernels.train.metrics import METRICS
from lora_kernels.train.ppo.trainer import PLOT, SAMPLES, run_ppo
from lora_kernels.train.reward import EVALUATION, REWARDS, run_reward
from lora_kernels.train.sft import run_sft

HERE = Path(__file__).parent
HELD_OUT, SHOWN = 24, 6
LONGEST = 24  # tokens of a reply
# So few steps take more than the defaults, which are for runs of hundreds.
SFT = {"max_steps": 20, "batch_size": 8, "lr": 1.5e-3, "warmup_ratio": 0.1}
REWARD = {"max_steps": 24, "batch_size": 8, "lr": 1e-3, "warmup_ratio": 0.1}
PPO = {
    "rollout_size": 16,
    "batch_size": 8,
    # One pass over a rollout, in two optimizer steps: a second pass would cost as much again, and give less.
    "ppo_epochs": 1,
    "minibatches": 2,
    "max_new_tokens": LONGEST,
    "temperature": 1.0,
    "lr": 2e-4,
    "lr_scheduler": "constant",
    # The rewards of this model differ by several units; a weaker pull lets PPO find replies that only the model likes.
    "kl_coef": 0.4,
    "missing_eos_penalty": 1.0,
    "eval_prompts": HELD_OUT,
}


def base(method: str) -> dict[str, Any]:
    """What all stages have in common."""
    template = str(HERE / "demo_template.jinja")
    return {"model": "smollm2-135m", "method": method, "chat_template": template, "dtype": "float32", "max_length": 128}


def split_prompts(directory: Path) -> tuple[str, str]:
    """The files of the prompts that PPO learns from, and of those held out."""
    lines = (HERE / "rlhf_prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    files = []
    for name, part in (("prompts.jsonl", lines[:-HELD_OUT]), ("held_out.jsonl", lines[-HELD_OUT:])):
        with replacing(directory / name) as temporary:
            temporary.write_text("".join(part), encoding="utf-8")
        files.append(str(directory / name))
    return files[0], files[1]


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo_rlhf"))
    parser.add_argument("--method", choices=("qlora", "lora"), default="qlora")
    parser.add_argument("--steps", type=int, default=10, help="rollouts of PPO")
    arguments = parser.parse_args()
    console, started, out = Console(), time.perf_counter(), arguments.output_dir
    common = base(arguments.method)

    console.rule("1. SFT: all ways to reply")
    run_sft(SFTConfig(**common, **SFT, data=str(HERE / "rlhf_sft.jsonl"), output_dir=str(out / "sft")))

    console.rule("2. Reward model: which of two replies is better")
    pairs = {"data": str(HERE / "rlhf_pairs.jsonl"), "eval_data": str(HERE / "rlhf_pairs_eval.jsonl")}
    # One evaluation, at the end: with several, the best adapter would be picked on the held-out pairs.
    pairs |= {"output_dir": str(out / "reward"), "eval_steps": REWARD["max_steps"]}
    run_reward(RewardConfig(**common, **REWARD, **pairs))
    accuracy = json.loads((out / "reward" / EVALUATION).read_text(encoding="utf-8"))["accuracy"]

    console.rule("3. PPO: the better ones")
    prompts, held_out = split_prompts(out)
    adapters = {"adapter": str(out / "sft"), "reward_adapter": str(out / "reward"), "output_dir": str(out / "ppo")}
    steps = {"max_steps": arguments.steps, "eval_steps": arguments.steps, "save_steps": 4}
    result = run_ppo(PPOConfig(**common, **PPO, **adapters, **steps, data=prompts, eval_data=held_out))

    samples, records = read_lines(out / "ppo" / SAMPLES), read_lines(held_out)
    replies = [[line["response"] for line in samples if line["step"] == step] for step in (0, result.steps)]
    rule = [statistics.mean(score([], texts, records)) for texts in replies]
    shown = Table("held-out order", "reply before PPO", "after PPO", title="Replies", title_justify="left")
    for record, *texts in list(zip(records, *replies, strict=True))[:SHOWN]:
        shown.add_row(record["prompt"], *(text.strip() for text in texts))
    console.print(shown)
    kl = [record["objective/kl"] for record in read_lines(out / "ppo" / METRICS) if "objective/kl" in record]
    seconds = time.perf_counter() - started
    table = Table("held-out orders", "before PPO", "after PPO", title=f"In {seconds:.0f} s", title_justify="left")
    table.add_row("reward", f"{result.first_eval_score:.2f}", f"{result.eval_score:.2f}")
    table.add_row("score of the rule, 0 to 1", *(f"{value:.2f}" for value in rule))
    table.add_row("KL to the SFT policy, nats a reply", f"{kl[0]:.2f}", f"{kl[-1]:.2f}")
    console.print(table)
    console.print(f"the reward model is right on {100 * accuracy:.0f} % of the held-out pairs")
    results = {
        "method": arguments.method,
        "seconds": round(seconds, 1),
        "reward_model_accuracy": accuracy,
        "reward": [result.first_eval_score, result.eval_score],
        "rule": rule,
        "kl": kl,
    }
    write_json(out / "results.json", results)
    console.print(f"plots: {out / 'reward' / REWARDS}, {out / 'ppo' / PLOT}")


if __name__ == "__main__":
    main()
