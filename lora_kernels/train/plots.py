"""Plots of a training run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kernels.files import replacing
from lora_kernels.train.metrics import read_metrics

if TYPE_CHECKING:
    import numpy as np

# Okabe and Ito's colours: told apart with any kind of colour vision.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average s_t = weight · s_(t-1) + (1 - weight) · v_t from s = 0, divided by 1 - weight^t.

    The division makes the first values unbiased (Kingma and Ba 2015, section 3).
    """
    if not 0 <= weight < 1:
        raise ValueError(f"weight is {weight}; it must be in [0, 1)")
    smoothed, average = [], 0.0
    for step, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**step))
    return smoothed


def plot_loss(
    metrics: str | Path,
    output: str | Path,
    title: str = "Training loss",
    smoothing: float | None = None,
    unit: str = "nats per target token",
) -> Path:
    """Draw `loss` (raw and smoothed) and `eval_loss` of a metrics.jsonl over `step` as a PNG; returns its path.

    `smoothing` is the weight in `smooth`, the same as TensorBoard's slider; None averages over about a twentieth of the
    run. Raises FileNotFoundError for a missing file and ValueError for one without a loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(metrics)
    train = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    evaluation = [(record["step"], record["eval_loss"]) for record in records if record.get("eval_loss") is not None]
    if not train and not evaluation:
        raise ValueError(f"{metrics} has no record with a loss or an eval_loss")

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = (list(column) for column in zip(*train, strict=True))
        marker = "." if len(steps) == 1 else ""
        axes.plot(steps, losses, color=_BLUE, alpha=0.3, linewidth=1, label="train", marker=marker)
        if smoothing is None:
            smoothing = min(0.98, max(0.0, 1 - 20 / len(losses)))
        if len(steps) > 1:
            axes.plot(steps, smooth(losses, smoothing), color=_BLUE, linewidth=2, label="train, smoothed")
    if evaluation:
        steps, losses = (list(column) for column in zip(*evaluation, strict=True))
        axes.plot(steps, losses, color=_ORANGE, marker="o", markersize=5, linewidth=1, linestyle="--", label="eval")
        axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(4, 6), textcoords="offset points",
                      color=_ORANGE, fontsize=9)  # fmt: skip
    axes.set(title=title, xlabel="optimizer step", ylabel=f"loss ({unit})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(color=_GREY, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)

    with replacing(output) as temporary:
        figure.savefig(temporary, format="png")
    return Path(output)


def plot_ranks(ranks: Mapping[str, int], output: str | Path, title: str = "Rank of each matrix") -> Path:
    """Draw {module path: rank} as a map of layers (rows) by modules (columns), as a PNG; returns its path.

    The first number in a path is its layer; paths without one share a row. Raises ValueError for no ranks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not ranks:
        raise ValueError("ranks is empty; expected {module path: rank}")
    cells = {}
    for path, rank in ranks.items():
        match = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", path)
        cells[(int(match[1]), match[2]) if match else (-1, path)] = rank
    rows = sorted({row for row, _ in cells})
    columns = list(dict.fromkeys(column for _, column in cells))
    grid = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]

    size = (2.0 + 0.75 * len(columns), 1.8 + 0.28 * len(rows))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    most: float = max(1, *ranks.values())
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=most, aspect="auto")
    for y, values in enumerate(grid):
        for x, value in enumerate(values):
            if value == value:  # not NaN: the layer has this module
                color = "black" if value > 0.6 * most else "white"
                axes.text(x, y, str(value), ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), ["-" if row < 0 else str(row) for row in rows], fontsize=8)
    mean = sum(ranks.values()) / len(ranks)
    axes.set(title=f"{title} (mean {mean:.2f})", ylabel="layer")
    figure.colorbar(image, ax=axes, label="rank")

    with replacing(output) as temporary:
        figure.savefig(temporary, format="png")
    return Path(output)


