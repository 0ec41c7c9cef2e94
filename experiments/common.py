"""What the experiments share: SmolLM2-135M on the demo's records, runs that are kept as they finish, and plots."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from lora_kernels.data.dataset import TokenDataset, load_dataset, set_chat_template
from lora_kernels.files import replacing, write_json
from lora_kernels.io.models import load_model
from lora_kernels.methods import inject, trainable_summary
from lora_kernels.train.causal_lm import AnswerLoss
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.launch import make_accelerator
from lora_kernels.train.loop import evaluate
from lora_kernels.train.sft import train_sft

HERE = Path(__file__).parent
EXAMPLES, RESULTS = HERE.parent / "examples", HERE / "results"
STEPS, BATCH_SIZE, MAX_LENGTH, EVAL_STEPS = 30, 4, 128, 15


@functools.cache
def _base(quantize: str | None, double_quant: bool) -> tuple[nn.Module, Any]:
    model, tokenizer = load_model("smollm2-135m", "float32", quantize=quantize, double_quant=double_quant)
    set_chat_template(tokenizer, str(EXAMPLES / "demo_template.jinja"))
    return model, tokenizer


@functools.cache
def dataset(name: str) -> TokenDataset:
    """demo_train or demo_eval."""
    return load_dataset(EXAMPLES / f"{name}.jsonl", _base(None, False)[1], MAX_LENGTH)


def adapted(method: Any, seed: int, quantize: str | None = None, double_quant: bool = False) -> nn.Module:
    """A copy of SmolLM2 with the adapters of `method`, their initial values a function of the seed."""
    model, tokenizer = _base(quantize, double_quant)
    set_seed(seed)
    return inject(copy.deepcopy(model), method, tokenizer)


class Experiment:
    """Runs by key, each kept in results/<name>.json when it ends: an experiment that was killed goes on from there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = RESULTS / f"{name}.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def keep(self, key: str, result: dict[str, Any]) -> dict[str, Any]:
        self.results[key] = result
        write_json(self.path, self.results)
        return result

    def run(
        self,
        key: str,
        method: Any,
        lr: float,
        seed: int = 0,
        quantize: str | None = None,
        double_quant: bool = False,
        steps: int = STEPS,
        **settings: Any,
    ) -> dict[str, Any]:
        """Train `method` for `steps` of BATCH_SIZE records; {"lr", "seed", "trainable", "loss", "eval"}.

        loss: mean per answer token of each step; eval: [step, held-out loss] from before the first step on.
        """
        if key in self.results:
            return self.results[key]
        model = adapted(method, seed, quantize, double_quant)
        accelerator = make_accelerator()
        start = evaluate(AnswerLoss(model), dataset("demo_eval"), BATCH_SIZE, accelerator)["loss"]
        loss, evaluations = [], [[0, start]]

        def record(values: Mapping[str, Any]) -> None:
            if "loss" in values:
                loss.append(values["loss"])
            if "eval_loss" in values:
                evaluations.append([values["step"], values["eval_loss"]])

        trainable = trainable_summary(model).trainable
        with tempfile.TemporaryDirectory() as directory:
            config = SFTConfig(
                model="smollm2-135m",
                data=str(EXAMPLES / "demo_train.jsonl"),
                output_dir=directory,
                dtype="float32",
                max_steps=steps,
                batch_size=BATCH_SIZE,
                max_length=MAX_LENGTH,
                eval_steps=EVAL_STEPS,
                save_steps=steps,
                lr=lr,
                warmup_ratio=0.1,
                seed=seed,
                **settings,
            )
            data = dataset("demo_train"), dataset("demo_eval")
            train_sft(model, *data, config, callbacks=[record], accelerator=accelerator, progress=False)
        result = {"lr": lr, "seed": seed, "trainable": trainable, "loss": loss, "eval": evaluations}
        print(f"{self.name}: {key}: {start:.3f} -> {evaluations[-1][1]:.3f}", flush=True)
        return self.keep(key, result)

    def final(self, key: str) -> float:
        """The held-out loss at the end."""
        return self.results[key]["eval"][-1][1]

    def table(self, keys: Iterable[str] | None = None) -> None:
        """Print a Markdown table of the runs."""
        print("| run | lr | trainable | held-out loss at the start | at the end |\n|---|---|---|---|---|")
        for key in keys or self.results:
            run = self.results[key]
            if "eval" in run:
                start, end = run["eval"][0][1], run["eval"][-1][1]
                print(f"| {key} | {run['lr']:g} | {run['trainable']:,} | {start:.3f} | {end:.3f} |")

    def plot(self, draw: Any, title: str, **labels: str) -> None:
        """results/<name>.png: `draw(axes)` on one pair of axes."""
        figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set(title=title, **labels)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        with replacing(self.path.with_suffix(".png")) as temporary:
            figure.savefig(temporary, format="png")


def gradient_norms(model: nn.Module) -> tuple[float, float]:
    """(‖dlora_a‖, ‖dlora_b‖) over all layers, of the mean loss of the first BATCH_SIZE training records."""
    rows = range(BATCH_SIZE)
    data = dataset("demo_train")
    loss = AnswerLoss(model.train())(**data.batch(rows))["loss"] / int(data.loss_counts[rows].sum())
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [parameter for _, parameter in named])
    square = {"lora_a": 0.0, "lora_b": 0.0}
    for (name, _), grad in zip(named, grads, strict=True):
        square[name.rpartition(".")[2]] += grad.square().sum().item()
    return square["lora_a"] ** 0.5, square["lora_b"] ** 0.5
