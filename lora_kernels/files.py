"""Writing files so that a killed process or a full disk leaves the old file or the new one, never half of one.

What goes wrong with a file names it, whichever library was at work.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong while `path` is written: an OSError that names it."""
    try:
        yield
    except OSError as error:
        # One without a number says something else than that a file can't be written.
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
    except Exception as error:
        # safetensors has a class of its own for a full disk, tokenizers none.
        if not isinstance(error, SafetensorError) and type(error) is not Exception:
            raise
        raise OSError(f"can't write {path}: {error}") from error


@contextmanager
def reading(path: str | os.PathLike[str], advice: str = "") -> Iterator[None]:
    """What goes wrong while `path` is read and taken apart: a ValueError that names it, with `advice`."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing{advice}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise ValueError(f"{path} is damaged ({reason}){advice}") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary file beside `path` to write to; it becomes `path` on success and is removed on an exception.

    Missing parent directories are made. The file's mode is what the umask asks for, whatever wrote it. Raises OSError
    naming `path` if it can't be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            temporary.touch()
            # safetensors makes files that only their owner may read.
            mode = temporary.stat().st_mode & 0o777
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, by way of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def append(path: Path, text: str) -> None:
    """Adds `text` to the end of the file, or nothing of it; OSError naming `path` if it can't."""
    with writing(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        data = text.encode()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException:
            file.truncate(size)
            raise


@contextmanager
def replacing_files(directory: Path, last: str) -> Iterator[Path]:
    """Yields a temporary directory to write to; on success its files move into `directory`, `last` at the end.

    Files in its folders move into folders of the same name. It is removed on an exception. Raises OSError naming
    `directory` if it can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
    try:
        with writing(directory):
            yield staged
            paths = [file.relative_to(staged) for file in staged.rglob("*") if file.is_file()]
            for path in sorted(paths, key=lambda path: str(path) == last):
                # safetensors writes files that only their owner may read, whatever the umask.
                (staged / path).chmod(directory.stat().st_mode & 0o666)
                (directory / path).parent.mkdir(exist_ok=True, parents=True)
                os.replace(staged / path, directory / path)
    finally:
        shutil.rmtree(staged)


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`, renamed to `target` on success and removed on an exception.

    Raises ValueError when `target` exists and is not an empty directory, OSError naming it if it can't be written.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output directory {target} exists and is not empty; choose another or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    # mkdtemp gives mode 0700; a directory that mkdir makes inside it has the mode the user's umask asks for.
    outer = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with writing(target):
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


def cache_dir() -> Path:
    """`$LORA_KERNELS_CACHE`, else `lora-kernels` in the platform's cache directory. Not created here."""
    if path := os.environ.get("LORA_KERNELS_CACHE"):
        return Path(path).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lora-kernels"
