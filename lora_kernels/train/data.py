"""Supervised fine-tuning data: from a file of records to token ids and the tokens that carry loss.

A record has one of these forms; other fields are ignored:

- {"instruction": str, "input": str (optional), "output": str, "system": str (optional)}
- {"messages": [{"role": str, "content": str}, ...]}: every assistant turn is learned
- {"prompt": ..., "completion": ...}: each a string (a user turn, an assistant turn) or a list of messages; only the
  completion's assistant turns are learned

Every record becomes a list of messages, which the tokenizer's chat template renders. Where the tokenizer has none,
`DEFAULT_CHAT_TEMPLATE` is used.
"""

import hashlib
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_kernels.train.losses import IGNORE_INDEX
from lora_kernels.train.records import Source, describe, load_records

FORMS = (
    '{"instruction", "input" (optional), "output"}',
    '{"messages": [{"role", "content"}, ...]}',
    '{"prompt", "completion"}',
)

# The Alpaca layout in plain text, so that a base model needs no new tokens. {bos} is put in by `set_chat_template`.
DEFAULT_CHAT_TEMPLATE = (
    "{bos}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
TOKENIZE_ROWS = 512


@dataclass(frozen=True)
class Conversation:
    """Messages; which of them (by index) are learned; and the place of the record, for messages to the user."""

    messages: list[dict[str, str]]
    answers: tuple[int, ...]
    where: str


@dataclass
class TokenDataset:
    """Tokenised rows: `input_ids[i]` int32 [T_i], `answer_mask[i]` bool [T_i], True where the token is learned."""

    input_ids: list[np.ndarray] = field(default_factory=list)
    answer_mask: list[np.ndarray] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0

    def __post_init__(self) -> None:
        self.lengths = np.array([len(ids) for ids in self.input_ids], dtype=np.int64)
        # Answer tokens; the first token of a row has nothing before it that could predict it.
        self.loss_counts = np.array([int(mask[1:].sum()) for mask in self.answer_mask], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The rows as `collate` makes them."""
        return collate([(self.input_ids[i], self.answer_mask[i]) for i in indices])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    def digest(self) -> str:
        """Of all that is learned from."""
        return digest_of(zip(self.input_ids, self.answer_mask, strict=True))

    def describe(self) -> str:
        """One line: rows, lengths, the share of tokens that is learned, what was cut or left out."""
        total = int(self.lengths.sum())
        text = (
            f"{len(self)} rows, {total} tokens (median {int(np.median(self.lengths))}, longest {self.lengths.max()}), "
            f"{100 * self.loss_counts.sum() / total:.0f} % of them learned"
        )
        if self.truncated:
            text += f"; {self.truncated} rows truncated"
        if self.dropped:
            text += f"; {self.dropped} rows dropped"
        return text


def batches_by_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The rows' indices in batches, the longest first, so that a batch pads little."""
    order = np.argsort(-lengths, kind="stable")
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def digest_of(arrays: Iterable[Iterable[np.ndarray]]) -> str:
    """Sixteen hexadecimal digits that say whether data are the same."""
    digest = hashlib.blake2b(digest_size=8)
    for array in itertools.chain.from_iterable(arrays):
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(array.tobytes())
    return digest.hexdigest()


def collate(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
    """Pad on the right: input_ids, labels (-100 off the answers) and attention_mask, each int64 [B, T].

    What pads is token 0, which every model has: nothing looks at it, and a tokenizer's pad token may be one that the
    model's embedding was never enlarged for. Mask and labels come from the lengths, never from token ids, so token 0 is
    learned where an answer has it and ignored where it pads.
    """
    longest = max(len(ids) for ids, _ in rows)
    input_ids = np.zeros((len(rows), longest), dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORE_INDEX, dtype=np.int64)
    attention_mask = np.zeros((len(rows), longest), dtype=np.int64)
    for row, (ids, mask) in enumerate(rows):
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = np.where(mask, ids, IGNORE_INDEX)
        attention_mask[row, : len(ids)] = 1
    arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def to_conversation(record: Any, where: str) -> Conversation:
    """The record's messages; ValueError starting with `where` for a bad record."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    if record.get("messages") is not None:
        messages = message_list(record["messages"], "messages", where)
        first = 0
    elif record.get("instruction") is not None and "output" in record:
        messages = [user_turn(record, where), message("assistant", text_field(record, "output", where))]
        if record.get("system"):
            messages.insert(0, message("system", text_field(record, "system", where)))
        first = 0
    elif "prompt" in record and "completion" in record:
        messages = _turns(record, "prompt", "user", where)
        first = len(messages)
        messages += _turns(record, "completion", "assistant", where)
    else:
        found = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{where}: expected one of {'; '.join(FORMS)}; got the fields {found}")
    answers = tuple(i for i, turn in enumerate(messages) if i >= first and turn["role"] == "assistant")
    if not answers:
        raise ValueError(f"{where}: no assistant message to learn")
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{where}: the first message must not be the assistant's")
    return Conversation(messages[: answers[-1] + 1], answers, where)


def with_empty_answer(record: dict) -> dict:
    """A record with a prompt alone gets an empty answer; any other is returned as it is."""
    forms = (("instruction", "output"), ("prompt", "completion"))
    given = {name for name, value in record.items() if value is not None}
    if not any({*form} <= given for form in forms):
        for prompt, answer in forms:
            if prompt in given:
                return {**record, answer: ""}
    return record


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user_turn(record: dict, where: str) -> dict[str, str]:
    """What the user says in a record with an instruction and maybe an input."""
    content = text_field(record, "instruction", where)
    if record.get("input"):
        content += "\n\n" + text_field(record, "input", where)
    return message("user", content)


def text_field(record: dict, name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = value[error.start : error.end]
        raise ValueError(f"{where}: {name!r} holds {half!r}, half of a character, at {error.start}") from None
    return value


def _turns(record: dict, name: str, role: str, where: str) -> list[dict[str, str]]:
    if isinstance(record[name], str):
        return [message(role, text_field(record, name, where))]
    return message_list(record[name], name, where)


def message_list(value: Any, name: str, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name!r} must be a non-empty list of messages, got {value!r:.80}")
    for index, item in enumerate(value):
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            raise ValueError(f'{where}: {name}[{index}] must be {{"role", "content"}}, got {item!r:.80}')
        for key in ("role", "content"):
            text_field(item, key, f"{where}: {name}[{index}]")
    return [message(item["role"], item["content"]) for item in value]


def set_chat_template(tokenizer: Any, chat_template: str | None = None) -> None:
    """Give the tokenizer `chat_template` (Jinja text, or a file with it), or `DEFAULT_CHAT_TEMPLATE` if it has none.

    The default starts with the begin token where the tokenizer itself would add one. Raises ValueError where the
    default is needed and the tokenizer has no end token.
    """
    if chat_template is not None:
        if "{{" not in chat_template and "{%" not in chat_template:
            if not Path(chat_template).is_file():
                raise FileNotFoundError(f"chat_template is neither a Jinja template nor a file: {chat_template}")
            chat_template = Path(chat_template).read_text(encoding="utf-8")
        tokenizer.chat_template = chat_template
    elif not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a chat template nor an end token; pass chat_template")
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE.replace("{bos}", "{{ bos_token }}" if adds_bos else "", 1)


class Renderer:
    """Conversations to text with the character spans of the answers, and on to token ids with an answer mask."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ends = {str(token) for token in added.values() if getattr(token, "special", False)}
        ends |= set(tokenizer.all_special_tokens)
        self.ends = tuple(sorted(filter(None, ends), key=len, reverse=True))
        self.end_pattern = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.ends)) + ")") if self.ends else None

    def spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text up to the last answer's end-of-turn token, and [start, end) of each answer with its own.

        An answer starts where the template asks for one after the turns before it. It ends where rendering just the
        turns up to it ends. Templates that render a turn otherwise once it is not the last (they drop the reasoning
        of earlier turns) have it end after its own text and the end-of-turn token that follows.
        """
        messages, where = conversation.messages, conversation.where
        full = self._render(messages, False, where)
        spans = []
        for index in conversation.answers:
            prompt = self._render(messages[:index], True, where)
            if not full.startswith(prompt):
                raise ValueError(
                    f"{where}: the chat template renders the turns before message {index} otherwise when that message "
                    "follows, so its tokens can't be told from the prompt's; pass another chat_template"
                )
            turn = full if index == len(messages) - 1 else self._render(messages[: index + 1], False, where)
            start, end = len(prompt), len(turn)
            if not full.startswith(turn):
                content = messages[index]["content"].strip()
                found = full.find(content, start)
                if found < 0:
                    raise ValueError(f"{where}: the chat template does not show the text of message {index}")
                end = found + len(content)
                follows = self.end_pattern.match(full, end) if self.end_pattern else None
                end = follows.end() if follows else end
            answer = full[start:end].rstrip()
            if answer.endswith(self.ends):
                end = start + len(answer)
            spans.append((start, end))
        return full[: spans[-1][1]], spans

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool, where: str) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"{where}: the chat template refuses this conversation: {error}") from error

    def tokenize(self, conversations: Sequence[Conversation]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Token ids and answer mask of each conversation.

        The mask's borders are the lengths of the tokenised prefixes, which must agree with the whole: the prompt is
        tokenised by itself when the model is used. Where a token reaches over a border, the text is tokenised
        piecewise instead, as it would be in use.
        """
        rendered = [self.spans(conversation) for conversation in conversations]
        texts = []
        for text, spans in rendered:
            cuts = [cut for span in spans for cut in span]
            texts += [text[:cut] for cut in cuts]
        encoded = iter(self._encode(texts))
        for conversation, (text, spans) in zip(conversations, rendered, strict=True):
            prefixes = [next(encoded) for _ in range(2 * len(spans))]
            ids = prefixes[-1]
            if all(ids[: len(prefix)] == prefix for prefix in prefixes):
                cuts = [len(prefix) for prefix in prefixes]
            else:
                ids, cuts = self._piecewise(text, spans, ids, conversation.where)
            mask = np.zeros(len(ids), dtype=bool)
            for start, end in zip(cuts[::2], cuts[1::2], strict=True):
                mask[start:end] = True
            if not text.endswith(self.ends):
                if self.tokenizer.eos_token_id is None:
                    raise ValueError(
                        f"{conversation.where}: the chat template ends an answer without a special token, and the "
                        "tokenizer has no end token, so the model could not learn to stop"
                    )
                ids = [*ids, self.tokenizer.eos_token_id]
                mask = np.append(mask, True)
            yield ids, mask

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _piecewise(self, text: str, spans: list[tuple[int, int]], whole: list[int], where: str):
        borders = [0, *(cut for span in spans for cut in span)]
        pieces = self._encode([text[start:end] for start, end in zip(borders, borders[1:], strict=False)])
        ids = [token for piece in pieces for token in piece]
        if self._decode(ids) != self._decode(whole):
            raise ValueError(
                f"{where}: the tokenizer joins the end of the prompt and the start of the answer into one token, and "
                "tokenising them apart changes the text; pass a chat_template that ends the prompt with a special token"
            )
        return ids, list(np.cumsum([len(piece) for piece in pieces]))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def build_dataset(records: Iterable[tuple[Any, str]], tokenizer: Any, max_length: int, source: str) -> TokenDataset:
    """Tokenise (record, place) pairs; keep the first `max_length` tokens of each.

    Rows that keep no answer token, or whose answers are all blank, are dropped with a warning that counts them.
    Raises ValueError for a bad record, and where no row is left.
    """
    set_chat_template(tokenizer)
    renderer = Renderer(tokenizer)
    conversations, blank = [], 0
    for record, where in records:
        conversation = to_conversation(record, where)
        if any(conversation.messages[i]["content"].strip() for i in conversation.answers):
            conversations.append(conversation)
        else:
            blank += 1
    input_ids, masks, truncated, unanswered = [], [], 0, 0
    for start in range(0, len(conversations), TOKENIZE_ROWS):
        for ids, mask in renderer.tokenize(conversations[start : start + TOKENIZE_ROWS]):
            if not mask[1:max_length].any():
                unanswered += 1
                continue
            truncated += len(ids) > max_length
            input_ids.append(np.array(ids[:max_length], dtype=np.int32))
            masks.append(mask[:max_length])
    if unanswered:
        warn(
            f"{source}: dropped {unanswered} rows that have no answer token among their first {max_length} (max_length)"
        )
    if blank:
        warn(f"{source}: dropped {blank} rows whose answer is blank")
    if not input_ids:
        raise ValueError(
            f"{source}: no row with an answer is left" if conversations or blank else f"{source}: no records"
        )
    return TokenDataset(input_ids, masks, truncated, unanswered + blank)


def load_dataset(source: Source, tokenizer: Any, max_length: int) -> TokenDataset:
    """`build_dataset` over the records of `lora_kernels.train.records.load_records`."""
    return build_dataset(load_records(source), tokenizer, max_length, describe(source))


def warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=3)
