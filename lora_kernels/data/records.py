"""Reading data files: from what a user names to records, one at a time, and their places.

A source is a file; a directory, which means every data file below it; a pattern such as "data/*.jsonl"; several of
these with commas between; or a list of them. Memory is that of a few records, however large a file is.

A JSON file, be it .json or .jsonl, holds a record a line, a list of records, {"data": [records]}, or records over
several lines, one after the other.
"""

import codecs
import glob
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
TEXT_SUFFIXES = (".txt", ".txt.gz")
PROMPT_SUFFIXES = SUFFIXES + TEXT_SUFFIXES

Source = str | os.PathLike | Sequence[str | os.PathLike]
Record = tuple[Any, str]  # and its place

_CHUNK = 1 << 16
_PARQUET_ROWS = 256
# Where JSON was cut, the decoder reports its last token: a string, or one that is shorter than this.
_LONGEST_TOKEN = 16
_VISIBLE = re.compile(r"[^ \t\r\n]")
# An object with its records in "data", up to the list. Before it there may be texts, numbers and flat objects.
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_MEMBER = rf"{_STRING}\s*:\s*(?:{_STRING}|\{{[^{{}}\[\]]*\}}|[^\s\"{{}}\[\],]+)\s*,\s*"
_WRAPPER = re.compile(rf'\{{\s*(?:{_MEMBER})*"data"\s*:\s*(?=\[\s*[{{\]])')


def load_records(
    source: Source, problems: list[str] | None = None, suffixes: tuple[str, ...] = SUFFIXES
) -> Iterator[Record]:
    """Yield (record, place) from the files of a source, in the order of `find_files`. The place is "file:line", with
    the record's index where the file is not a record a line; of .parquet files it is the index alone.

    problems: gets what is wrong with a file, in place of an exception. Of files with a record a line the other lines
    are read, of others what comes before the damage.
    suffixes: of the files that are read. With `PROMPT_SUFFIXES`, a line of a text is a record {"prompt": line}.
    Raises FileNotFoundError and ValueError as `find_files` does, and ValueError with file and line for a damaged file.
    """
    for path in find_files(source, suffixes):
        try:
            yield from _read(path, problems)
        except ValueError as error:
            if problems is None:
                raise
            problems.append(str(error))


def find_files(source: Source, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files of a source: of a list in its order, of a directory or a pattern sorted by path.

    A name that exists is meant as it is, commas and wildcards included. Of a directory, files whose names do not end
    in one of `suffixes` are left out, and so are hidden files, and texts beside records. Raises FileNotFoundError for a
    name that does not exist, and for a directory or pattern without files; ValueError for any other file that
    `suffixes` does not allow.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not source:
            raise ValueError("the list of data files is empty")
        return [path for name in source for path in find_files(name, suffixes)]
    given = os.fspath(source)
    names = [given] if Path(given).expanduser().exists() else given.split(",")
    return [path for name in names for path in _expand(name.strip(), given, suffixes)]


def describe(source: Source) -> str:
    """A source as one text, for messages."""
    names = [source] if isinstance(source, (str, os.PathLike)) else source
    return ", ".join(os.fspath(name) for name in names)


def _expand(name: str, given: str, suffixes: tuple[str, ...]) -> list[Path]:
    if not name:
        raise ValueError(f"a data file without a name, in {given!r}")
    path, allowed = Path(name).expanduser(), f"names must end in one of {', '.join(suffixes)}"
    if path.is_dir():
        below = sorted(found for found in path.rglob("*") if not found.is_dir())
        below = [found for found in below if not any(part[0] == "." for part in found.relative_to(path).parts)]
        if arrow := [found for found in below if found.suffix == ".arrow"]:
            raise ValueError(f"{arrow[0]}: {allowed}; write the data set with its to_parquet or to_json")
        # A text beside records is more likely a note than prompts.
        for endings in (SUFFIXES, suffixes):
            if found := [found for found in below if found.name.endswith(endings)]:
                return found
        raise FileNotFoundError(f"directory {name} has no data file: {allowed}, and not start with a dot")
    found = [path]
    if not path.exists():
        found = [Path(match) for match in glob.glob(str(path), recursive=True)]
        found = sorted(match for match in found if not match.is_dir())
        if not found:
            missing = f"no file matches {name}" if glob.has_magic(name) else f"data file {name} does not exist"
            raise FileNotFoundError(missing if name == given else f"{missing}, of {given!r}")
    for path in found:
        if not path.name.endswith(suffixes):
            raise ValueError(f"{path}: file {allowed}")
    return found


def _read(path: Path, problems: list[str] | None) -> Iterator[Record]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            if path.name.endswith(TEXT_SUFFIXES):
                yield from _lines(file, path, problems, lambda line: {"prompt": line})
            else:
                yield from _json(file, path, problems)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: can't be read: {error}") from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    index = itertools.count()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for record in batch.to_pylist():
                    yield record, f"{path}: record {next(index)}"
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: can't be read: {error}") from None


def _lines(
    file: io.BufferedIOBase, path: Path, problems: list[str] | None, parse: Callable[[str], Any] = json.loads
) -> Iterator[Record]:
    """A record from each line that is not blank. Lines end at "\\n" only: JSON strings may hold U+2028 and its like."""
    for number, data in enumerate(file, start=1):
        try:
            line = data.decode().rstrip("\r\n")
            if not line or line.isspace():
                continue
            record = parse(line)
        except (ValueError, RecursionError) as error:
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            problem = f"{path}:{number}: {_reason(error)}{column}"
            if problems is None:
                raise ValueError(problem) from None
            problems.append(problem)
        else:
            yield record, f"{path}:{number}"


def _json(file: io.BufferedIOBase, path: Path, problems: list[str] | None) -> Iterator[Record]:
    start = file.tell()
    text = _Text(file, path)
    if text.peek() == "[":
        yield from text.items()
        text.end()
    elif wrapper := _WRAPPER.match(text.text, text.at):
        text.at = wrapper.end()
        yield from text.items()
        text.skip_members()
        text.end()
    else:
        one_a_line = _one_a_line(text, file, start)
        file.seek(start)
        yield from _lines(file, path, problems) if one_a_line else _Text(file, path).values()


def _one_a_line(text: "_Text", file: io.BufferedIOBase, start: int) -> bool:
    """Whether each line of a file is a record, as the first is. Where the first is damaged the second decides, since
    what is read over lines stops at the damage."""
    if text.peek() != "{":
        return True
    first = text.line
    try:
        text.value(0)
    except ValueError:
        file.seek(start)
        lines = (line for line in file if line.strip())
        next(lines)
        return text.line == first or _is_object(next(lines, b"{}"))
    last, following = text.line, text.peek()
    return first == last and (following != "{" or text.line > last)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason}"
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    return f"not JSON: {getattr(error, 'msg', error)}"


