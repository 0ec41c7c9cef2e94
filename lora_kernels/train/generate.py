"""Batched text generation for a causal LM, with or without adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[dict[str, str]]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat_template: str | None = None,
) -> list[str]:
    """Answers to `prompts`, in their order, without special tokens.

    A prompt is the text of one user turn, or a list of chat messages ({"role", "content"}). It is rendered with
    `chat_template`, else the tokenizer's own; a tokenizer without one gets the text as it is, and messages are then
    refused. Prompts of like length share a batch, padded on the left, and the KV cache is on. `temperature` 0 is
    greedy; above 0 samples from torch's global generator, among the tokens that hold the first `top_p` of the
    probability.

    The model's training mode and the tokenizer's padding side are as before afterwards.
    Raises ValueError for a limit out of range, or a tokenizer with neither a pad token nor an end token.
    """
    import torch

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_token_id is None:
        raise ValueError("tokenizer has neither a pad token nor an end token")

    rows = [encode_prompt(tokenizer, prompt, chat_template) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}

    stops = sorted(stop_tokens(model, tokenizer))
    answers = [""] * len(rows)
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(rows[batch[-1]])
            input_ids = torch.full((len(batch), width), pad_token_id, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for row, index in enumerate(batch):
                length = len(rows[index])
                input_ids[row, width - length :] = torch.tensor(rows[index])
                attention_mask[row, width - length :] = 1
            with torch.inference_mode():
                output = model.generate(
                    input_ids=input_ids.to(device),
                    attention_mask=attention_mask.to(device),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad_token_id,
                    eos_token_id=stops or None,
                    use_cache=True,
                    **sampling,
                )
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
    finally:
        model.train(was_training)
    return answers


def read_prompts(path: Path) -> list[tuple[Prompt, Any]]:
    """(prompt, record) of a text file with a prompt a line (record None), or of a file of training records.

    A record's last answer is left out, or both of a preference pair; {"prompt"} alone is also taken. Raises
    FileNotFoundError, and ValueError that names file and line for a bad record.
    """
    from lora_kernels.train.data import SUFFIXES, load_records

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name.endswith(SUFFIXES):
        return [(prompt_of(record, where), record) for record, where in load_records(path)]
    return [(line, None) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prompt_of(record: Any, where: str) -> Prompt:
    """The prompt of a training record; ValueError starting with `where` for a bad record."""
    from lora_kernels.train.data import to_conversation
    from lora_kernels.train.preference import is_preference, to_pair

    if is_preference(record):
        messages = to_pair(record, where).prompt
    else:
        if isinstance(record, dict) and "prompt" in record:
            record = {"completion": "", **record}
        conversation = to_conversation(record, where)
        messages = conversation.messages[: conversation.answers[-1]]
    alone = len(messages) == 1 and messages[0]["role"] == "user"
    return messages[0]["content"] if alone else messages


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer. Chat models end a turn with a token of their own, which their generation config names."""
    own = model.generation_config.eos_token_id
    return (set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}) - {None}


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat_template: str | None = None) -> list[int]:
    """Token ids of `prompt` up to where the answer starts. Raises ValueError for an empty prompt."""
    if chat_template or tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
    elif isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
    else:
        raise ValueError("a prompt is a list of chat messages, but the tokenizer has no chat template")
    if not ids:
        raise ValueError("a prompt is empty")
    return ids
