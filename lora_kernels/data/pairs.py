"""Preference data: from records to pairs of tokenised answers to one prompt.

A record has one of these forms:

- {"prompt", "chosen", "rejected"}: each a string (a user turn, assistant turns) or a list of messages. The answers may
  repeat the prompt's messages, or be whole conversations that hold the prompt's text.
- {"chosen", "rejected"}: two whole conversations. What they have in common at their beginning is the prompt.
- {"conversations": [message, ...], "chosen": message, "rejected": message}: the files of LLaMA-Factory.
- {"chosen", "rejected"}: two texts of turns that start with "\\n\\nHuman: " and "\\n\\nAssistant: ", as in hh-rlhf.
- {"instruction", "input" (optional), "chosen", "rejected"}: strings, and "history" as in training data.

Messages, and the fields that a record may have besides, are those of `lora_kernels.data.messages`. "margin", a number,
is how much better the chosen answer is (for the reward model).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_kernels.data.chat import Renderer, set_chat_template
from lora_kernels.data.dataset import (
    TOKENIZE_ROWS,
    batched,
    collate,
    digest_of,
    warn,
    warn_of_rest,
)
from lora_kernels.data.messages import (
    Conversation,
    Message,
    conversation_of,
    history,
    message,
    message_list,
    said,
    text_field,
    turns_field,
    turns_of,
    user_turn,
    with_system,
    without_flags,
)
from lora_kernels.data.records import Source, describe, load_records

FORMS = (
    '{"prompt", "chosen", "rejected"}',
    '{"chosen", "rejected"} with whole conversations, as lists of messages or as texts of Human and Assistant turns',
    '{"conversations", "chosen", "rejected"}',
    '{"instruction", "input" (optional), "chosen", "rejected"}',
)
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
    def prompt(self) -> list[Message]:
        return self.chosen.messages[: self.chosen.answers[0]]

    def void(self) -> str | None:
        """Why nothing can be learned from the pair, if so: an answer says nothing, or both say the same."""
        for name in ("chosen", "rejected"):
            if getattr(self, name).blank:
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

    prompt, fields = _prompt(record, where)
    answers = [_answer(record, name, where, prompt is None) for name in ("chosen", "rejected")]
    if prompt is None or _hold_the_prompt(record, answers, where):
        # Where the one goes on after the other ends, what ends last is its answer.
        most = min(map(len, answers)) - 1
        bare = [without_flags(answer) for answer in answers]
        shared = next((i for i in range(most) if bare[0][i] != bare[1][i]), most)
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
    fields |= {"chosen", "rejected", "margin"}
    chosen, rejected = (_conversation(record, prompt, answer, where, fields) for answer in answers)
    return Pair(chosen, rejected, float(margin), where)


def _prompt(record: dict, where: str) -> tuple[list[Message] | None, set[str]]:
    """The prompt's messages, or None where the answers are whole conversations; and the fields that hold them."""
    if (name := turns_field(record)) is not None:
        return message_list(record[name], name, where), {name}
    if record.get("prompt") is not None:
        return turns_of(record, "prompt", "user", where), {"prompt"}
    if record.get("instruction") is not None:
        return [*history(record, where), user_turn(record, where)], {"instruction", "input", "history"}
    return None, set()


def _hold_the_prompt(record: dict, answers: list[list[Message]], where: str) -> bool:
    """Whether the answers to a text are whole conversations; ValueError where they do not hold that text."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or all(answer[0]["role"] == "assistant" for answer in answers):
        return False
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not any(turn["role"] == "user" and turn["content"].strip() == prompt.strip() for turn in answer):
            raise ValueError(f"{where}: {name} is a whole conversation, but none of its user messages is the 'prompt'")
    return True


def _answer(record: dict, name: str, where: str, whole: bool) -> list[Message]:
    value = record[name]
    if isinstance(value, str):
        text_field(record, name, where)
        return _hh_messages(value, name, where) if whole else [message("assistant", value)]
    return message_list([value] if isinstance(value, dict) else value, name, where)


def _hh_messages(text: str, name: str, where: str) -> list[dict[str, str]]:
    before, *parts = _HH_TURN.split(text)
    if not parts or before.strip():
        raise ValueError(
            f"{where}: without a 'prompt', {name!r} must be a list of messages or a text that starts with "
            rf"'\n\nHuman: ', got {text[:40]!r}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _stripped(messages: list[Message]) -> list[tuple[str, str]]:
    return [(item["role"], said(item).strip()) for item in messages]


def _conversation(
    record: dict, prompt: list[Message], answer: list[Message], where: str, fields: set[str]
) -> Conversation:
    messages = with_system(record, [*prompt, *answer], where)
    return conversation_of(record, messages, len(messages) - len(answer), where, fields)


@dataclass
class PairDataset:
    """Tokenised pairs: chosen[i] and rejected[i] are (input_ids int32 [T], answer_mask bool [T]), margins float32 [n].

    ref_logprobs: float32 [n, 2], what the reference model gives the two answers, where it is known (see
    `lora_kernels.train.dpo`).
    """

    chosen: list[Row]
    rejected: list[Row]
    margins: np.ndarray
    too_long: int = 0
    void: int = 0
    ref_logprobs: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows = zip(self.chosen, self.rejected, strict=True)
        self.lengths = np.array([len(one[0]) + len(other[0]) for one, other in rows], dtype=np.int64)
        self.loss_counts = np.ones(len(self.chosen), dtype=np.int64)

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


def build_pairs(
    records: Iterable[tuple[Any, str]], tokenizer: Any, max_length: int, source: str, **rendering: Any
) -> PairDataset:
    """Tokenise (record, place) pairs.

    A pair with an answer that, with its prompt, is longer than `max_length` tokens is dropped, not cut: a cut answer is
    no longer the one that was judged. So is a pair with a blank answer or two equal ones. A warning counts both. Raises
    ValueError for a bad record, and where no pair is left. rendering: `date` and `vocab_size` of `Renderer`.
    """
    set_chat_template(tokenizer)
    renderer = Renderer(tokenizer, **rendering)
    void, unknown = 0, set[str]()

    chosen: list[Row] = []
    rejected: list[Row] = []
    margins, too_long = [], 0
    for some in batched(records, TOKENIZE_ROWS):
        pairs = [to_pair(record, where) for record, where in some]
        unknown.update(*(side.unknown for pair in pairs for side in (pair.chosen, pair.rejected)))
        kept = [pair for pair in pairs if not pair.void()]
        void += len(pairs) - len(kept)
        rows = renderer.tokenize([side for pair in kept for side in (pair.chosen, pair.rejected)])
        for pair, (one, other) in zip(kept, zip(rows, rows, strict=True), strict=True):
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
    warn_of_rest(source, renderer, unknown)
    if not chosen:
        raise ValueError(f"{source}: no pair is left" if void or too_long else f"{source}: no records")
    return PairDataset(chosen, rejected, np.array(margins, dtype=np.float32), too_long, void)


def load_pairs(source: Source, tokenizer: Any, max_length: int, **rendering: Any) -> PairDataset:
    """`build_pairs` over the records of `lora_kernels.data.records.load_records`."""
    return build_pairs(load_records(source), tokenizer, max_length, describe(source), **rendering)
