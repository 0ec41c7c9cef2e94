"""Prefix tuning (Li and Liang 2021): learned keys and values before those of the tokens, in every layer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_kernels.checks import check_integer
from lora_kernels.methods.modes import eval_mode
from lora_kernels.methods.virtual_tokens import (
    CACHE_ARGUMENTS,
    Place,
    VirtualTokens,
    VirtualTokensConfig,
    cache_argument,
    decoder_of,
    disabled,
    dynamic_cache,
    initial_ids,
    map_output,
    map_tokens,
    refusing,
    roll,
)
from lora_kernels.nn.wrappers import Model, bare, named_modules

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import Cache, DynamicCache

adapters_disabled = disabled
_RANDOM_STD = 0.02


@dataclass
class PrefixConfig(VirtualTokensConfig):
    """num_virtual_tokens learned keys and values before each sequence, in every layer; the model itself is frozen.

    Args:
        num_virtual_tokens: n >= 1, less than the model's context. Each takes a place of it, in every request.
        init: "vocab", the keys and values that the model computes for n tokens drawn from the first 5000 of the
            vocabulary; "text", those for init_text, repeated or cut to n, so that the model starts as if init_text came
            first; "random", normal with standard deviation 0.02; "zero". Zero is not the base model: a zero key has
            the attention logit 0, so a head whose other logits are s_j gives Σ e^s_j / (n + Σ e^s_j) of its output.
            And without mlp_hidden, zero tokens get equal gradients and stay equal: one token, counted n times.
        init_text: for init="text".
        mlp_hidden: the width of the reparametrisation P = P_start + MLP(E), with E [n, d] learned and
            MLP(z) = W₂ tanh(W₁ z + b₁) + b₂, W₂ = b₂ = 0 at the start; None learns P itself. (The paper has no
            P_start.) Only P is saved.

    Raises ValueError naming the argument that is out of range.
    """

    mlp_hidden: int | None = None

    INITS = ("vocab", "text", "random", "zero")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_hidden is not None:
            check_integer("mlp_hidden", self.mlp_hidden, 1)


class PrefixKeyValues(VirtualTokens):
    """P [n, layers · 2 · heads · head_dim], float32 (float64 for a float64 model): keys, then values, layer by layer.

    The keys stand in the cache as they are, after any rotation by position. Without a cache to fill, in training, the
    layers read P from a cache that stores nothing, so activation checkpointing can recompute them.
    """

    def __init__(self, start: Tensor, layers: int, heads: int, mlp_hidden: int | None = None) -> None:
        super().__init__(start.shape[0])
        self.layers, self.heads, self.head_dim = layers, heads, start.shape[1] // (2 * layers * heads)
        self.mlp = None
        if mlp_hidden is None:
            self.key_values = nn.Parameter(start)
        else:
            width = heads * self.head_dim
            like: dict[str, Any] = {"device": start.device, "dtype": start.dtype}
            self.register_buffer("start", start)
            self.embeddings = nn.Parameter(torch.randn(start.shape[0], width, **like))
            last = nn.Linear(mlp_hidden, start.shape[1], **like)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlp = nn.Sequential(nn.Linear(width, mlp_hidden, **like), nn.Tanh(), last)
        self._read_only = self._filled = self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        # What the last forward pass computed can't be copied, and isn't part of the state.
        return self.__dict__ | {"_read_only": None, "_filled": None, "_kept": None}

    def saved(self) -> Tensor:
        return self.key_values if self.mlp is None else self.start + self.mlp(self.embeddings)

    def attach(self, model: Model, decoder: Model) -> None:
        if not _attention_modules(decoder):
            raise ValueError(f"model is a {type(model).__name__}; allowed: one whose attention layers take a cache")
        if _keys_count_padding(model, decoder):
            raise ValueError(
                f"model is a {type(model).__name__}, whose cached keys depend on the padding before a token; "
                "allowed: one that takes position_ids or whose keys have no position; or try PromptConfig"
            )
        super().attach(model, decoder)

    def _hooks(self, decoder: Model) -> list[tuple[nn.Module, RemovableHandle]]:
        attentions = _attention_modules(decoder)
        self._attention_argument = next(iter(attentions.values()))
        hooks = [
            (module, module.register_forward_pre_hook(self._before_attention, with_kwargs=True))
            for module in attentions
        ]
        return super()._hooks(decoder) + hooks

    def _put_in_front(self, decoder: Model, kwargs: dict[str, Any], place: Place) -> None:
        """Lets the rows begin at column 0, behind the prefix; `_after` puts rows and cache back behind the padding."""
        from transformers import DynamicCache

        from lora_kernels.methods.read_only_cache import ReadOnlyCache

        dtype = decoder.get_input_embeddings().weight.dtype
        # [n, 2 layers, heads, head_dim] -> a [1, heads, n, head_dim] for each key and value
        states = self.saved().to(dtype).unflatten(1, (2 * self.layers, self.heads, self.head_dim))
        states = states.permute(1, 2, 0, 3).unsqueeze(1).unbind()
        pairs = list(zip(states[::2], states[1::2], strict=True))
        self._read_only = _fill(ReadOnlyCache(), pairs)
        self._kept = kwargs[self.cache_argument]
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = decoder.config.use_cache and not decoder.training
        if self._kept is None and use_cache:
            self._kept = dynamic_cache(decoder)
        self._filled = self._read_only
        if self._kept is not None:
            rows = [[state.expand(place.batch, -1, -1, -1) for state in pair] for pair in pairs]
            self._filled = _fill(DynamicCache(), rows)
        kwargs |= {self.cache_argument: self._filled, "use_cache": self._kept is not None}
        if place.starts is not None:
            for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "attention_mask"):
                if (value := kwargs.get(name)) is not None:
                    kwargs[name] = roll(value.expand(place.batch, *value.shape[1:]), -place.starts)

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        # Under activation checkpointing transformers takes the cache away from the layers, lest the recomputation
        # writes to it a second time.
        if self.enabled and kwargs.get(self._attention_argument) is None:
            kwargs = kwargs | {self._attention_argument: self._read_only}
        return args, kwargs

    def _after(self, decoder: Model, args: tuple, output: Any) -> Any:
        """Moves the rows back behind their padding, there and in the cache that the caller keeps."""
        if not self.enabled or not self._place.first:
            return output
        batch, starts, filled, kept = self._place.batch, self._place.starts, self._filled, self._kept
        self._filled = self._kept = None

        def back(states: Tensor, dim: int) -> Tensor:
            return states if starts is None else roll(states, starts, dim)

        def changed(item: Any) -> Any:
            if item is filled:
                return kept
            item = map_tokens(item, batch, back)
            return back(item, 3) if isinstance(item, Tensor) and item.ndim == 4 else item  # columns of attentions

        if kept is not None:
            _fill(kept, [(back(layer.keys, 2), back(layer.values, 2)) for layer in filled.layers])
        return map_output(output, changed)


def _attention_modules(decoder: Model) -> dict[nn.Module, str]:
    """The innermost modules of layers whose forward takes a cache, and the argument's name."""
    found = {}
    for _, module in named_modules(decoder):
        name = cache_argument(module.forward, (*CACHE_ARGUMENTS, "layer_past"))
        if name:
            found[module] = name
    outer = {module for module in found if any(inner in found for inner in module.modules() if inner is not module)}
    return {module: name for module, name in found.items() if module not in outer}


