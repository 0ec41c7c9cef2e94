"""A causal language model as the trainers use it: its loss on answers, by way of its decoder, and its context."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.methods.modes import eval_mode
from lora_kernels.methods.virtual_tokens import context_length, find_decoder, learned_positions
from lora_kernels.nn.lora_linear import is_linear
from lora_kernels.nn.wrappers import Model
from lora_kernels.ops.cross_entropy import chunked_cross_entropy, chunked_logprobs
from lora_kernels.train.config import TrainConfig
from lora_kernels.train.graphs import DecoderGraphs, last_hidden_state
from lora_kernels.train.loop import Dataset

_CHECK_TOKENS = 8


class AnswerLoss(nn.Module):
    """A causal LM whose forward is the summed cross-entropy of the labels, without ever making all logits.

    Raises ValueError for a model whose logits are not `softcap(scale * lm_head(decoder(input_ids)))`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        _, head = self.parts
        if not isinstance(head, nn.Linear) or not is_linear(head):
            found = "nothing" if head is None else type(head).__name__
            raise ValueError(
                f"the model's output embedding must be an nn.Linear without adapter, got {found}; "
                "leave it out of target"
            )
        # Where it is set, it takes the decoder's place in training.
        self.graphs: DecoderGraphs | None = None
        config = self.model.config
        self.logit_softcap = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.logit_scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    @property
    def parts(self) -> tuple[Model, Any]:
        """Decoder and output embedding now; the adapter in use may have an output embedding of its own."""
        # A PEFT model's wrapper has other ideas of what its base model is; the adapters live inside.
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return find_decoder(inner), inner.get_output_embeddings()

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> dict[str, Tensor]:
        """{"loss": summed loss of labels [B, T] (not shifted; -100 is ignored) after input_ids [B, T]}.

        An attention mask is not used: with padding on the right only, causal attention never looks at a pad, and
        without a mask the attention runs its causal path, which is the fast one.
        """
        loss, _ = self._project(chunked_cross_entropy, input_ids, labels)
        return {"loss": loss}

    def logprobs(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probability of each of labels [B, T] after the tokens before it: float32 [B, T - 1], 0 where ignored."""
        return self._project(chunked_logprobs, input_ids, labels)

    def _project(self, function: Callable[..., Any], input_ids: Tensor, labels: Tensor) -> Any:
        decoder, head = self.parts
        if self.graphs is not None and self.training and torch.is_grad_enabled():
            hidden = self.graphs(input_ids)
        else:
            hidden = last_hidden_state(decoder, input_ids)
        return function(
            hidden[:, :-1].to(head.weight.dtype),
            head.weight,
            labels[:, 1:],
            head.bias,
            logit_softcap=self.logit_softcap,
            logit_scale=self.logit_scale,
        )

    @torch.no_grad()
    def check(self, input_ids: Tensor) -> None:
        """ValueError unless the loss of a short row is the one from the model's own logits."""
        row = input_ids.reshape(1, -1)[:, :_CHECK_TOKENS].to(next(self.model.parameters()).device)
        with eval_mode(self):
            logits = self.model(input_ids=row, use_cache=False).logits[0, :-1].float()
            found = -self.logprobs(row, row).sum()
        expected = F.cross_entropy(logits, row[0, 1:], reduction="sum")
        # Logits of 16 bits are rounded at other places on the two ways.
        tolerance = 1e-3 if self.parts[1].weight.dtype in (torch.float32, torch.float64) else 3e-2
        if not torch.allclose(found.float(), expected, rtol=tolerance, atol=tolerance * row.numel()):
            raise ValueError(
                f"{type(self.model).__name__} computes its logits in a way that is not supported: the loss from its "
                f"own logits is {expected.item():.4f}, from its decoder and output embedding {found.item():.4f}"
            )


def check_context(model: nn.Module, datasets: Sequence[Dataset | None], config: TrainConfig) -> None:
    """ValueError where the virtual tokens and the longest row of the data are more than the model's context holds;
    without virtual tokens a warning, unless the positions are learned, of which there are no more."""
    virtual = getattr(getattr(model, "virtual_tokens", None), "num_virtual_tokens", 0)
    context, longest = context_length(model), max(data.longest for data in datasets if data is not None)
    if context is None or virtual + longest <= context:
        return
    text = f"the longest row of {longest} tokens exceeds the model's context of {context}"
    if virtual:
        raise ValueError(
            f"num_virtual_tokens {virtual} and {text.replace('exceeds', 'exceed')}; lower max_length "
            f"({config.max_length}) or num_virtual_tokens"
        )
    if learned_positions(model) is not None:
        raise ValueError(f"{text}; lower max_length ({config.max_length})")
    warnings.warn(f"{text}; with max_length {context} no row would go beyond what it was trained on", stacklevel=2)
