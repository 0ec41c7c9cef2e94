"""Fine-tune SmolLM2-135M-Instruct, with LoRA or another method, on the records in this directory.

Measures the held-out records before and after (loss, exact match), and leaves a PEFT adapter (with --method full the
whole model), metrics.jsonl, loss.png and results.json in the output directory.

    python examples/demo.py [--output-dir outputs/demo] [--method lora|prefix|prompt|full]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lora_kernels.io.adapters import load_adapter
from lora_kernels.io.files import replacing
from lora_kernels.io.models import load_model
from lora_kernels.train.config import METHODS, SFTConfig
from lora_kernels.train.data import load_dataset, load_records, set_chat_template, to_conversation
from lora_kernels.train.generate import generate
from lora_kernels.train.sft import run_sft

HERE = Path(__file__).parent
TRAIN, EVAL, TEMPLATE = HERE / "demo_train.jsonl", HERE / "demo_eval.jsonl", HERE / "demo_template.jinja"
MAX_NEW_TOKENS, SHOWN = 24, 8
# So few steps take more than the defaults, which are for runs of hundreds.
LEARNING_RATES = {"lora": 1.5e-3, "prefix": 2e-2}


@dataclass
class Scores:
    """On the held-out records: mean loss per answer token, share of exactly right answers, and the answers."""

    loss: float
    exact_match: float
    answers: list[str]


def held_out() -> list[tuple[str, str]]:
    """(prompt, expected answer) of each held-out record."""
    conversations = [to_conversation(record, where) for record, where in load_records(EVAL)]
    return [(c.messages[0]["content"], c.messages[-1]["content"]) for c in conversations]


def evaluate(model: Any, tokenizer: Any) -> Scores:
    """Score `model`, whose tokenizer already has the demo's template."""
    dataset = load_dataset(EVAL, tokenizer, max_length=128)
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(dataset), 8):
            batch = dataset.batch(range(start, min(start + 8, len(dataset))))
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            learned = labels != -100
            total += torch.nn.functional.cross_entropy(logits[learned].float(), labels[learned], reduction="sum").item()
            count += int(learned.sum())
    records = held_out()
    prompts = [prompt for prompt, _ in records]
    answers = generate(model, tokenizer, prompts, MAX_NEW_TOKENS, batch_size=len(prompts))
    right = sum(answer.strip() == expected for answer, (_, expected) in zip(answers, records, strict=True))
    return Scores(total / count, right / len(records), answers)


def show_answers(console: Console, title: str, scores: Scores) -> None:
    table = Table("held-out prompt", "answer", "right", title=title, title_justify="left")
    for (prompt, expected), answer in list(zip(held_out(), scores.answers, strict=True))[:SHOWN]:
        right = answer.strip() == expected
        table.add_row(prompt.split("\n")[-1], " ".join(answer.split()), "[green]yes[/]" if right else "[red]no[/]")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, help="peak learning rate; the default depends on the method")
    arguments = parser.parse_args()
    console = Console()

    clock = time.perf_counter()
    model, tokenizer = load_model("smollm2-135m", "float32")
    set_chat_template(tokenizer, str(TEMPLATE))
    console.print(f"model loaded in {time.perf_counter() - clock:.0f} s")
    before = evaluate(model, tokenizer)
    show_answers(console, "Before", before)
    del model

    clock = time.perf_counter()
    run_sft(
        SFTConfig(
            model="smollm2-135m",
            data=str(TRAIN),
            eval_data=str(EVAL),
            output_dir=str(arguments.output_dir),
            method=arguments.method,
            chat_template=str(TEMPLATE),
            dtype="float32",
            max_length=128,
            max_steps=arguments.max_steps,
            batch_size=arguments.batch_size,
            lr=arguments.lr or LEARNING_RATES.get(arguments.method),
            warmup_ratio=0.08,
            # One evaluation, at the end: with several, the best adapter would be picked on the held-out records.
            eval_steps=arguments.max_steps,
        )
    )
    seconds = time.perf_counter() - clock

    # A fresh base model and the files on disk: what is measured is what was saved.
    model, tokenizer = load_model("smollm2-135m", "float32")
    set_chat_template(tokenizer, str(TEMPLATE))
    load_adapter(model, arguments.output_dir)
    after = evaluate(model.eval(), tokenizer)
    show_answers(console, "After", after)

    table = Table("held-out records", "before", "after", title=f"Trained in {seconds:.0f} s", title_justify="left")
    table.add_row("loss per answer token", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("exactly right", f"{before.exact_match:.0%}", f"{after.exact_match:.0%}")
    console.print(table)
    results = {
        "method": arguments.method,
        "records": len(before.answers),
        "train_seconds": round(seconds, 1),
        "before": {"loss": before.loss, "exact_match": before.exact_match},
        "after": {"loss": after.loss, "exact_match": after.exact_match},
    }
    path = arguments.output_dir / "results.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"what was trained, metrics.jsonl, loss.png and results.json are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
