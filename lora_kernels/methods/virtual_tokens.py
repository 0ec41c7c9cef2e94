"""Learned tokens before every sequence: what prefix tuning and prompt tuning have in common.

The learned tensor is a submodule of the model, and hooks on the decoder (the part that makes hidden states of token
ids) put it in front. So the model keeps its class, `generate` and trainers call it as before, and its outputs have one
position for each real token. The virtual tokens are seen by every real one, and real tokens are numbered from
num_virtual_tokens on, without counting the padding where an attention mask shows it. In a row with padding on the left
the virtual tokens stand between the padding and the text, so that padding changes no distance between tokens, which
sliding windows and biases by distance look at. A row is one sequence: packed rows are not supported. In layers with a
sliding window the virtual tokens are the oldest, and leave the window first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lora_kernels.checks import check_integer
from lora_kernels.methods.heads import task_heads
from lora_kernels.methods.modes import eval_mode
from lora_kernels.nn.wrappers import Model, bare, named_modules, unwrapped

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import DynamicCache

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


def find_decoder(model: Any) -> Model:
    """The part of a transformers causal LM that makes hidden states of token ids; the model itself if there is none."""
    decoder = model.get_decoder()
    # transformers 4 doesn't find GPT-2's, nor any version Llama 4's, whose base_model_prefix names no part of it.
    others = (part for part in (model.base_model, *model.children()) if hasattr(part, "get_input_embeddings"))
    return decoder if decoder is not model else next((part for part in others if part is not model), model)


def decoder_of(model: Model, num_virtual_tokens: int) -> Model:
    """The decoder of a Hugging Face causal LM; ValueError if it isn't one or the tokens don't fit its context."""
    fits = hasattr(model, "get_decoder") and (model.get_output_embeddings() is not None or not any(task_heads(model)))
    decoder = unwrapped(find_decoder(model)) if fits else None
    config = getattr(model, "config", None)
    if decoder is None or getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"model is a {type(model).__name__}; allowed: a Hugging Face causal language model")
    # Mamba and its like keep a state, not keys and values.
    if cache_argument(decoder.forward) is None or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"model is a {type(model).__name__}, which takes no key-value cache for all of its layers; allowed: one "
            "that does"
        )
    parts = {name.rpartition(".")[2]: part for name, part in named_modules(decoder)}
    if "encoder_attn" in parts:
        raise ValueError(
            f"model is a {type(model).__name__}, the decoder of an encoder-decoder model, whose positions count "
            "padding; allowed: a decoder-only model"
        )
    # RoBERTa and its like number their tokens from the padding token's id on, by rules of their own.
    if getattr(parts.get("position_embeddings"), "padding_idx", None) is not None:
        raise ValueError(
            f"model is a {type(model).__name__}, whose positions depend on the padding token; allowed: one whose first "
            "token has position 0"
        )
    context = context_length(model)
    if context is not None and num_virtual_tokens >= context:
        raise ValueError(
            f"num_virtual_tokens is {num_virtual_tokens}; allowed: less than the model's context of {context} tokens"
        )
    return decoder


def context_length(model: Any) -> int | None:
    """How many positions the model was made for, if its config says so."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def learned_positions(model: Any) -> int | None:
    """How many positions the model has an embedding for; None where it computes them, as with rotary ones."""
    decoder = find_decoder(model) if hasattr(model, "get_decoder") else model
    names = {name.rpartition(".")[2] for name, m in decoder.named_modules() if isinstance(m, nn.Embedding)}
    return context_length(model) if names & {"wpe", "embed_positions", "position_embeddings"} else None


def dynamic_cache(decoder: Model) -> DynamicCache:
    from transformers import DynamicCache

    return DynamicCache(config=decoder.config)