class _Text:
    """The JSON text of a file, read value by value. Of the text only the part around the position is held."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at = "", 0
        self._utf8, self._json = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self._line, self._counted = 1, 0
        self._damage: UnicodeDecodeError | None = None  # of what follows the text

    @property
    def line(self) -> int:
        """The line of the position, from 1."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def peek(self) -> str:
        """Move to the next character that is not blank, and return it, or "" at the end."""
        while True:
            found = _VISIBLE.search(self.text, self.at)
            self.at = found.start() if found else len(self.text)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self, allowed: str, place: str) -> str:
        """Step over the next character, which must be one of those allowed; place: where that is, for the message."""
        if not (found := self.peek()) or found not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise self._error(f"expected {wanted} {place}, got {repr(found) if found else 'the end'}")
        self.at += 1
        return found

    def value(self, index: int) -> Any:
        """Decode the value at the position, a part of the record of that index. Where it is damaged, raises ValueError
        and leaves the position there."""
        first = self.line
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                at = getattr(error, "pos", self.at)
                cut = at > len(self.text) - _LONGEST_TOKEN or str(error).startswith("Unterminated string")
                if cut and self._more():
                    continue
                self.at = at
                start = "" if self.line == first else f", which starts in line {first}"
                raise self._error(f"record {index}{start}: {_reason(error)}") from None
            # A number may go on.
            if end < len(self.text) or isinstance(value, (dict, list, str)) or not self._more():
                self.at = end
                return value

    def items(self) -> Iterator[Record]:
        """The values of the list at the position."""
        self.take("[", "before the list")
        if self.peek() == "]":
            self.at += 1
            return
        for index in itertools.count():
            yield self._record(index)
            if self.take(",]", f"after record {index}") == "]":
                return

    def skip_members(self) -> None:
        """Step over the rest of the object around a list, that is `, "name": value` and the like up to its end."""
        while self.take(",}", "after the list") == ",":
            self._record(0)
            self.take(":", "after a name")
            self._record(0)

    def values(self) -> Iterator[Record]:
        """The values from the position to the end."""
        for index in itertools.count():
            if not self.peek():
                return
            yield self._record(index)

    def end(self) -> None:
        """ValueError where anything but blanks is left."""
        if self.peek():
            raise self._error("text after the end of the list")

    def _record(self, index: int) -> Record:
        self.peek()
        where = f"{self.path}:{self.line}: record {index}"
        return self.value(index), where

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{self.path}:{self.line}: {text}")

    def _more(self) -> bool:
        """Read on; False, and all is as it was, at the end. What is held at least doubles, so that the time for a long
        value, which is decoded again, stays linear."""
        if self._damage:
            self.at = len(self.text)
            raise self._error(_reason(self._damage))
        data = self.file.read(max(_CHUNK, len(self.text) - self.at))
        try:
            text = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._damage, text = error, error.object[: error.start].decode()
        if not data and not self._damage:
            return False
        self._line, self._counted = self.line, 0
        self.text, self.at = self.text[self.at :] + text, 0
        return True