def _fill(cache: Cache, pairs: list[tuple[Tensor, Tensor]]) -> Cache:
    from transformers import Cache

    for index, (key, value) in enumerate(pairs):
        # Not the update of ReadOnlyCache, which would forget them.
        Cache.update(cache, key, value, index)
    return cache


def inject(model: nn.Module, config: PrefixConfig, tokenizer: Any = None) -> nn.Module:
    """Puts PrefixKeyValues before the keys and values of `model`, a causal LM, and freezes everything else.

    `tokenizer` is for init="text". Returns the model. Raises ValueError, with the model unchanged, if it isn't a
    decoder-only LM of transformers whose layers cache keys and values of one shape, if padding before a token changes
    its keys, or if config doesn't fit it; a short run of the decoder at the end shows the rest.
    """
    given, model = model, bare(model, adding=True)
    decoder = decoder_of(model, config.num_virtual_tokens)
    from_tokens = config.init in ("vocab", "text")
    ids = initial_ids(config, model, tokenizer) if from_tokens else None
    computed = computed_key_values(model, decoder, config.num_virtual_tokens, ids)
    start, layers, heads = flatten(computed)
    if config.init == "random":
        start = torch.randn_like(start) * _RANDOM_STD
    elif config.init == "zero":
        start = torch.zeros_like(start)
    PrefixKeyValues(start, layers, heads, config.mlp_hidden).attach(model, decoder)
    model.adapter_config = config
    return given


