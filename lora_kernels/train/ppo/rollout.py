"""Answers sampled from the policy with a KV cache, and the batches in which they are scored and learned."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.methods.virtual_tokens import cache_argument
from lora_kernels.ops.cross_entropy import IGNORE_INDEX
from lora_kernels.ops.frozen_linear import frozen_linear
from lora_kernels.train.causal_lm import AnswerLoss


@dataclass
class Episode:
    """One prompt and its sampled answer, as token ids.

    The response ends with the stop token where `ended` is True, else it was cut at max_new_tokens. logprobs, entropies:
    of each of its tokens under softmax(logits / temperature), as the sampler computed them.
    """

    prompt: Sequence[int]
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    ended: bool = False


@dataclass
class EpisodeBatch:
    """Episodes as tensors: prompts padded on the left to P tokens, responses on the right to L.

    input_ids, attention_mask, position_ids: int64 [B, P + L]; labels: int64 [B, L], -100 past the response; lengths:
    int64 [B], tokens of each response.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    lengths: Tensor


def collate(episodes: Sequence[Episode], device: torch.device | str = "cpu") -> EpisodeBatch:
    """The episodes as one batch, no wider than they need. What pads is never looked at: masks come from lengths."""
    left = max(len(episode.prompt) for episode in episodes)
    lengths = np.array([len(episode.response) for episode in episodes], dtype=np.int64)
    shape = len(episodes), left + int(lengths.max())
    input_ids, attention_mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels = np.full((shape[0], shape[1] - left), IGNORE_INDEX, dtype=np.int64)
    for row, episode in enumerate(episodes):
        start, end = left - len(episode.prompt), left + len(episode.response)
        input_ids[row, start:end] = [*episode.prompt, *episode.response]
        attention_mask[row, start:end] = 1
        labels[row, : len(episode.response)] = episode.response
    positions = (attention_mask.cumsum(1) - 1).clip(min=0)
    arrays = (input_ids, attention_mask, positions, labels, lengths)
    return EpisodeBatch(*(torch.from_numpy(array).to(device) for array in arrays))


def micro_batches(order: Sequence[int], minibatches: int, batch_size: int) -> list[list[Sequence[int]]]:
    """`order` cut into as many minibatches, of like size, none empty, and each of them into micro-batches."""
    size, larger = divmod(len(order), minibatches)
    cut, start = [], 0
    for index in range(minibatches):
        end = start + size + (index < larger)
        if end > start:
            cut.append([order[at : min(at + batch_size, end)] for at in range(start, end, batch_size)])
        start = end
    return cut


@torch.no_grad()
def sample(
    lm: AnswerLoss,
    prompts: Sequence[Sequence[int]],
    stop_tokens: Collection[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Episode]:
    """One answer to each of the prompts (token ids, none empty), all in one batch.

    Token t is drawn from softmax(logits / temperature), cut to the top_k likeliest (0: all) and of these to the fewest
    that hold top_p of the probability; it ends the answer where it is one of stop_tokens. Logits are
    softcap(scale * lm_head(hidden)), as in `lm`. A row that has ended leaves the batch and the KV cache. The module
    must be in eval mode, and what is drawn depends on nothing but `generator` and the arguments.
    """
    from transformers import DynamicCache

    decoder, head = lm.parts
    device = head.weight.device
    batch = collate([Episode(prompt) for prompt in prompts], device)
    episodes = [Episode(prompt) for prompt in prompts]
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=device)
    going = list(range(len(prompts)))
    ids, mask, positions = batch.input_ids, batch.attention_mask, batch.position_ids
    cache, cache_name = DynamicCache(config=decoder.config), cache_argument(decoder.forward)
    for _ in range(max_new_tokens):
        arguments: dict[Any, Any] = {cache_name: cache, "use_cache": True}
        arguments |= {"attention_mask": mask, "position_ids": positions}
        hidden = decoder(input_ids=ids, **arguments).last_hidden_state[:, -1]
        logits = frozen_linear(hidden.to(head.weight.dtype), head.weight, head.bias).float() * lm.logit_scale
        if lm.logit_softcap is not None:
            logits = lm.logit_softcap * torch.tanh(logits / lm.logit_softcap)
        logprobs = torch.log_softmax(logits / temperature, -1)
        tokens = _draw(logprobs, top_k, top_p, generator)
        ended = torch.isin(tokens[:, 0], stops)
        drawn = torch.stack([logprobs.gather(1, tokens)[:, 0], -(logprobs.exp() * logprobs).sum(1)], 1).tolist()
        ends = ended.tolist()
        for index, token, (logprob, entropy), end in zip(going, tokens[:, 0].tolist(), drawn, ends, strict=True):
            episode = episodes[index]
            episode.response.append(token)
            episode.logprobs.append(logprob)
            episode.entropies.append(entropy)
            episode.ended = end
        if all(ends):
            break
        ids, positions = tokens, positions[:, -1:] + 1
        mask = F.pad(mask, (0, 1), value=1)
        if any(ends):
            keep = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            ids, mask, positions = ids[keep], mask[keep], positions[keep]
            going = [index for index, end in zip(going, ends, strict=True) if not end]
    return episodes


def _draw(logprobs: Tensor, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Token ids [B, 1] drawn from log-probabilities [B, V]."""
    if 0 < top_k < logprobs.shape[1]:
        least = logprobs.topk(top_k).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf)
    probs = torch.softmax(logprobs, -1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.scatter(1, order, ordered.masked_fill(beyond, 0.0))
    return torch.multinomial(probs, 1, generator=generator)
