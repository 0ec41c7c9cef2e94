"""The same data and steps with several methods: what each costs, and what it reaches.

Each run has a process of its own, so that its peak memory is its own; a run that has ended is not repeated.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kernels.files import reading, replacing, write_json
from lora_kernels.methods.registry import METHODS
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.stopping import ended_by_signals, handling

BASE = "base model"
RESULT, TABLE = "result.json", "comparison"
_PROMPTS, _NEW_TOKENS = 64, 64
_OF_BASE = ("model", "dtype", "data", "eval_data", "chat_template", "date", "max_length", "batch_size", "backend")


def plan(settings: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any] | None]) -> dict[str, SFTConfig]:
    """{name: SFTConfig} of the runs.

    settings: fields of SFTConfig that all runs share; `output_dir` gets a directory for each run. methods: {name: the
    fields that this run has for itself, or None}, where `method` is the name if it is not among them.

    Raises ValueError for a bad setting, naming the run, and where settings has no eval_data.
    """
    if settings.get("eval_data") is None:
        raise ValueError("eval_data is missing: methods are compared by their loss and answers on held-out records")
    if "method" in settings:
        raise ValueError(f"method is {settings['method']!r} for all runs; each has its own, in methods")
    shared = {name: value for name, value in settings.items() if name != "output_dir"}
    output_dir = Path(settings.get("output_dir") or "outputs/compare")
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(f"methods is {methods!r}; expected {{name: settings}}")
    runs: dict[str, SFTConfig] = {}
    for name, own in methods.items():
        directory = "".join(char if char.isalnum() or char in "-_." else "-" for char in str(name))
        if name == BASE or directory in {Path(run.output_dir).name for run in runs.values()}:
            raise ValueError(f"methods: {name!r} is taken; allowed: names that differ, and another than {BASE!r}")
        values = {"method": name, **shared, **(own or {}), "output_dir": str(output_dir / directory)}
        method = METHODS.get(values["method"])
        if method is not None and not method.has_lora_b and "optimizer" not in (own or {}):
            # What all share, LoRA+, is for those that it is made for.
            values.pop("optimizer", None)
        try:
            runs[name] = SFTConfig.from_dict(values, source=f"methods: {name}")
        except ValueError as error:
            raise ValueError(f"methods: {name}: {error}") from None
    return runs


def compare(
    runs: Mapping[str, SFTConfig],
    output_dir: str | os.PathLike,
    prompts: int = _PROMPTS,
    max_new_tokens: int = _NEW_TOKENS,
) -> list[dict[str, Any]]:
    """Train and measure each of `runs`, and write comparison.md, .json and .png to output_dir; returns the rows.

    prompts: held-out records whose answers are generated (greedily, at most max_new_tokens) and compared exactly.

    A row has: `trainable` (parameters, at the end of training), `trainable_percent`, `file_bytes` (what save_adapter
    wrote), `tokens_per_second` (median over the steps), `peak_bytes` (of the process until training ended: resident
    memory on a CPU, torch's allocations on a GPU), `eval_loss`, `exact_match`, `answered`, `merges` (None where there
    is nothing to merge), `extra_tokens` (positions of the context that each request pays for). The first row is the
    base model, untrained.

    Runs whose result.json is there already are not repeated; ValueError where that was made by other settings.
    """
    output_dir = Path(output_dir)
    first = next(iter(runs.values()))
    # Of the base model's row only what it depends on, so that it serves whatever methods are compared.
    base = {name: value for name, value in first.to_dict().items() if name in _OF_BASE}
    jobs = {BASE: {"config": {**base, "method": "lora", "output_dir": str(output_dir / "base")}, "base": True}}
    for name, run in runs.items():
        # A run goes on where it was interrupted, whatever was said of that.
        jobs[name] = {"config": {**run.to_dict(), "resume": True}, "base": False}
    rows = []
    for name, job in jobs.items():
        job |= {"prompts": prompts, "max_new_tokens": max_new_tokens}
        if not _result(job).is_file():
            _run_in_process(name, job)
        rows.append({"name": name, **_read(job)})
    write_json(output_dir / f"{TABLE}.json", rows)
    with replacing(output_dir / f"{TABLE}.md") as path:
        path.write_text(markdown(rows), encoding="utf-8")
    from lora_kernels.train.plots import plot_comparison

    plot_comparison(rows, output_dir / f"{TABLE}.png")
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `compare` as a Markdown table."""
    lines = [
        "| method | trainable | % | file, MB | tokens/s | peak memory, GiB | held-out loss | exactly right | merges "
        "| extra tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"]]
        if row["trainable"]:
            cells += [f"{row['trainable']:,}", f"{row['trainable_percent']:.3g}", f"{row['file_bytes'] / 1e6:.3g}"]
            cells += [f"{row['tokens_per_second']:.0f}", f"{row['peak_bytes'] / 2**30:.2f}"]
        else:
            cells += ["-"] * 5
        cells += [f"{row['eval_loss']:.3f}", f"{row['exact_match']} of {row['answered']}"]
        cells += [{None: "-", True: "yes", False: "no"}[row["merges"]], str(row["extra_tokens"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _result(job: Mapping[str, Any]) -> Path:
    return Path(job["config"]["output_dir"]) / RESULT


def _read(job: Mapping[str, Any]) -> dict[str, Any]:
    path = _result(job)
    with reading(path):
        result = json.loads(path.read_text(encoding="utf-8"))
        made_by, row = result["job"], result["row"]
    if made_by != job:
        raise ValueError(f"{path} was made by other settings; remove its directory, or choose another output_dir")
    return row


def _run_in_process(name: str, job: Mapping[str, Any]) -> None:
    print(f"{name}:", flush=True)
    process = subprocess.Popen([sys.executable, "-m", __name__, json.dumps(job)])
    signals = []

    def pass_on(number: int, _: Any) -> None:
        # It is for the run, which saves what it has.
        signals.append(number)
        process.send_signal(number)

    with handling(pass_on):
        process.wait()
    if signals:
        # Whatever the run made of it: it may have come before the run could handle it, or after its end.
        raise SystemExit(128 + signals[0])
    if process.returncode > 128:
        raise SystemExit(process.returncode)
    if process.returncode != 0:
        raise ValueError(f"methods: {name}: the run failed (exit code {process.returncode}); its message is above")


def _measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a process of its own does: train, then load what was saved and let it answer."""
    from lora_kernels.data.chat import set_chat_template
    from lora_kernels.data.dataset import load_dataset
    from lora_kernels.io.adapters import load_adapter
    from lora_kernels.io.models import load_model
    from lora_kernels.io.whole_model import is_model_directory
    from lora_kernels.methods import merge, trainable_summary
    from lora_kernels.train.causal_lm import AnswerLoss
    from lora_kernels.train.launch import make_accelerator
    from lora_kernels.train.loop import evaluate
    from lora_kernels.train.metrics import METRICS, read_metrics
    from lora_kernels.train.sft import run_sft

    config = SFTConfig(**job["config"])
    directory = Path(config.output_dir)
    row: dict[str, Any] = {"trainable": 0, "merges": None, "extra_tokens": 0}
    if not job["base"]:
        result = run_sft(config)
        peak = _peak_bytes()
        rates = [r["tokens_per_second"] for r in read_metrics(directory / METRICS) if "tokens_per_second" in r]
        files = [*directory.glob("adapter_model.safetensors"), *directory.glob("model*.safetensors")]
        row["trainable"] = result.trainable_parameters
        row["file_bytes"] = sum(file.stat().st_size for file in files)
        row["tokens_per_second"], row["peak_bytes"] = statistics.median(rates), peak

    quantize = None if job["base"] else METHODS[config.method].quantize
    source = str(directory) if is_model_directory(directory) else config.model
    model, tokenizer = load_model(source, config.dtype, quantize, config.double_quant)
    total = trainable_summary(model).total
    set_chat_template(tokenizer, config.chat_template)
    if not job["base"] and source == config.model:
        load_adapter(model, directory)
        row["extra_tokens"] = getattr(getattr(model, "virtual_tokens", None), "num_virtual_tokens", 0)
    model.eval()
    accelerator = make_accelerator()
    date = datetime.date.fromisoformat(config.date) if config.date else None
    eval_set = load_dataset(job["config"]["eval_data"], tokenizer, config.max_length, date=date)
    row["eval_loss"] = evaluate(AnswerLoss(model).to(accelerator.device), eval_set, config.batch_size, accelerator)[
        "loss"
    ]
    row["exact_match"], row["answered"] = _exact_matches(model, tokenizer, job)
    if row["trainable"]:
        row["trainable_percent"] = 100 * row["trainable"] / total
    if hasattr(model, "adapter_config"):
        try:
            merge(model)
            row["merges"] = True
        except ValueError:
            row["merges"] = False
    return row


def _exact_matches(model: Any, tokenizer: Any, job: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the first records' last answers the model gives exactly, and how many it was asked for."""
    from lora_kernels.data.messages import to_conversation
    from lora_kernels.data.records import load_records
    from lora_kernels.models.generate import generate

    records = load_records(job["config"]["eval_data"])
    conversations = [to_conversation(*found) for found in itertools.islice(records, job["prompts"])]
    asked = [conversation.messages[:-1] for conversation in conversations]
    wanted = [conversation.messages[-1]["content"].strip() for conversation in conversations]
    answers = generate(model, tokenizer, asked, job["max_new_tokens"], batch_size=job["config"]["batch_size"])
    return sum(answer.strip() == right for answer, right in zip(answers, wanted, strict=True)), len(wanted)


def _peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a process begins with its parent's.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    try:
        with ended_by_signals(job["config"]["output_dir"]):
            row = _measure(job)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    write_json(_result(job), {"job": job, "row": row})
