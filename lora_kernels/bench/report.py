"""What a benchmark leaves: JSON, CSV, a Markdown table, a plot; and the comparison with an earlier one."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kernels.bench.cases import name_of
from lora_kernels.files import replacing

Row = Mapping[str, Any]
# Columns of a contender, in the order of the tables: (field, title, how a number is written).
COLUMNS = (
    ("median_ms", "median, ms", "{:.4g}"),
    ("quartiles", "quartiles, ms", "{}"),
    ("ratio", "over {base}", "{:.3g}"),
    ("gflop_per_s", "GFLOP/s", "{:.3g}"),
    ("gb_per_s", "GB/s", "{:.3g}"),
    ("percent_of_floor", "% of the floor", "{:.3g}"),
    ("tokens_per_s", "tokens/s", "{:.3g}"),
    ("peak_mib", "peak of the process, MiB", "{:.0f}"),
    ("above_mib", "of these by the step", "{:.0f}"),
    ("MK", "passes over M×K", "{}"),
    ("MN", "over M×N", "{}"),
    ("remark", "", "{}"),
)
# A ratio that grew by more than this is reported; medians of one machine differ by a few percent from run to run.
TOLERANCE = 0.15


def _name(row: Row) -> str:
    return name_of(row["work"], row["what"])


def markdown(rows: Sequence[Row]) -> str:
    """A table for each kind of work, a line for each contender, and who was skipped why."""
    lines: list[str] = []
    for work in dict.fromkeys(row["work"] for row in rows):
        group = [row for row in rows if row["work"] == work]
        fields = {field for row in group for values in row["contenders"].values() for field in values}
        if "low_ms" in fields:
            fields.add("quartiles")
        columns = [column for column in COLUMNS if column[0] in fields]
        keys = list(dict.fromkeys(key for row in group for key in row["what"]))
        titles = [*keys, "who", *(title.format(base=group[0].get("base")) for _, title, _ in columns)]
        lines += [f"## {work}", "", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for row in group:
            shared = [str(row["what"].get(key, "")) for key in keys]
            for contender, values in row["contenders"].items():
                values = dict(values)
                if "low_ms" in values:
                    values["quartiles"] = f"{values['low_ms']:.4g} - {values['high_ms']:.4g}"
                cells = [form.format(values[field]) if field in values else "" for field, _, form in columns]
                lines.append("| " + " | ".join([*shared, contender, *cells]) + " |")
        reasons = dict.fromkeys(
            f"{title}: {who}: {why}."
            for title in ("Skipped", "Failed")
            for row in group
            for who, why in row.get(title.lower(), {}).items()
        )
        lines += ["", *reasons, ""] if reasons else [""]
    return "\n".join(lines)


def write(rows: Sequence[Row], directory: Path, heading: str) -> None:
    """results.csv, .md and .png in the directory, and growth.png; the JSON is written as the run goes on."""
    fields = list(dict.fromkeys(key for row in rows for values in row["contenders"].values() for key in values))
    fields = [field for field in fields if field != "launches"]
    keys = list(dict.fromkeys(key for row in rows for key in row["what"]))
    with replacing(directory / "results.csv") as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["work", *keys, "contender", *fields])
        for row in rows:
            shared = [row["work"], *(row["what"].get(key, "") for key in keys)]
            for contender, values in row["contenders"].items():
                table.writerow([*shared, contender, *(values.get(field, "") for field in fields)])
    with replacing(directory / "results.md") as temporary:
        temporary.write_text(f"{heading}\n\n{markdown(rows)}", encoding="utf-8")
    _plot(rows, directory / "results.png")
    _plot_growth(rows, directory / "growth.png")


def _plot(rows: Sequence[Row], path: Path) -> None:
    """A panel for each kind of work: the contenders' times over the base, case by case."""
    timed = _timed(rows)
    works = list(dict.fromkeys(row["work"] for row in timed))
    if not works:
        return
    figure = _figure(10, 3.2 * len(works))
    for axes, work in zip(figure.subplots(len(works), 1, squeeze=False)[:, 0], works, strict=True):
        group = [row for row in timed if row["work"] == work]
        names = list(dict.fromkeys(name for row in group for name in row["contenders"]))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            ratios = [row["contenders"].get(name, {}).get("ratio", 0.0) for row in group]
            left = [place + (number - (len(names) - 1) / 2) * width for place in range(len(group))]
            axes.bar(left, ratios, width, label=name)
        # What all cases of a group share would only crowd the labels.
        varying = [key for key in group[0]["what"] if len({str(row["what"].get(key)) for row in group}) > 1]
        labels = ["\n".join(f"{key} {row['what'].get(key)}" for key in varying) for row in group]
        axes.set_xticks(range(len(group)), labels, fontsize=6)
        axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
        axes.set(title=work, ylabel=f"time over {group[0]['base']}")
        _finish(axes)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


# Sizes of which the cost may be a straight line.
_SIZES = ("M", "R", "layers", "length")


def _plot_growth(rows: Sequence[Row], path: Path) -> None:
    """Times as one size grows and all others stay: a panel wherever there are three or more values of it."""
    series: dict[tuple[str, str], list[Row]] = {}
    for row in _timed(rows):
        for size in _SIZES:
            if size in row["what"]:
                fixed = {key: value for key, value in row["what"].items() if key != size}
                series.setdefault((size, name_of(row["work"], fixed)), []).append(row)
    panels = {
        key: sorted(group, key=lambda row: row["what"][key[0]]) for key, group in series.items() if len(group) > 2
    }
    if not panels:
        return
    figure = _figure(10, 3.2 * ((len(panels) + 1) // 2))
    grid = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flat
    for axes, ((size, title), group) in zip(grid, panels.items(), strict=False):
        for name in dict.fromkeys(name for row in group for name in row["contenders"]):
            found = [(row["what"][size], row["contenders"][name]) for row in group if name in row["contenders"]]
            axes.plot(*zip(*((x, values["median_ms"]) for x, values in found), strict=True), marker="o", label=name)
        if group[0]["floor_ms"]:
            axes.plot(*zip(*((row["what"][size], row["floor_ms"]) for row in group), strict=True), "k--", label="floor")
        axes.set(xlabel=size, ylabel="ms", xscale="log", yscale="log")
        axes.set_title(title, fontsize=7)
        _finish(axes)
    for axes in list(grid):
        axes.remove()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if any("median_ms" in values for values in row["contenders"].values())]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a results.json. Raises ValueError for a file that is none."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        for row in rows:
            row["work"], row["what"], row["contenders"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result of `lora-kernels bench`") from error
    return rows


def regressions(rows: Sequence[Row], earlier: Sequence[Row]) -> list[str]:
    """What became slower since earlier rows: a line for each contender whose ratio to its base grew by more than
    TOLERANCE, or whose step takes so much more memory. Raises ValueError where no case is in both.
    """
    before = {_name(row): row["contenders"] for row in earlier}
    found, common = [], 0
    for row in rows:
        for contender, values in row["contenders"].items():
            old = before.get(_name(row), {}).get(contender)
            if old is None:
                continue
            common += 1
            for field, title in (("ratio", "time over " + row.get("base", "")), ("above_mib", "MiB of a step")):
                if field in old and field in values and values[field] > old[field] * (1 + TOLERANCE):
                    change = f"{title} {old[field]:.3g} -> {values[field]:.3g}"
                    found.append(f"{_name(row)}, {contender}: {change}")
    if not common:
        raise ValueError("the earlier results have none of the cases of this run")
    return found
