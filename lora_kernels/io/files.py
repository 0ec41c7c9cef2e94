"""Writing files so that a killed process leaves the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary file beside `path` to write to; it becomes `path` on success and is removed on an exception.

    Missing parent directories are made. The file's mode is what the umask asks for, whatever wrote it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        # safetensors makes files that only their owner may read.
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, by way of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`, renamed to `target` on success and removed on an exception.

    Raises ValueError when `target` exists and is not an empty directory.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output directory {target} exists and is not empty; choose another or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    # mkdtemp gives mode 0700; a directory that mkdir makes inside it has the mode the user's umask asks for.
    outer = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        staged = outer / target.name
        staged.mkdir()
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                # safetensors writes files that only their owner may read, whatever the umask.
                file.chmod(staged.stat().st_mode & 0o666)
        if target.is_dir():
            target.rmdir()
        os.replace(staged, target)
    finally:
        shutil.rmtree(outer, ignore_errors=True)
