"""A labeller for the terminal: which of two answers is the better one? `lora-kernels data label`."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lora_kernels.data.messages import asked, said
from lora_kernels.data.prompts import prompt_of
from lora_kernels.data.records import load_records

KEYS = {"1": "first", "2": "second", "s": "skip", "q": "quit"}
_ATTEMPTS = 4


def label(
    prompts: Sequence[Any],
    answer: Callable[[Any, int], Sequence[str]],
    output: str | os.PathLike,
    read_key: Callable[[], str],
    console: Console,
) -> int:
    """Ask which of two answers is better for each prompt that `output`, a .jsonl file, has no record of; append
    {"prompt", "chosen", "rejected"} for each decision. Returns how many were made.

    answer(prompt, attempt) samples two answers; where they are the same or blank it is called again with the next
    attempt, and after some attempts the prompt is left out. read_key() gives a key of `KEYS`, "" at the end of the
    input. A record is on the disk before the next prompt is shown; a line that a killed process cut short is mended or
    removed at the start. Raises ValueError for an output that is not .jsonl or holds something else.
    """
    output = Path(output)
    if not output.name.endswith(".jsonl"):
        raise ValueError(f"output {output}: its name must end in .jsonl")
    mend(output)
    done = {_key(prompt) for prompt in _labelled(output)}
    unique = {_key(prompt): prompt for prompt in prompts}
    todo = [prompt for key, prompt in unique.items() if key not in done]
    console.print(f"{len(done)} prompts in {output}, {len(todo)} to label. Keys: 1 or 2, the better answer; s, skip; "
                  "q, quit.", highlight=False)  # fmt: skip
    made = 0
    for number, prompt in enumerate(todo, start=1):
        answers = _two_answers(answer, prompt)
        if answers is None:
            console.print(f"{number}/{len(todo)}: left out, since the model answers it only in one way")
            continue
        _show(console, prompt, answers, f"{number}/{len(todo)}")
        key = _decision(read_key)
        if key == "quit":
            break
        if key == "skip":
            continue
        chosen, rejected = answers if key == "first" else reversed(answers)
        fields = {"prompt": prompt} if not isinstance(prompt, dict) else dict(prompt)
        if "messages" in fields:
            fields["prompt"] = fields.pop("messages")
        append(output, {**fields, "chosen": chosen, "rejected": rejected})
        made += 1
    return made


def mend(path: Path) -> None:
    """End the file's last line, or take it away where it is not a whole record."""
    if not path.exists():
        return
    data = path.read_bytes()
    start = data.rfind(b"\n") + 1
    if start == len(data):
        return
    with path.open("r+b") as file:
        try:
            json.loads(data[start:])
        except ValueError:
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        _sync(file)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line to the file; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _labelled(path: Path) -> Iterable[Any]:
    if not path.exists():
        return
    for record, where in load_records(path):
        if not isinstance(record, dict) or "prompt" not in record:
            raise ValueError(f"{where}: the output has a line without a prompt; give a file that data label wrote")
        yield prompt_of(record, where)


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)


def _two_answers(answer: Callable[[Any, int], Sequence[str]], prompt: Any) -> Sequence[str] | None:
    for attempt in range(_ATTEMPTS):
        answers = answer(prompt, attempt)
        texts = [text.strip() for text in answers]
        if all(texts) and texts[0] != texts[1]:
            return answers
    return None


def _show(console: Console, prompt: Any, answers: Sequence[str], title: str) -> None:
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{item['role']}: {said(item)}" for item in asked(prompt).messages)
    # Text, since what a model writes may look like rich's markup.
    console.print(Panel(Text(prompt), title=title, title_align="left"))
    for number, text in enumerate(answers, start=1):
        console.print(Panel(Text(text.strip()), title=f"answer {number}", title_align="left"))


def _decision(read_key: Callable[[], str]) -> str:
    while True:
        key = read_key()
        if key == "" or key.lower() in KEYS:
            return KEYS[key.lower() or "q"]


def read_key() -> str:
    """A key from the terminal, without Enter; from a pipe, its next character that is not blank; "" at the end, which
    is Control-D on a terminal."""
    if not sys.stdin.isatty():
        while (key := sys.stdin.read(1)).isspace():
            pass
        return key
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return input("> ").strip()[:1] or " "
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        return sys.stdin.read(1).replace(before[6][termios.VEOF].decode(), "")
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
