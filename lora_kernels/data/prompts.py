"""Prompts: from the records of files to token ids up to where an answer starts."""

from collections.abc import Iterator
from typing import Any

from lora_kernels.data import messages
from lora_kernels.data.chat import Renderer
from lora_kernels.data.messages import Prompt, asked
from lora_kernels.data.pairs import is_preference, to_pair
from lora_kernels.data.records import PROMPT_SUFFIXES, Source, load_records


def read_prompts(source: Source) -> Iterator[tuple[Prompt, Any]]:
    """(prompt, record) of each record of data files, see `lora_kernels.data.records.load_records`; of a .txt file each
    line is a prompt, and its record {"prompt": line}.

    Of a training record the last answer is left out, or both of a preference pair; one without an answer, be it that
    its messages end with the user's, is all prompt. Raises FileNotFoundError, and ValueError that names file and line
    for a bad record.
    """
    for record, where in load_records(source, suffixes=PROMPT_SUFFIXES):
        yield prompt_of(record, where), record


def prompt_of(record: Any, where: str) -> Prompt:
    """The prompt of a training record; ValueError starting with `where` for a bad record."""
    if is_preference(record):
        pair = to_pair(record, where)
        return messages.prompt_with(pair.prompt, pair.chosen.tools, pair.chosen.template_kwargs)
    return messages.prompt_of(record, where)


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    chat_template: str | None = None,
    where: str = "prompt",
    **rendering: Any,
) -> list[int]:
    """Token ids of `prompt` up to where the answer starts. Raises ValueError starting with `where` for an empty prompt,
    and for one that the chat template refuses. rendering: `date` and `vocab_size` of `Renderer`."""
    renderer = Renderer(tokenizer, chat_template, **rendering)
    if chat_template or tokenizer.chat_template:
        ids = renderer.prompt(asked(prompt, where))
    elif isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        renderer.check_ids(ids, where)
    else:
        raise ValueError(f"{where}: a list of chat messages, but the tokenizer has no chat template")
    if not ids:
        raise ValueError(f"{where} is empty")
    return ids
