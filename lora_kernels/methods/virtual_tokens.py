"""Learned tokens before every sequence: what prefix tuning and prompt tuning have in common.

The learned tensor is a submodule of the model, and hooks on the decoder (the part that makes hidden states of token
ids) put it in front. So the model keeps its class, `generate` and trainers call it as before, and its outputs have one
position for each real token. The virtual tokens are seen by every real one, and real tokens are numbered from
num_virtual_tokens on, without counting the padding where an attention mask shows it. A row is one sequence: packed rows
are not supported. In layers with a sliding window the virtual tokens are the oldest, and leave the window first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_kernels.arguments import check_integer
from lora_kernels.methods.heads import task_heads
from lora_kernels.nn.wrappers import bare

# Lester et al. sample the initial tokens among their 5000 most common ones; vocabularies are sorted about that way.
COMMON_TOKENS = 5000
# What a decoder calls its key-value cache: transformers from 5.24 on, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values")


@dataclass
class VirtualTokensConfig:
    """num_virtual_tokens >= 1, init one of `INITS`, init_text with init="text" only. ValueError names what is wrong."""

    num_virtual_tokens: int = 20
    init: str = "vocab"
    init_text: str | None = None

    INITS: ClassVar[tuple[str, ...]] = ("vocab", "text", "random")

    def __post_init__(self) -> None:
        check_integer("num_virtual_tokens", self.num_virtual_tokens, 1)
        if self.init not in self.INITS:
            raise ValueError(f"init is {self.init!r}; allowed: {', '.join(self.INITS)}")
        if self.init == "text" and not self.init_text:
            raise ValueError('init is "text" and init_text is empty; allowed: the text to start from')
        if self.init != "text" and self.init_text is not None:
            raise ValueError(f'init_text is {self.init_text!r} and init is {self.init!r}; init_text needs init="text"')


def cache_argument(forward: Callable, names: Sequence[str] = CACHE_ARGUMENTS) -> str | None:
    """The name by which `forward` takes a key-value cache, None if it takes none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in names if name in parameters), None)


def find_decoder(model: nn.Module) -> nn.Module:
    """The part of a transformers causal LM that makes hidden states of token ids; the model itself if there is none."""
    decoder = model.get_decoder()
    # transformers 4 doesn't find GPT-2's, nor any version Llama 4's, whose base_model_prefix names no part of it.
    others = (part for part in (model.base_model, *model.children()) if hasattr(part, "get_input_embeddings"))
    return decoder if decoder is not model else next((part for part in others if part is not model), model)


def decoder_of(model: nn.Module, num_virtual_tokens: int) -> nn.Module:
    """The decoder of a Hugging Face causal LM; ValueError if it isn't one or the tokens don't fit its context."""
    decoder = find_decoder(model) if hasattr(model, "get_decoder") and not any(task_heads(model)) else None
    config = getattr(model, "config", None)
    if decoder is None or getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"model is a {type(model).__name__}; allowed: a Hugging Face causal language model")
    # Mamba and its like keep a state, not keys and values.
    if cache_argument(decoder.forward) is None or getattr(model, "_is_stateful", False):
        raise ValueError(f"model is a {type(model).__name__}, which takes no key-value cache; allowed: one that does")
    context = context_length(model)
    if context is not None and num_virtual_tokens >= context:
        raise ValueError(
            f"num_virtual_tokens is {num_virtual_tokens}; allowed: less than the model's context of {context} tokens"
        )
    return decoder


def context_length(model: nn.Module) -> int | None:
    """How many positions the model was made for, if its config says so."""
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def learned_positions(model: nn.Module) -> int | None:
    """How many positions the model has an embedding for; None where it computes them, as with rotary ones."""
    decoder = find_decoder(model) if hasattr(model, "get_decoder") else model
    names = {name.rpartition(".")[2] for name, m in decoder.named_modules() if isinstance(m, nn.Embedding)}
    return context_length(model) if names & {"wpe", "embed_positions", "position_embeddings"} else None


