"""Reading data files: from a file's name to records and their places."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def load_records(path: str | os.PathLike, problems: list[str] | None = None) -> Iterator[tuple[Any, str]]:
    """Yield (record, place) from a .json list, a .jsonl file (either may be .gz), or a .parquet file.

    problems: gets what is wrong with a text that is not JSON, in place of an exception; of lines, the rest is read.
    Raises FileNotFoundError, and ValueError with file and line for text that is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: file names must end in one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for index, record in enumerate(pyarrow.parquet.read_table(path).to_pylist()):
            yield record, f"{path}: record {index}"
        return
    text = read_text(path)
    # Files named .json hold one record a line often enough.
    if text.lstrip()[:1] != "[":
        yield from _json_lines(text, path, problems)
        return
    try:
        yield from _json_list(text, path)
    except ValueError as error:
        if problems is None:
            raise
        problems.append(str(error))


def read_text(path: Path) -> str:
    """A file's text, which may be .gz and start with a byte order mark. Raises ValueError with file and line."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: can't be read: {error}") from None


def _json_lines(text: str, path: Path, problems: list[str] | None) -> Iterator[tuple[Any, str]]:
    # Not splitlines(): that also splits at U+2028 and its like, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{path}:{number}: not JSON: {error.msg} at column {error.colno}"
            if problems is None:
                raise ValueError(problem) from None
            problems.append(problem)
        else:
            yield record, f"{path}:{number}"


def _json_list(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    """Decode record by record, so that each knows its line."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    position, counted, line, index = space.match(text).end() + 1, 0, 1, 0
    while True:
        position = space.match(text, position).end()
        line += text.count("\n", counted, position)
        counted = position
        if index == 0 and text[position : position + 1] == "]":
            break
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: record {index}: not JSON: {error.msg}") from None
        yield record, f"{path}:{line}: record {index}"
        position = space.match(text, position).end()
        separator = text[position : position + 1]
        if separator == "]":
            break
        if separator != ",":
            line += text.count("\n", counted, position)
            found = repr(separator) if separator else "the end"
            raise ValueError(f"{path}:{line}: expected ',' or ']' after record {index}, got {found}")
        position, index = position + 1, index + 1
    rest = space.match(text, position + 1).end()
    if rest != len(text):
        raise ValueError(f"{path}:{text.count(chr(10), 0, rest) + 1}: text after the end of the list")
