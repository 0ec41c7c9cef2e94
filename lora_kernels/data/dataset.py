"""Supervised fine-tuning data: from records to token ids and the tokens that carry loss.

Every record becomes a list of messages (`lora_kernels.data.messages`), which the tokenizer's chat template renders
(`lora_kernels.data.chat`).
"""

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lora_kernels.data.chat import Renderer, set_chat_template
from lora_kernels.data.messages import to_conversation, unread
from lora_kernels.data.records import Source, describe, load_records
from lora_kernels.ops.cross_entropy import IGNORE_INDEX

TOKENIZE_ROWS = 64
_Item = TypeVar("_Item")


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


def batches_by_length(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """The rows' indices in batches, the longest first, so that a batch pads little."""
    order = np.argsort(-lengths, kind="stable").tolist()
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


def build_dataset(
    records: Iterable[tuple[Any, str]], tokenizer: Any, max_length: int, source: str, **rendering: Any
) -> TokenDataset:
    """Tokenise (record, place) pairs; keep the first `max_length` tokens of each.

    Rows that keep no answer token, or whose answers are all blank, are dropped with a warning that counts them. Others
    count the answers that the chat template does not show in full, and name the fields that nobody reads. Raises
    ValueError for a bad record, and where no row is left. rendering: `date` and `vocab_size` of `Renderer`.
    """
    set_chat_template(tokenizer)
    renderer = Renderer(tokenizer, **rendering)
    blank, unknown = 0, set[str]()

    input_ids, masks, truncated, unanswered = [], [], 0, 0
    for some in batched(records, TOKENIZE_ROWS):
        conversations = [to_conversation(record, where) for record, where in some]
        unknown.update(*(conversation.unknown for conversation in conversations))
        answered = [conversation for conversation in conversations if not conversation.blank]
        blank += len(conversations) - len(answered)
        for ids, mask in renderer.tokenize(answered):
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
    warn_of_rest(source, renderer, unknown)
    if not input_ids:
        raise ValueError(f"{source}: no row with an answer is left" if unanswered or blank else f"{source}: no records")
    return TokenDataset(input_ids, masks, truncated, unanswered + blank)


def batched(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while some := list(itertools.islice(iterator, size)):
        yield some


def warn_of_rest(source: str, renderer: Renderer, unknown: Iterable[str]) -> None:
    """Warnings of what the data hold and training does not use."""
    for text in unused(renderer, unknown):
        warn(f"{source}: {text}")


def unused(renderer: Renderer | None, unknown: Iterable[str]) -> list[str]:
    """What the data hold and training does not use, a sentence each; without a renderer only as far as fields go."""
    texts = []
    if renderer and renderer.left_out:
        texts.append(
            f"{renderer.left_out} answers are not learned, since the chat template does not show all that they say, "
            "or not where they start (many templates drop the reasoning of earlier turns)"
        )
    if fields := unread(unknown, str(renderer.tokenizer.chat_template) if renderer else ""):
        texts.append(f"fields that are not used: {', '.join(map(repr, fields))}")
    return texts


def load_dataset(source: Source, tokenizer: Any, max_length: int, **rendering: Any) -> TokenDataset:
    """`build_dataset` over the records of `lora_kernels.data.records.load_records`."""
    return build_dataset(load_records(source), tokenizer, max_length, describe(source), **rendering)


def warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=3)