def initial_ids(config: VirtualTokensConfig, model: nn.Module, tokenizer: Any) -> Tensor:
    """Token ids [n] of init "vocab" (drawn from torch's generator) or "text" (repeated or cut to n)."""
    n = config.num_virtual_tokens
    if config.init == "vocab":
        vocabulary = model.get_input_embeddings().weight.shape[0]
        return torch.randint(min(COMMON_TOKENS, vocabulary), (n,))
    if tokenizer is None:
        raise ValueError('init is "text" and tokenizer is None; pass inject the tokenizer that reads init_text')
    ids: Sequence[int] = tokenizer(config.init_text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"init_text {config.init_text!r} has no tokens")
    return torch.tensor(ids).repeat(-(-n // len(ids)))[:n]


class VirtualTokens(nn.Module):
    """`num_virtual_tokens` learned tokens before each sequence. Subclasses say what a token is, in `_put_in_front`."""

    def __init__(self, num_virtual_tokens: int) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.enabled = True

    def saved(self) -> Tensor:
        """The tensor that a file holds: what the tokens are, however they are parametrised."""
        raise NotImplementedError

    def attach(self, model: nn.Module, decoder: nn.Module) -> None:
        """Freezes the model but for this module, makes this `model.virtual_tokens`, and hooks it to the decoder."""
        model.requires_grad_(False)
        self._arguments = tuple(inspect.signature(decoder.forward).parameters)
        self.cache_argument = cache_argument(decoder.forward)
        decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        decoder.register_forward_hook(self._after)
        self.train(model.training)
        model.virtual_tokens = self

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self.enabled:
            return None
        kwargs = dict(zip(self._arguments, args, strict=False)) | kwargs
        inputs = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        batch, length = inputs.shape[:2]
        given = [kwargs.pop(name, None) for name in CACHE_ARGUMENTS]
        cache = kwargs[self.cache_argument] = next((cache for cache in given if cache is not None), None)
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"{self.cache_argument} is a {type(cache).__name__}; with virtual tokens allowed: DynamicCache"
            )
        seen = 0 if cache is None else int(cache.get_seq_length())
        self._make_room(kwargs, length, seen)
        self._put_in_front(decoder, kwargs, batch, first=seen == 0)
        return (), kwargs

    def _make_room(self, kwargs: dict[str, Any], length: int, seen: int) -> None:
        """Widens the attention mask and moves the positions of `length` new tokens behind `seen` cached ones."""
        n = self.num_virtual_tokens
        if 0 < seen < n:
            raise ValueError(
                f"{self.cache_argument} holds {seen} tokens, fewer than the {n} virtual ones: it isn't ours"
            )
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None:
            tokens = length + max(seen - n, 0)
            if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != tokens:
                found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"attention_mask is {found}; allowed with virtual tokens: [batch, {tokens}], one column for each "
                    "real token so far"
                )
            if positions is None and "position_ids" in self._arguments:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
            kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], n), mask], dim=1)
        if positions is not None:
            kwargs["position_ids"] = positions + n
        if kwargs.get("cache_position") is not None:  # transformers 4 also counts the cached tokens
            kwargs["cache_position"] = kwargs["cache_position"] + n

    def _put_in_front(self, decoder: nn.Module, kwargs: dict[str, Any], batch: int, first: bool) -> None:
        """Adds the virtual tokens to a call of the decoder; `first` where nothing is cached yet."""
        raise NotImplementedError

    def _after(self, decoder: nn.Module, args: tuple, output: Any) -> Any:
        raise NotImplementedError


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the `with` block the model has no virtual tokens. Nests."""
    tokens = bare(model).virtual_tokens
    enabled = tokens.enabled
    try:
        tokens.enabled = False
        yield model
    finally:
        tokens.enabled = enabled
