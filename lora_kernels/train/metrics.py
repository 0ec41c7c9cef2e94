"""metrics.jsonl, which holds a record for each step that is logged, and where else these records go."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_kernels.files import reading, replacing

METRICS = "metrics.jsonl"
Callback = Callable[[dict[str, Any]], None]


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Records of a metrics.jsonl, one JSON object a line.

    A last line without its newline is left out, since that is what a run killed while writing leaves. Raises ValueError
    that names file and line for any other line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"metrics file {path} does not exist")
    text = path.read_text(encoding="utf-8")
    records = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        records.append(record)
    return records


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again, and a last line that a kill cut short.

    Raises ValueError naming file and line for another one that is not a record.
    """
    if not path.exists():
        return
    kept = []
    with reading(path):
        # Not splitlines(): that also splits at U+2028 and its like, which samples may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            with reading(f"{path}, line {number},", "; mend it or take it out"):
                later = json.loads(line)["step"] > step
        except ValueError:
            if number < len(lines):
                raise
            break
        if later:
            break
        kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def summary_writer() -> type:
    """TensorBoard's class; ValueError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"tensorboard is set, but the package tensorboard can't be imported: {error}") from error
    return SummaryWriter


class TensorBoard:
    """A callback that repeats every number of a record to TensorBoard.

    first_step: what an earlier run has written of this step and of later ones is hidden.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self.writer = summary_writer()(os.fspath(directory / "tensorboard"), purge_step=first_step)

    def __call__(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.writer.close()
