"""Fine-tune SmolLM2-135M-Instruct, with QLoRA or another method, on the records in this directory.

Measures the held-out records before (loss, and the answers to a few) and after (loss, exact match), and leaves a PEFT
adapter (with --method full the whole model), metrics.jsonl, loss.png and results.json in the output directory.

    python examples/demo.py [--output-dir outputs/demo] [--method qlora|lora|dora|adalora|prefix|prompt|full]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_kernels.data.chat import set_chat_template
from lora_kernels.data.dataset import load_dataset
from lora_kernels.data.messages import to_conversation
from lora_kernels.data.records import load_records
from lora_kernels.files import replacing
from lora_kernels.io.adapters import load_adapter
from lora_kernels.io.models import load_model
from lora_kernels.methods.registry import METHODS
from lora_kernels.models.generate import generate
from lora_kernels.train.causal_lm import AnswerLoss
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.launch import make_accelerator
from lora_kernels.train.loop import evaluate
from lora_kernels.train.sft import run_sft

HERE = Path(__file__).parent
TRAIN, EVAL, TEMPLATE = HERE / "demo_train.jsonl", HERE / "demo_eval.jsonl", HERE / "demo_template.jinja"
MAX_LENGTH, MAX_NEW_TOKENS, SHOWN = 128, 20, 8
# So few steps take more than the defaults, which are for runs of hundreds.
LEARNING_RATES = {"adalora": 3e-3, "dora": 1.5e-3, "lora": 1.5e-3, "prefix": 2e-2, "qlora": 1.5e-3}


@dataclass
class Answers:
    """Answers to the first held-out records, and how many are exactly right."""

    texts: list[str]
    right: int

    def __str__(self) -> str:
        return f"{self.right} of {len(self.texts)}"


def load_base(method: str) -> tuple[Any, Any]:
    """The base model as `method` sees it, and its tokenizer with the demo's template."""
    model, tokenizer = load_model("smollm2-135m", "float32", quantize="nf4" if method == "qlora" else None)
    set_chat_template(tokenizer, str(TEMPLATE))
    return model, tokenizer


def held_out() -> list[tuple[str, str]]:
    """(prompt, expected answer) of each held-out record."""
    conversations = [to_conversation(record, where) for record, where in load_records(EVAL)]
    return [(c.messages[0]["content"], c.messages[-1]["content"]) for c in conversations]


def held_out_loss(model: Any, tokenizer: Any) -> float:
    """Mean loss per answer token of the held-out records, as the trainer computes it."""
    dataset = load_dataset(EVAL, tokenizer, MAX_LENGTH)
    accelerator = make_accelerator()
    return evaluate(AnswerLoss(model).to(accelerator.device), dataset, 8, accelerator)["loss"]


def answer(model: Any, tokenizer: Any, count: int | None = None) -> Answers:
    """Answers of `model` to the first `count` held-out records, or to all."""
    records = held_out()[:count]
    texts = generate(model, tokenizer, [prompt for prompt, _ in records], MAX_NEW_TOKENS, batch_size=len(records))
    return Answers(texts, sum(text.strip() == wanted for text, (_, wanted) in zip(texts, records, strict=True)))


def show_answers(console: Console, title: str, answers: Answers) -> None:
    table = Table("held-out prompt", "answer", "right", title=title, title_justify="left")
    for (prompt, expected), text in zip(held_out()[:SHOWN], answers.texts[:SHOWN], strict=True):
        right = text.strip() == expected
        table.add_row(prompt.split("\n")[-1], " ".join(text.split()), "[green]yes[/]" if right else "[red]no[/]")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--method", choices=METHODS, default="qlora")
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, help="peak learning rate; the default depends on the method")
    arguments = parser.parse_args()
    console = Console()

    started = clock = time.perf_counter()
    model, tokenizer = load_base(arguments.method)
    console.print(f"model loaded in {time.perf_counter() - clock:.0f} s")
    # The base model knows nothing of the format; a few of its answers, cut short, show that.
    before, loss_before = answer(model, tokenizer, SHOWN), held_out_loss(model, tokenizer)
    show_answers(console, "Before", before)
    del model

    clock = time.perf_counter()
    result = run_sft(
        SFTConfig(
            model="smollm2-135m",
            data=str(TRAIN),
            eval_data=str(EVAL),
            output_dir=str(arguments.output_dir),
            method=arguments.method,
            chat_template=str(TEMPLATE),
            dtype="float32",
            max_length=MAX_LENGTH,
            max_steps=arguments.max_steps,
            batch_size=arguments.batch_size,
            lr=arguments.lr or LEARNING_RATES.get(arguments.method),
            warmup_ratio=0.08,
            # One evaluation, at the end: with several, the best adapter would be picked on the held-out records.
            eval_steps=arguments.max_steps,
        )
    )
    seconds = time.perf_counter() - clock

    # A fresh base model and the files on disk: what answers is what was saved.
    model, tokenizer = load_base(arguments.method)
    load_adapter(model, arguments.output_dir)
    after = answer(model.eval(), tokenizer)
    show_answers(console, "After", after)

    table = Table("held-out records", "before", "after", title=f"Trained in {seconds:.0f} s", title_justify="left")
    table.add_row("loss per answer token", f"{loss_before:.3f}", f"{result.eval_loss:.3f}")
    table.add_row("exactly right", str(before), str(after))
    console.print(table)
    results = {
        "method": arguments.method,
        "train_seconds": round(seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "tokens": result.tokens,
        "before": {"loss": loss_before, "right": before.right, "answered": len(before.texts)},
        "after": {"loss": result.eval_loss, "right": after.right, "answered": len(after.texts)},
    }
    path = arguments.output_dir / "results.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"what was trained, metrics.jsonl, loss.png and results.json are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
