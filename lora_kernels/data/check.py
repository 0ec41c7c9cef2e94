"""What a data file holds and what is wrong with it: `lora-kernels data check`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from lora_kernels.data.chat import Renderer, set_chat_template
from lora_kernels.data.dataset import unused
from lora_kernels.data.messages import (
    Conversation,
    asked,
    message_list,
    said,
    to_conversation,
    turns_field,
    with_empty_answer,
)
from lora_kernels.data.pairs import is_preference, to_pair
from lora_kernels.data.prompts import prompt_of
from lora_kernels.data.records import (
    PROMPT_SUFFIXES,
    Source,
    describe,
    load_records,
)

KINDS = {
    "preference": "preference pairs (reward, dpo)",
    "sft": "conversations with answers (sft)",
    "prompts": "prompts without answers (generate, data label)",
}
_PROMPT, _LEARNED = "dim", "bold green"


@dataclass
class Check:
    """What was found in a file.

    kind: a key of `KINDS`, or "" in a file without a record. lengths: of each good record's
    "prompt" and "answer", or "chosen" and "rejected", in `unit`. problems: one line each, with file and line.
    notes: what training does not use of it. example: {name: (input_ids, answer_mask)} of the first good record, with a
    tokenizer only. too_long: good records with more than max_length tokens.
    """

    kind: str = ""
    records: int = 0
    unit: str = "characters"
    lengths: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    example: dict[str, tuple[list[int], np.ndarray]] = field(default_factory=dict)
    too_long: int = 0

    def table(self) -> Table:
        """Shortest, median, mean, 95th percentile and longest of each part of the records."""
        table = Table(self.unit, "shortest", "median", "mean", "95 %", "longest", title_justify="left")
        for name, lengths in self.lengths.items():
            values = (min(lengths), np.median(lengths), np.mean(lengths), np.percentile(lengths, 95), max(lengths))
            table.add_row(name, *(f"{value:.0f}" for value in values))
        return table


def check_file(
    source: Source, tokenizer: Any = None, max_length: int | None = None, vocab_size: int | None = None
) -> Check:
    """Read every record of data files as training would, without stopping at a bad one.

    With a tokenizer, records are rendered and tokenised too; with `vocab_size`, the rows of the model's embedding, no
    token may be beyond it. Raises FileNotFoundError and ValueError for a source that is no data file.
    """
    check = Check(unit="characters" if tokenizer is None else "tokens")
    renderer = None
    if tokenizer is not None:
        set_chat_template(tokenizer)
        renderer = Renderer(tokenizer, vocab_size=vocab_size)
    kinds = [_kind(record) for record, _ in load_records(source, check.problems, PROMPT_SUFFIXES)]
    # A conversation that ends with the user's turn may be either; in a file of prompts there is nothing else.
    check.kind = "sft" if "sft" in kinds and kinds[0] != "preference" else kinds[0] if kinds else ""
    unknown: set[str] = set()
    for (record, where), kind in zip(load_records(source, [], PROMPT_SUFFIXES), kinds, strict=True):
        check.records += 1
        try:
            if (kind == "preference") != (check.kind == "preference"):
                raise ValueError(f"{where}: expected {KINDS[check.kind]} as before, got {KINDS[kind]}")
            unknown |= _read(check, record, where, renderer, max_length)
        except ValueError as error:
            check.problems.append(str(error))
    if not check.records and not check.problems:
        check.problems.append(f"{describe(source)}: no records")
    check.notes = unused(renderer, unknown)
    return check


def _kind(record: Any) -> str:
    if is_preference(record):
        return "preference"
    if not isinstance(record, dict):
        return "sft"
    if (name := turns_field(record)) is not None:
        try:
            return "sft" if message_list(record[name], name, "")[-1]["role"] == "assistant" else "prompts"
        except ValueError:
            return "sft"
    return "sft" if with_empty_answer(record) is record else "prompts"


def _read(check: Check, record: Any, where: str, renderer: Renderer | None, max_length: int | None) -> frozenset[str]:
    """Add a record to what was found, and return its unknown fields; ValueError for a bad one."""
    if check.kind == "preference":
        pair = to_pair(record, where)
        if why := pair.void():
            raise ValueError(f"{where}: {why}; training leaves the pair out")
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    else:
        prompt = check.kind == "prompts"
        conversation = asked(prompt_of(record, where), where, "") if prompt else to_conversation(record, where)
        if check.kind == "sft" and conversation.blank:
            raise ValueError(f"{where}: the answer is blank; training leaves the record out")
        sides = {"answer": conversation}
    if renderer is None:
        lengths = _characters(sides)
    else:
        rows = dict(zip(sides, renderer.tokenize(list(sides.values())), strict=True))
        if check.kind == "preference" and rows["chosen"][0] == rows["rejected"][0]:
            raise ValueError(
                f"{where}: the chat template makes chosen and rejected the same; training leaves the pair out"
            )
        first = next(iter(rows.values()))[1]
        lengths = {"prompt": int(first.argmax()), **{name: int(mask.sum()) for name, (_, mask) in rows.items()}}
        check.too_long += max_length is not None and max(len(ids) for ids, _ in rows.values()) > max_length
        check.example = check.example or rows
    if check.kind == "prompts":
        del lengths["answer"]
    for name, length in lengths.items():
        check.lengths.setdefault(name, []).append(length)
    return frozenset().union(*(conversation.unknown for conversation in sides.values()))


def _characters(sides: dict[str, Conversation]) -> dict[str, int]:
    first = next(iter(sides.values()))
    lengths = {"prompt": sum(len(said(item)) for item in first.messages[: first.answers[0]])}
    for name, conversation in sides.items():
        lengths[name] = sum(len(said(conversation.messages[i])) for i in conversation.answers)
    return lengths


def marked(input_ids: Sequence[int], answer_mask: np.ndarray, tokenizer: Any, colour: bool = True) -> Text:
    """The row as text, special tokens included: learned tokens bold green, or without colour in ⟦ ⟧, others dim."""
    text = Text()
    borders = [0, *(np.flatnonzero(np.diff(answer_mask.astype(np.int8))) + 1), len(input_ids)]
    for start, end in itertools.pairwise(borders):
        learned = bool(answer_mask[start])
        piece = tokenizer.decode(list(input_ids[start:end]), clean_up_tokenization_spaces=False)
        text.append(f"⟦{piece}⟧" if learned and not colour else piece, style=_LEARNED if learned else _PROMPT)
    return text