def computed_key_values(model: Model, decoder: Model, n: int, ids: Tensor | None = None) -> list[Tensor]:
    """The keys and values [1, heads, n, head_dim] of each layer in turn for `ids` [n], by default n times token 0.

    Asking the model is the way to know their shapes that doesn't depend on how its config names things.
    """
    ids = torch.zeros(n, dtype=torch.long) if ids is None else ids
    cache = _cached(model, decoder, ids[None])
    states: list[Any] = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    shapes = {None if state is None else tuple(state.shape) for state in states}
    if len(shapes) != 1 or None in shapes:
        raise ValueError(
            f"model is a {type(model).__name__} whose layers cache {sorted(map(str, shapes))}; "
            "prefix tuning needs keys and values of one shape in every layer"
        )
    if states[0].shape[2] != n:
        raise ValueError(
            f"model is a {type(model).__name__}, which caches {states[0].shape[2]} keys for {n} tokens; allowed: "
            "one for each"
        )
    return states


def _cached(model: Model, decoder: Model, ids: Tensor, mask: Tensor | None = None) -> DynamicCache:
    """What the decoder caches for `ids` [B, n]."""
    from transformers import DynamicCache

    cache = DynamicCache()  # without the model's config it keeps what a sliding window would drop
    device = decoder.get_input_embeddings().weight.device
    kwargs: dict[Any, Any] = {"input_ids": ids.to(device), cache_argument(decoder.forward): cache, "use_cache": True}
    if mask is not None:
        kwargs["attention_mask"] = mask.to(device)
    with torch.no_grad(), refusing(model), eval_mode(decoder):
        decoder(**kwargs)
    return cache


def _keys_count_padding(model: Model, decoder: Model) -> bool:
    """Whether padding on a row's left changes its keys, as RoFormer's, which are rotated by column.

    Such keys can't be moved behind the padding, where `_after` puts them.
    """
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        return False
    # The first layer's keys of a row's first token, which depend on nothing else but its position.
    mask = torch.tensor([[0, 1], [1, 1]])
    keys = _cached(model, decoder, torch.ones_like(mask), mask).layers[0].keys.float()
    padded, alone = keys[0, :, 1], keys[1, :, 0]
    # Rounding to 16 bits changes them by less than 1 %.
    return bool((padded - alone).abs().mean() > 0.02 * alone.abs().mean())


def flatten(states: list[Tensor]) -> tuple[Tensor, int, int]:
    """P of keys and values [1, heads, n, head_dim] layer by layer, and the numbers of layers and heads."""
    stacked = torch.cat(states)
    dtype = torch.promote_types(stacked.dtype, torch.float32)
    return stacked.permute(2, 0, 1, 3).flatten(1).to(dtype), len(states) // 2, stacked.shape[1]


def merge(model: nn.Module) -> nn.Module:
    """Raises ValueError: there is nothing in the weights to merge into."""
    raise ValueError("prefix tuning can't be merged: its keys and values are no change of the weights")
