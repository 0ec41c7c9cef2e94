"""What PPO makes of a rollout: log-probabilities, values, advantages; then the epochs of learning from them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_kernels.optim import LoRAPlusAdamW
from lora_kernels.optim.loraplus import loraplus_groups
from lora_kernels.train import rl
from lora_kernels.train.checkpoint import state_before
from lora_kernels.train.config import PPOConfig
from lora_kernels.train.ppo.roles import Roles
from lora_kernels.train.ppo.rollout import (
    Episode,
    EpisodeBatch,
    collate,
    micro_batches,
)


@dataclass
class Rollout:
    """Answers and what learning from them needs. Tensors are [B, max_new_tokens]."""

    episodes: list[Episode]
    logprobs: Tensor
    values: Tensor
    policy_mask: Tensor
    value_mask: Tensor
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]


def make_ppo_optimizer(model: nn.Module, value_parameters: Sequence[nn.Parameter], config: PPOConfig) -> LoRAPlusAdamW:
    """One AdamW, or LoRA+, over policy and value model, clipping their gradients together; it keeps grad_norm."""
    lr_ratio = config.lr_ratio if config.optimizer == "loraplus" else 1.0
    lr = config.peak_lr
    value_factor = (config.value_lr or lr) / lr
    of_value = {id(parameter) for parameter in value_parameters}
    groups = []
    for group in loraplus_groups(model, lr, lr_ratio, config.weight_decay, lr_embedding=None):
        for is_value, factor in ((False, 1.0), (True, value_factor)):
            parameters = [p for p in group["params"] if (id(p) in of_value) is is_value]
            if parameters:
                own = group["lr"] * factor
                groups.append({**group, "params": parameters, "lr": own, "peak_lr": own})
    return LoRAPlusAdamW(groups, lr, lr_ratio=1.0, max_grad_norm=config.max_grad_norm or math.inf)


class Learner:
    """Policy and value model, and their optimizer. Whatever it draws is a function of the seed and the step alone."""

    def __init__(self, roles: Roles, config: PPOConfig) -> None:
        self.roles, self.config = roles, config
        self.device = next(roles.model.parameters()).device
        self.optimizer = make_ppo_optimizer(roles.model, roles.value_parameters(), config)

    def batches(self, episodes: Sequence[Episode]) -> list[tuple[Sequence[int], EpisodeBatch]]:
        """(indices, batch) of the micro-batches in which the first of the PPO epochs goes through the episodes.

        A product's last bit may depend on its shape. Old and reference log-probabilities from these batches make the
        first minibatch's ratio exactly 1, and the KL divergence of an untrained policy exactly 0.
        """
        plan = micro_batches(range(len(episodes)), self.config.minibatches, self.config.batch_size)
        return [(rows, self._collate(episodes, rows)) for minibatch in plan for rows in minibatch]

    def _collate(self, episodes: Sequence[Episode], rows: Sequence[int]) -> EpisodeBatch:
        return collate([episodes[index] for index in rows], self.device)

    @torch.no_grad()
    def rollout(self, episodes: list[Episode], raw_scores: Sequence[float], kl_coef: float) -> Rollout:
        """Log-probabilities under policy and reference, values, rewards and advantages of the answers."""
        config, roles = self.config, self.roles
        batches = self.batches(episodes)
        width = config.max_new_tokens

        def gathered(compute: Callable[[EpisodeBatch], Tensor]) -> Tensor:
            whole = torch.zeros(len(episodes), width, device=self.device)
            for rows, batch in batches:
                part = compute(batch)[:, :width]
                whole[list(rows), : part.shape[1]] = part
            return whole

        logprobs = gathered(roles.logprobs)
        with roles.reference():
            ref_logprobs = gathered(roles.logprobs)
        with roles.value():
            values = gathered(roles.values)

        scores = torch.tensor(raw_scores, device=self.device)
        lengths = torch.tensor([len(episode.response) for episode in episodes], device=self.device)
        ended = torch.tensor([episode.ended for episode in episodes], device=self.device)
        position = config.score_position
        policy_mask, value_mask = rl.token_masks(lengths, width, position)
        penalised = scores - config.missing_eos_penalty * ~ended
        kl = torch.where(policy_mask, rl.kl_estimate(logprobs, ref_logprobs, config.kl_estimator), 0.0)
        rewards = rl.token_rewards(penalised, kl, lengths, kl_coef, position)
        if config.whiten_rewards and value_mask.sum() > 1:
            rewards = rl.masked_whiten(rewards, value_mask, shift_mean=False)
        advantages, returns = rl.gae(rewards, values, value_mask, config.gamma, config.lam)
        if config.whiten_advantages and policy_mask.sum() > 1:
            advantages = rl.masked_whiten(advantages, policy_mask)
        measured: dict[str, Any] = {
            "objective/kl": kl.sum(1).mean(),
            "objective/kl_per_token": rl.masked_mean(kl, policy_mask),
            "objective/entropy": np.mean([entropy for episode in episodes for entropy in episode.entropies]),
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(correction=0),
            "objective/non_score_reward": -kl_coef * kl.sum(1).mean(),
            "objective/rlhf_reward": penalised.mean() - kl_coef * kl.sum(1).mean(),
            "val/explained_variance": rl.explained_variance(values, returns, value_mask),
            "val/num_eos_tokens": ended.sum(),
            "val/response_length": lengths.float().mean(),
        }
        metrics = {name: float(value) for name, value in measured.items()}
        return Rollout(episodes, logprobs, values, policy_mask, value_mask, advantages, returns, metrics)

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        """The PPO epochs over a rollout; returns the means over the minibatches of their metrics.

        Raises FloatingPointError where the loss or a gradient is not finite; that minibatch has changed nothing.
        """
        config = self.config
        random = np.random.default_rng([config.seed, step])
        rows = len(rollout.episodes)
        done: list[dict[str, float]] = []
        stopped = False
        for epoch in range(config.ppo_epochs):
            # The first pass is in the order of `batches`; prompts are in random order anyway.
            order = range(rows) if epoch == 0 else random.permutation(rows).tolist()
            for minibatch in micro_batches(order, config.minibatches, config.batch_size):
                metrics, stopped = self._minibatch(rollout, minibatch)
                if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                    raise FloatingPointError(
                        f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} in step {step}"
                        f"{state_before(Path(config.output_dir))}; a lower lr or dtype float32 may help"
                    )
                done.append(metrics)
                if stopped:
                    break
            if stopped:
                break
        means = {name: float(np.mean([metrics[name] for metrics in done])) for name in done[0]}
        means["policy/first_approxkl"] = done[0]["policy/approxkl"]
        return {**means, "policy/minibatches": len(done), "policy/stopped_early": int(stopped)}

    def _minibatch(self, rollout: Rollout, minibatch: list[Sequence[int]]) -> tuple[dict[str, float], bool]:
        """One optimizer step; (metrics, whether the policy had moved too far for it)."""
        config = self.config
        indices = [index for rows in minibatch for index in rows]
        tokens, states = rollout.policy_mask[indices].sum(), rollout.value_mask[indices].sum()
        sums: dict[str, Tensor] = {}
        for rows in minibatch:
            for name, value in self._micro_batch(rollout, list(rows), tokens, states).items():
                sums[name] = sums.get(name, 0.0) + value
        metrics = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        metrics["val/ratio_var"] = max(0.0, metrics.pop("ratio_square") - metrics["val/ratio"] ** 2)
        metrics["loss"] = metrics["loss/policy"] + config.vf_coef * metrics["loss/value"]
        stop = config.target_kl is not None and metrics["policy/approxkl"] > config.target_kl
        if stop:
            metrics["grad_norm"] = 0.0
        else:
            self.optimizer.step()
            grad_norm: Any = self.optimizer.grad_norm  # a tensor, since the optimizer has a max_grad_norm
            metrics["grad_norm"] = grad_norm.item()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics, stop

    def _micro_batch(self, rollout: Rollout, rows: list[int], tokens: Tensor, states: Tensor) -> dict[str, Tensor]:
        """Adds this micro-batch's gradients; its shares of the minibatch's means over `tokens` and `states`."""
        config, roles = self.config, self.roles
        batch = self._collate(rollout.episodes, rows)

        def part(tensor: Tensor, width: int) -> Tensor:
            return tensor[rows, :width]

        logprobs = roles.logprobs(batch)
        width = logprobs.shape[1]
        mask = part(rollout.policy_mask, width)
        old, advantages = part(rollout.logprobs, width), part(rollout.advantages, width)
        policy = rl.policy_loss(logprobs, old, advantages, mask, config.cliprange, config.dual_clip, tokens)
        policy.loss.backward()
        with roles.value():
            values = roles.values(batch)[:, : config.max_new_tokens]
            width = values.shape[1]
            old, returns = part(rollout.values, width), part(rollout.returns, width)
            loss, clip_fraction = rl.value_loss(
                values, old, returns, part(rollout.value_mask, width), config.cliprange_value, states
            )
            (config.vf_coef * loss).backward()
        return {
            "loss/policy": policy.loss.detach(),
            "loss/value": loss.detach(),
            "policy/approxkl": policy.approx_kl,
            "policy/clipfrac": policy.clip_fraction,
            "val/clipfrac": clip_fraction,
            "val/ratio": rl.masked_mean(policy.ratio, mask, tokens),
            "ratio_square": rl.masked_mean(policy.ratio.square(), mask, tokens),
        }
