"""Batched text generation for a causal LM, with or without adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_kernels.data.chat import Renderer
from lora_kernels.data.messages import Conversation, Prompt, message
from lora_kernels.data.prompts import encode_prompt
from lora_kernels.methods.modes import eval_mode
from lora_kernels.methods.virtual_tokens import learned_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    A prompt is the text of one user turn, a list of chat messages ({"role", "content"}), or {"messages", "tools"}. It
    is rendered with `chat_template`, else the tokenizer's own; a tokenizer without one gets the text as it is, and
    messages are then refused. Prompts of like length share a batch, padded on the left, and the KV cache is on.
    `temperature` 0 is greedy; above 0 samples from torch's global generator, among the tokens that hold the first
    `top_p` of the probability.

    The model's training mode and the tokenizer's padding side are as before afterwards.
    Raises ValueError for a limit out of range, and where a prompt and its answer exceed the positions that the model
    has learned.
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

    vocab_size = model.get_input_embeddings().weight.shape[0]
    rows = [encode_prompt(tokenizer, prompt, chat_template, vocab_size=vocab_size) for prompt in prompts]
    longest, positions = max(map(len, rows), default=0), learned_positions(model)
    virtual = getattr(getattr(model, "virtual_tokens", None), "num_virtual_tokens", 0)
    # The last token is not read.
    if positions is not None and virtual + longest + max_new_tokens - 1 > positions:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}; with the longest prompt of {longest} tokens and {virtual} virtual "
            f"ones that exceeds the {positions} positions that the model has learned"
        )
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}

    stops = sorted(stop_tokens(model, tokenizer, chat_template))
    answers = [""] * len(rows)
    device = model.get_input_embeddings().weight.device
    with eval_mode(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(rows[batch[-1]])
            # Padding is token 0, which every model has, and which nothing looks at.
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)
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
                    pad_token_id=stops[0] if stops else 0,
                    eos_token_id=stops or None,
                    use_cache=True,
                    **sampling,
                )
            for index, row in zip(batch, output[:, width:].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in stops), None)
                answers[index] = tokenizer.decode(row[:end], skip_special_tokens=True)
    return answers


def stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> set[int]:
    """Ids that end an answer: the tokenizer's end token, those that the model's generation config names, and what the
    chat template puts after an answer, which is what training teaches: base models know of it only by their template.
    """
    own = model.generation_config.eos_token_id
    named = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, turn_end(tokenizer, chat_template)}
    return named - {None}


def turn_end(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> int | None:
    """The special token with which `chat_template`, else the tokenizer's own, ends an answer, if it has one."""
    if not (chat_template or tokenizer.chat_template):
        return None
    renderer = Renderer(tokenizer, chat_template)
    try:
        text, _ = renderer.spans(Conversation([message("user", "a"), message("assistant", "b")], (1,), "chat template"))
    except ValueError:
        # It refuses such a conversation, or shows it in another way, as training would say.
        return None
    end = next((end for end in renderer.ends if text.endswith(end)), None)
    return None if end is None else tokenizer.convert_tokens_to_ids(end)


def stop_at_turn_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the model's generation config, which is saved with it, name all that ends an answer."""
    stops = sorted(stop_tokens(model, tokenizer))
    if stops:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