def plot_comparison(rows: Sequence[Mapping[str, Any]], output: str | Path) -> Path:
    """Draw the rows of `lora_kernels.train.compare.compare` as a PNG, a panel of bars for each measure; its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "held-out loss": lambda row: row["eval_loss"],
        "exactly right, %": lambda row: 100 * row["exact_match"] / row["answered"],
        "tokens/s": lambda row: row.get("tokens_per_second", 0),
        "peak memory, GiB": lambda row: row.get("peak_bytes", 0) / 2**30,
    }
    figure = Figure(figsize=(12, 1.2 + 0.35 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    names = [row["name"] for row in rows]
    for axes, (title, value) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        bars = axes.barh(names, [value(row) for row in rows], color=_BLUE)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()

    with replacing(output) as temporary:
        figure.savefig(temporary, format="png")
    return Path(output)


_PPO_PANELS = (
    ("score", ("objective/scores", "objective/rlhf_reward", "eval_score")),
    ("KL to the reference, per answer", ("objective/kl",)),
    ("KL coefficient", ("objective/kl_coef",)),
    ("entropy (nats per token)", ("objective/entropy",)),
    ("tokens per answer", ("val/response_length", "eval_response_length")),
    ("answers that ended", ("val/num_eos_tokens",)),
    ("policy loss", ("loss/policy",)),
    ("value loss", ("loss/value",)),
    ("explained variance", ("val/explained_variance",)),
    ("KL to the policy that sampled", ("policy/approxkl",)),
    ("clipped share", ("policy/clipfrac", "val/clipfrac")),
    ("seconds", ("seconds/rollout", "seconds/score", "seconds/update")),
)


def plot_ppo(metrics: str | Path, output: str | Path) -> Path:
    """Draw the metrics of a PPO run over its steps, a panel for each kind, as a PNG; returns its path.

    A band around the score is one standard deviation over the answers of a rollout. Raises FileNotFoundError for a
    missing file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(metrics)
    figure = Figure(figsize=(14, 12), dpi=100)
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(4, 3).flat, _PPO_PANELS, strict=True):
        for name, color in zip(names, (_BLUE, _ORANGE, _GREEN), strict=False):
            points = [(record["step"], record[name]) for record in records if name in record]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            marker = "o" if name.startswith("eval") or len(steps) == 1 else ""
            axes.plot(steps, values, color=color, marker=marker, markersize=4, label=name)
            if name == "objective/scores":
                spread = [record["objective/scores_std"] for record in records if name in record]
                bounds = ([value + sign * std for value, std in zip(values, spread, strict=True)] for sign in (-1, 1))
                axes.fill_between(steps, *bounds, color=color, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=_GREY, alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7)
    figure.supxlabel("step (one rollout)", y=0.02)
    # Not a constrained layout, which draws everything twice.
    figure.subplots_adjust(left=0.06, right=0.98, top=0.96, bottom=0.06, hspace=0.3, wspace=0.2)
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png")
    return Path(output)


def plot_rewards(
    chosen: np.ndarray,
    rejected: np.ndarray,
    calibration: Sequence[tuple[float, float, int]],
    output: str | Path,
    title: str = "Rewards",
) -> Path:
    """Draw histograms of the rewards of chosen and rejected answers, and how often the answer with the higher reward
    was the chosen one over how often the model says so, as a PNG; returns its path.

    calibration: (predicted probability, share that was right, pairs), as `Evaluation.calibration` in
    `lora_kernels.train.reward` gives it. Raises ValueError for no rewards.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len(chosen) == 0 or len(chosen) != len(rejected):
        raise ValueError(f"chosen and rejected must be as many and at least 1, got {len(chosen)} and {len(rejected)}")
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    histogram, reliability = figure.subplots(1, 2)
    low, high = (edge(edge(chosen), edge(rejected)) for edge in (min, max))
    span = (low, high) if high > low else (low - 0.5, low + 0.5)
    for values, name, color in ((chosen, "chosen", _BLUE), (rejected, "rejected", _ORANGE)):
        histogram.hist(values, bins=30, range=span, color=color, alpha=0.5, label=name)
        histogram.axvline(sum(values) / len(values), color=color, linestyle="--", linewidth=1)
    wins = sum(one > other for one, other in zip(chosen, rejected, strict=True))
    histogram.set(title=f"{title}: accuracy {wins / len(chosen):.3f} on {len(chosen)} pairs", xlabel="reward",
                  ylabel="answers")  # fmt: skip
    histogram.legend(frameon=False)

    predicted, right, counts = (list(column) for column in zip(*calibration, strict=True))
    reliability.plot([0.5, 1], [0.5, 1], color=_GREY, linewidth=1, linestyle=":", label="calibrated")
    reliability.plot(predicted, right, color=_BLUE, marker="o", markersize=5, linewidth=1, label="reward model")
    for x, y, count in zip(predicted, right, counts, strict=True):
        reliability.annotate(str(count), (x, y), xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center")
    reliability.set(title="Calibration (numbers: pairs)", xlabel="predicted probability of the preferred answer",
                    ylabel="share that was chosen", xlim=(0.48, 1.02), ylim=(-0.03, 1.08))  # fmt: skip
    reliability.legend(frameon=False, loc="lower right")
    for axes in (histogram, reliability):
        axes.grid(color=_GREY, alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)

    with replacing(output) as temporary:
        figure.savefig(temporary, format="png")
    return Path(output)
