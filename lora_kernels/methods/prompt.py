"""Prompt tuning (Lester et al. 2021): learned input embeddings before those of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.methods.virtual_tokens import (
    COMMON_TOKENS,
    Place,
    VirtualTokens,
    VirtualTokensConfig,
    decoder_of,
    disabled,
    initial_ids,
    insert,
    map_output,
    map_tokens,
    take,
)
from lora_kernels.nn.wrappers import Model, bare

adapters_disabled = disabled


@dataclass
class PromptConfig(VirtualTokensConfig):
    """num_virtual_tokens learned embeddings before each sequence; the model itself is frozen.

    Args:
        num_virtual_tokens: n >= 1, less than the model's context. Each takes a place of it, in every request.
        init: "vocab", embeddings of tokens drawn from the first 5000 of the vocabulary (about the most common ones);
            "text", those of init_text, repeated or cut to n, so that the model starts as if init_text came first;
            "random", normal with the standard deviation of the embedding table, which trains worst in the paper.
        init_text: for init="text".

    Needs a far larger learning rate than LoRA. Raises ValueError naming the argument that is out of range.
    """


class PromptEmbeddings(VirtualTokens):
    """`embeddings` [n, hidden], float32 (float64 for a float64 model), cast to the tokens' dtype where used."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(start.shape[0])
        self.embeddings = nn.Parameter(start)

    def saved(self) -> Tensor:
        return self.embeddings

    def _put_in_front(self, decoder: Model, kwargs: dict[str, Any], place: Place) -> None:
        ids = kwargs.pop("input_ids", None)
        tokens = kwargs["inputs_embeds"] if ids is None else decoder.get_input_embeddings()(ids)
        prompt = self.embeddings.to(tokens.dtype).expand(place.batch, -1, -1)
        kwargs["inputs_embeds"] = insert(prompt, tokens, place.starts)
        own = torch.arange(self.num_virtual_tokens, device=tokens.device)
        if (positions := kwargs.get("position_ids")) is not None:
            positions = positions.expand(place.batch, -1)
            kwargs["position_ids"] = insert(own.expand(place.batch, -1), positions, place.starts)
        if (positions := kwargs.get("cache_position")) is not None:
            kwargs["cache_position"] = torch.cat([own, positions])

    def _after(self, decoder: Model, args: tuple, output: Any) -> Any:
        """Drops the hidden states of the virtual tokens, so that there is one for each real token."""
        if not self.enabled or not self._place.first:
            return output
        n, length, starts = self.num_virtual_tokens, self._place.length, self._place.starts

        def real(states: Tensor, dim: int) -> Tensor:
            if starts is None:
                return states.narrow(dim, n, length)
            column = torch.arange(length, device=states.device)
            return take(states, torch.where(column < starts[:, None], column, column + n), dim)

        return map_output(output, lambda item: map_tokens(item, self._place.batch, real))


def inject(model: nn.Module, config: PromptConfig, tokenizer: Any = None) -> nn.Module:
    """Puts PromptEmbeddings before the inputs of `model`, a causal LM, and freezes everything else.

    `tokenizer` is for init="text". Returns the model. Raises ValueError, with the model unchanged, if it isn't a
    decoder-only LM of transformers with a key-value cache, if its layers look tokens up by id, or if config doesn't fit
    it; a short run of the decoder at the end shows the rest.
    """
    given, model = model, bare(model, adding=True)
    decoder = decoder_of(model, config.num_virtual_tokens)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        if config.init == "random":
            known = embed(torch.arange(min(COMMON_TOKENS, embed.weight.shape[0]), device=embed.weight.device)).float()
            start = torch.randn(config.num_virtual_tokens, known.shape[1], device=known.device) * known.std()
        else:
            start = embed(initial_ids(config, model, tokenizer).to(embed.weight.device))
    attach(model, decoder, start)
    model.adapter_config = config
    return given


def attach(model: Model, decoder: Model, start: Tensor) -> None:
    """PromptEmbeddings with the values `start` [n, hidden] at `model`."""
    if getattr(decoder.config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"model is a {type(model).__name__} with hidden_size_per_layer_input, whose layers look tokens up by id, "
            "and a virtual token has none; allowed: a model without"
        )
    dtype = torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)
    PromptEmbeddings(start.to(dtype, copy=True)).attach(model, decoder)


def merge(model: nn.Module) -> nn.Module:
    """Raises ValueError: there is nothing in the weights to merge into."""
    raise ValueError("prompt tuning can't be merged: its virtual tokens are inputs, not a change of the weights")
