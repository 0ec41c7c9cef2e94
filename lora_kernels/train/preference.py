"""Preference data: from a file of records to pairs of tokenised answers to one prompt.

A record has one of these forms; other fields are ignored:

- {"prompt", "chosen", "rejected"}: each a string (a user turn, assistant turns) or a list of messages {"role",
  "content"}. The answers may repeat the prompt's messages.
- {"chosen", "rejected"}: two whole conversations. What they have in common at their beginning is the prompt.
- {"conversations": [{"from", "value"}, ...], "chosen": {"from", "value"}, "rejected": {"from", "value"}}, from being
  human, gpt or system: the files of LLaMA-Factory.
- {"chosen", "rejected"}: two texts of turns that start with "\\n\\nHuman: " and "\\n\\nAssistant: ", as in hh-rlhf.
- {"instruction", "input" (optional), "chosen", "rejected"}: strings.

All but the two whole conversations may have "system", a string. "margin", a number, is how much better the chosen
answer is (for the reward model).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_kernels.train.data import (
    TOKENIZE_ROWS,
    Conversation,
    Renderer,
    collate,
    digest_of,
    message,
    message_list,
    set_chat_template,
    text_field,
    user_turn,
    warn,
)
from lora_kernels.train.records import Source, describe, load_records

FORMS = (
    '{"prompt", "chosen", "rejected"}',
    '{"chosen", "rejected"} with whole conversations, as lists of messages or as texts of Human and Assistant turns',
    '{"conversations", "chosen", "rejected"}',
    '{"instruction", "input" (optional), "chosen", "rejected"}',
)
_ROLES = {"human": "user", "gpt": "assistant"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")

Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as conversations whose first messages, the prompt, are the same."""

    chosen: Conversation
    rejected: Conversation
    margin: float
    where: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        return self.chosen.messages[: self.chosen.answers[0]]

    def void(self) -> str | None:
        """Why nothing can be learned from the pair, if so: an answer says nothing, or both say the same."""
        for name in ("chosen", "rejected"):
            conversation = getattr(self, name)
            if not any(conversation.messages[i]["content"].strip() for i in conversation.answers):
                return f"the {name} answer is blank"
        if _stripped(self.chosen.messages) == _stripped(self.rejected.messages):
            return "chosen and rejected are the same"
        return None


def is_preference(record: Any) -> bool:
    """Whether a record is meant as a preference pair."""
    return isinstance(record, dict) and "chosen" in record and "rejected" in record


def to_pair(record: Any, where: str) -> Pair:
    """The record's two conversations; ValueError starting with `where` for a bad record."""
    if not is_preference(record):
        found = ", ".join(map(repr, record)) or "none" if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}: expected one of {'; '.join(FORMS)}; got the fields {found}")
    margin = record.get("margin")
    if margin is None:
        margin = 0.0
    elif isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise ValueError(f"{where}: 'margin' must be a finite number, got {margin!r}")

    prompt = _prompt(record, where)
    whole = prompt is None
    answers = [_answer(record, name, where, whole) for name in ("chosen", "rejected")]
    if whole:
        # Where the one goes on after the other ends, what ends last is its answer.
        most = min(map(len, answers)) - 1
        shared = next((i for i in range(most) if answers[0][i] != answers[1][i]), most)
        prompt = answers[0][:shared]
        answers = [answer[shared:] for answer in answers]
        if not prompt:
            raise ValueError(f"{where}: chosen and rejected have no first message in common, and there is no 'prompt'")
    else:
        answers = [answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in answers]
    if prompt[0]["role"] == "assistant":
        raise ValueError(f"{where}: the first message must not be the assistant's")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer or answer[0]["role"] != "assistant":
            found = f"of {answer[0]['role']!r}" if answer else "missing"
            raise ValueError(f"{where}: after the prompt, {name} must go on with an assistant message; it is {found}")
    chosen, rejected = (_conversation(prompt, answer, where) for answer in answers)
    return Pair(chosen, rejected, float(margin), where)


def _prompt(record: dict, where: str) -> list[dict[str, str]] | None:
    """The prompt's messages, or None where the answers are whole conversations."""
    if record.get("conversations") is not None:
        prompt = _messages(record["conversations"], "conversations", where)
    elif record.get("prompt") is not None:
        value = record["prompt"]
        is_text = isinstance(value, str)
        prompt = (
            [message("user", text_field(record, "prompt", where))] if is_text else _messages(value, "prompt", where)
        )
    elif record.get("instruction") is not None:
        prompt = [user_turn(record, where)]
    else:
        return None
    if record.get("system") and prompt[0]["role"] != "system":
        prompt.insert(0, message("system", text_field(record, "system", where)))
    return prompt


def _answer(record: dict, name: str, where: str, whole: bool) -> list[dict[str, str]]:
    value = record[name]
    if isinstance(value, str):
        text_field(record, name, where)
        return _hh_messages(value, name, where) if whole else [message("assistant", value)]
    return _messages([value] if isinstance(value, dict) else value, name, where)


def _messages(value: Any, name: str, where: str) -> list[dict[str, str]]:
    if isinstance(value, list):
        value = [
            {"role": _ROLES.get(item["from"], item["from"]), "content": item["value"]}
            if isinstance(item, dict) and isinstance(item.get("from"), str) and "value" in item
            else item
            for item in value
        ]
    return message_list(value, name, where)


