"""PPO's four models over one frozen base: each is a set of adapters, and a score head, that is switched on in turn."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.io.peft import add_saved_adapter
from lora_kernels.methods.lora import LoRAConfig, lora_modules
from lora_kernels.methods.named import REFERENCE, add_adapter, reference, use_adapter
from lora_kernels.nn.wrappers import Model
from lora_kernels.ops.cross_entropy import chunked_logprobs
from lora_kernels.train.causal_lm import AnswerLoss
from lora_kernels.train.ppo.rollout import EpisodeBatch
from lora_kernels.train.reward import HEAD, read_normalization


class Roles:
    """The policy is the model's own adapter; `reference`, `value` and `reward` switch to the others.

    model: a causal LM after `attach_head`, the policy's adapter in use. The value model is a new adapter with
    `value_config`, its score head 0, or starts from that of `reward_adapter`, a directory with a reward model's. The
    reference is the adapter in `reference_adapter`, frozen, or without one the base model itself. `temperature`
    divides the logits wherever log-probabilities are computed.
    """

    def __init__(
        self,
        model: Model,
        value_config: LoRAConfig,
        temperature: float,
        reference_adapter: str | None = None,
        reward_adapter: str | None = None,
    ) -> None:
        self.model = model
        self.lm = AnswerLoss(model)
        self.temperature = temperature
        if reference_adapter is not None:
            add_saved_adapter(model, REFERENCE, reference_adapter, trainable=False)
        self.gain, self.bias = 1.0, 0.0
        if reward_adapter is None:
            add_adapter(model, "value", value_config)
            with self.value():
                nn.init.zeros_(getattr(model, HEAD).weight)
        else:
            add_saved_adapter(model, "value", reward_adapter)
            add_saved_adapter(model, "reward", reward_adapter, trainable=False)
            with self.value():
                if HEAD not in model.lora_originals:
                    raise ValueError(
                        f"reward_adapter {reward_adapter} has no {HEAD!r} among its modules_to_save; allowed: the "
                        "adapter of a reward model"
                    )
            self.gain, self.bias = read_normalization(reward_adapter)
        # Dropout would make the ratio of the first minibatch something else than 1. All of `lm`: what is around the
        # model says in which mode `check` leaves it.
        self.lm.eval()

    def reference(self) -> AbstractContextManager[nn.Module]:
        """Inside the `with` block the model is the reference policy."""
        return reference(self.model)

    def value(self) -> AbstractContextManager[nn.Module]:
        """Inside the `with` block the model is the value model."""
        return use_adapter(self.model, "value")

    def reward(self) -> AbstractContextManager[nn.Module]:
        """Inside the `with` block the model is the reward model."""
        return use_adapter(self.model, "reward")

    def value_parameters(self) -> list[nn.Parameter]:
        """Adapters and head of the value model."""
        with self.value():
            adapters = [p for _, layer in lora_modules(self.model) for p in layer.parameters()]
            return [p for p in [*adapters, *self.model.get_submodule(HEAD).parameters()] if p.requires_grad]

    def logprobs(self, batch: EpisodeBatch) -> Tensor:
        """log softmax(logits / temperature) of each response token [B, L], 0 past the response; in use: whose it is."""
        head = self.model.get_output_embeddings()
        hidden = self._hidden(batch)[:, -batch.labels.shape[1] - 1 : -1]
        softcap = self.lm.logit_softcap
        return chunked_logprobs(
            hidden.to(head.weight.dtype),
            head.weight,
            batch.labels,
            head.bias,
            # c/T tanh(s/T x / (c/T)) is c tanh(s x / c) / T: the temperature comes after the softcap.
            logit_softcap=None if softcap is None else softcap / self.temperature,
            logit_scale=self.lm.logit_scale / self.temperature,
        )

    def values(self, batch: EpisodeBatch) -> Tensor:
        """float32 [B, L + 1]: the score head on the state before each response token and on that after the last."""
        return self._head(self._hidden(batch)[:, -batch.labels.shape[1] - 1 :])

    def rewards(self, batch: EpisodeBatch) -> Tensor:
        """float32 [B]: gain * score + bias of the last token of each response, as the reward model's files say."""
        hidden = self._hidden(batch)
        last = hidden.shape[1] - batch.labels.shape[1] + batch.lengths - 1
        return self.gain * self._head(hidden[torch.arange(len(last), device=last.device), last]) + self.bias

    def _head(self, hidden: Tensor) -> Tensor:
        head = getattr(self.model, HEAD)
        return F.linear(hidden.to(head.weight.dtype), head.weight).squeeze(-1).float()

    def _hidden(self, batch: EpisodeBatch) -> Tensor:
        decoder, _ = self.lm.parts
        inputs = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "position_ids")}
        return decoder(**inputs, use_cache=False).last_hidden_state