def initial_ids(config: VirtualTokensConfig, model: Model, tokenizer: Any) -> Tensor:
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

    def attach(self, model: Model, decoder: Model) -> None:
        """Freezes the model but for this module, makes this `model.virtual_tokens`, and hooks it to the decoder.

        Raises ValueError, with the model unchanged, if the decoder can't work with the virtual tokens.
        """
        self._arguments = tuple(inspect.signature(decoder.forward).parameters)
        self.cache_argument = next(name for name in CACHE_ARGUMENTS if name in self._arguments)
        hooks = self._hooks(decoder)
        try:
            with refusing(model):
                self._try(decoder)
        except ValueError:
            for _, handle in hooks:
                handle.remove()
            raise
        for module, _ in hooks:
            mark_hooked(module, type(self))
        model.requires_grad_(False)
        self.train(model.training)
        model.virtual_tokens = self

    def _hooks(self, decoder: Model) -> list[tuple[nn.Module, RemovableHandle]]:
        """Registers the hooks; the modules that have them and the handles to remove them."""
        return [
            (decoder, decoder.register_forward_pre_hook(self._before, with_kwargs=True)),
            (decoder, decoder.register_forward_hook(self._after)),
        ]

    @torch.no_grad()
    def _try(self, decoder: Model) -> None:
        """Runs the decoder on rows with padding, then on one token more with the cache: what it refuses shows here."""
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]], device=decoder.get_input_embeddings().weight.device)
        ids, cache = torch.zeros_like(mask), dynamic_cache(decoder)
        arguments = {self.cache_argument: cache, "use_cache": True}
        with eval_mode(decoder):
            decoder(input_ids=ids[:, :2], attention_mask=mask[:, :2], **arguments)
            decoder(input_ids=ids[:, 2:], attention_mask=mask, **arguments)

    def _before(self, decoder: Model, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
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
        self._place = self._placed(kwargs, batch, length, seen)
        if self._place.first:
            self._put_in_front(decoder, kwargs, self._place)
        return (), kwargs

    def _placed(self, kwargs: dict[str, Any], batch: int, length: int, seen: int) -> Place:
        """Widens the attention mask and moves the positions of `length` new tokens behind `seen` cached ones."""
        n = self.num_virtual_tokens
        if 0 < seen < n:
            raise ValueError(
                f"{self.cache_argument} holds {seen} tokens, fewer than the {n} virtual ones: it isn't ours"
            )
        before = max(seen - n, 0)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        starts = None
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != before + length:
                found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"attention_mask is {found}; allowed with virtual tokens: [batch, {before + length}], one column "
                    "for each real token so far"
                )
            if positions is None and "position_ids" in self._arguments:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
            starts = (mask.cumsum(1) == 0).sum(1)
            # Single tokens, those of generation, need no look at the mask's values, for which a GPU would be waited.
            if before and length > 1 and (starts > before).any():
                raise ValueError(
                    f"attention_mask has a row with nothing but padding in its first {before} tokens, which are in the "
                    f"{self.cache_argument}; allowed with virtual tokens: a token of each row in the first call"
                )
            kwargs["attention_mask"] = insert(mask.new_ones(len(mask), n), mask, starts)
        if positions is not None:
            kwargs["position_ids"] = positions + n
        if kwargs.get("cache_position") is not None:  # transformers 4 also counts the cached tokens
            kwargs["cache_position"] = kwargs["cache_position"] + n
        return Place(batch, length, seen == 0, starts)

    def _put_in_front(self, decoder: Model, kwargs: dict[str, Any], place: Place) -> None:
        """Adds the virtual tokens to the first call of the decoder, when nothing is cached yet."""
        raise NotImplementedError

    def _after(self, decoder: Model, args: tuple, output: Any) -> Any:
        raise NotImplementedError


@contextmanager
def refusing(model: nn.Module) -> Iterator[None]:
    """Makes whatever the model raises a ValueError that says that it is the model's."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"model is a {type(model).__name__}, whose decoder doesn't run with virtual tokens: "
            f"{type(error).__name__}: {error}"
        ) from error


@dataclass
class Place:
    """Where a call of `length` tokens in `batch` rows has its virtual tokens: before column starts[b] of row b.

    starts: int64 [batch], how many columns of padding a row has on its left; None for a call without a mask.
    """

    batch: int
    length: int
    first: bool
    starts: Tensor | None


def take(tensor: Tensor, columns: Tensor, dim: int = 1) -> Tensor:
    """tensor [B, ..] with columns[b, i] as column i, along `dim`, of row b."""
    shape = [1] * tensor.ndim
    shape[0], shape[dim] = columns.shape
    return tensor.take_along_dim(columns.view(shape), dim)


def roll(tensor: Tensor, shifts: Tensor, dim: int = 1) -> Tensor:
    """tensor [B, ..] with row b moved shifts[b] columns to the right along `dim`, the last columns to the front."""
    width = tensor.shape[dim]
    return take(tensor, (torch.arange(width, device=tensor.device) - shifts[:, None]) % width, dim)


def insert(front: Tensor, rest: Tensor, starts: Tensor | None) -> Tensor:
    """`rest` [B, T, ..] with `front` [B, n, ..] before column starts[b] of row b; None means 0."""
    both = torch.cat([front, rest], 1)
    if starts is None:
        return both
    n, column = front.shape[1], torch.arange(both.shape[1], device=both.device)
    inside = column - starts[:, None]
    return take(both, torch.where(inside < 0, column + n, torch.where(inside < n, inside, column)))


def map_output(output: Any, change: Callable[[Any], Any]) -> Any:
    """A decoder's output with change(item) for each tensor and cache in it; without those that become None."""

    def changed(item: Any) -> Any:
        return tuple(map(changed, item)) if isinstance(item, tuple) else change(item)

    if isinstance(output, tuple):
        return tuple(item for item in changed(output) if item is not None)
    return type(output)(**{name: changed(value) for name, value in output.items()})


def map_tokens(item: Any, batch: int, change: Callable[[Tensor, int], Tensor]) -> Any:
    """change(item, the dimension of tokens), where item is a tensor.

    Hidden states are [batch, T, hidden], attentions [batch, heads, T, columns], router logits [batch · T, experts].
    """
    if not isinstance(item, Tensor) or item.ndim < 2 or item.shape[:-1] == (batch,):
        return item
    if item.ndim == 2:
        return change(item.unflatten(0, (batch, -1)), 1).flatten(0, 1)
    return change(item, item.ndim - 2)


def mark_hooked(module: nn.Module, by: type) -> None:
    """Gives `module` a class for those with hooks, which differs from the present one in nothing.

    torch.compile runs what it compiled for a module of the same class without looking at hooks, but looks at the class.
    """
    kind: type = type(module)
    if kind.__dict__.get("hooked_by") is not by:
        module.__class__ = _hooked_class(kind, by)


@functools.cache
def _hooked_class(kind: Any, by: type) -> Any:
    """A subclass of `kind` with its names; one that is copied and pickled by the two arguments."""

    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _new_hooked, (kind, by), *kind.__reduce_ex__(self, protocol)[2:]

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names | {"__reduce_ex__": reduce, "hooked_by": by})


def _new_hooked(kind: type, by: type) -> nn.Module:
    cls = _hooked_class(kind, by)
    return cls.__new__(cls)


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