def _hh_messages(text: str, name: str, where: str) -> list[dict[str, str]]:
    before, *parts = _HH_TURN.split(text)
    if not parts or before.strip():
        raise ValueError(
            f"{where}: without a 'prompt', {name!r} must be a list of messages or a text that starts with "
            rf"'\n\nHuman: ', got {text[:40]!r}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _stripped(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(item["role"], item["content"].strip()) for item in messages]


def _conversation(prompt: list[dict[str, str]], answer: list[dict[str, str]], where: str) -> Conversation:
    messages = [*prompt, *answer]
    answers = tuple(i for i in range(len(prompt), len(messages)) if messages[i]["role"] == "assistant")
    return Conversation(messages[: answers[-1] + 1], answers, where)


@dataclass
class PairDataset:
    """Tokenised pairs: chosen[i] and rejected[i] are (input_ids int32 [T], answer_mask bool [T]), margins float32 [n].

    ref_logprobs: float32 [n, 2], what the reference model gives the two answers, where it is known (see
    `lora_kernels.train.dpo`).
    """

    chosen: list[Row] = field(default_factory=list)
    rejected: list[Row] = field(default_factory=list)
    margins: np.ndarray | None = None
    too_long: int = 0
    void: int = 0
    ref_logprobs: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows = zip(self.chosen, self.rejected, strict=True)
        self.lengths = np.array([len(one[0]) + len(other[0]) for one, other in rows], dtype=np.int64)
        self.loss_counts = np.ones(len(self.chosen), dtype=np.int64)
        if self.margins is None:
            self.margins = np.zeros(len(self.chosen), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The chosen rows, then the rejected ones, padded on the right: input_ids and labels (-100 off the answers)
        int64 [2B, T], lengths int64 [2B]; and margin [B], and ref_logprobs [2B] where they are known."""
        rows = [self.chosen[i] for i in indices] + [self.rejected[i] for i in indices]
        batch = collate(rows)
        batch["lengths"] = batch.pop("attention_mask").sum(1)
        batch["margin"] = torch.from_numpy(self.margins[list(indices)])
        if self.ref_logprobs is not None:
            batch["ref_logprobs"] = torch.from_numpy(self.ref_logprobs[list(indices)].T.reshape(-1))
        return batch

    def describe(self) -> str:
        """One line: pairs, tokens, the lengths of the two answers, what was left out."""
        chosen, rejected = (int(np.median([mask.sum() for _, mask in rows])) for rows in (self.chosen, self.rejected))
        text = (
            f"{len(self)} pairs, {int(self.lengths.sum())} tokens (median answer {chosen} chosen, {rejected} rejected)"
        )
        if self.too_long:
            text += f"; {self.too_long} pairs longer than max_length dropped"
        if self.void:
            text += f"; {self.void} pairs with a blank answer or two equal ones dropped"
        return text

    @property
    def longest(self) -> int:
        """Tokens of the longest row, which is one answer and its prompt."""
        return max(len(ids) for ids, _ in (*self.chosen, *self.rejected))

    def digest(self) -> str:
        """Of all that is learned from."""
        return digest_of([*self.chosen, *self.rejected, [self.margins]])


def build_pairs(records: Iterable[tuple[Any, str]], tokenizer: Any, max_length: int, source: str) -> PairDataset:
    """Tokenise (record, place) pairs.

    A pair with an answer that, with its prompt, is longer than `max_length` tokens is dropped, not cut: a cut answer is
    no longer the one that was judged. So is a pair with a blank answer or two equal ones. A warning counts both. Raises
    ValueError for a bad record, and where no pair is left.
    """
    set_chat_template(tokenizer)
    renderer = Renderer(tokenizer)
    pairs, void = [], 0
    for record, where in records:
        pair = to_pair(record, where)
        if pair.void():
            void += 1
        else:
            pairs.append(pair)
    chosen, rejected, margins, too_long = [], [], [], 0
    for start in range(0, len(pairs), TOKENIZE_ROWS):
        some = pairs[start : start + TOKENIZE_ROWS]
        rows = renderer.tokenize([side for pair in some for side in (pair.chosen, pair.rejected)])
        for pair, (one, other) in zip(some, zip(rows, rows, strict=True), strict=True):
            if one[0] == other[0]:
                void += 1
                continue
            if max(len(one[0]), len(other[0])) > max_length:
                too_long += 1
                continue
            for side, (ids, mask) in ((chosen, one), (rejected, other)):
                side.append((np.array(ids, dtype=np.int32), mask))
            margins.append(pair.margin)
    if too_long:
        warn(f"{source}: dropped {too_long} pairs with more than {max_length} tokens (max_length) in prompt and answer")
    if void:
        warn(f"{source}: dropped {void} pairs with a blank answer or two equal ones")
    if not chosen:
        raise ValueError(f"{source}: no pair is left" if pairs or void else f"{source}: no records")
    margins = np.array(margins, dtype=np.float32)
    return PairDataset(chosen, rejected, margins, too_long, void)


def load_pairs(source: Source, tokenizer: Any, max_length: int) -> PairDataset:
    """`build_pairs` over the records of `lora_kernels.train.records.load_records`."""
    return build_pairs(load_records(source), tokenizer, max_length, describe(source))
