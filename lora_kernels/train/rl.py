"""The mathematics of learning from preferences and rewards: tensors in, tensors out, no model."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DPO_LOSSES = ("sigmoid", "ipo")
KL_KINDS = ("k1", "k2", "k3")
SCORE_POSITIONS = ("after", "last")


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coef: float = 0.0) -> Tensor:
    """Bradley-Terry loss of each pair, -log σ(chosen - rejected - margin) + center_coef * (chosen + rejected)².

    chosen, rejected: rewards [B]; margin: [B], by how much the chosen answer should win (Touvron et al. 2023, section
    3.2.2), 0 where left out. center_coef draws the rewards, which the first term leaves free up to a constant, towards
    a mean of 0 (Eisenstein et al. 2023). Returns [B]; the usual loss is its mean. Ouyang et al. 2022, equation 1.

    Raises ValueError where the shapes differ or center_coef is negative.
    """
    _check_shapes(chosen=chosen, rejected=rejected, **({} if margin is None else {"margin": margin}))
    if center_coef < 0:
        raise ValueError(f"center_coef must be >= 0, got {center_coef}")
    difference = chosen - rejected
    loss = -F.logsigmoid(difference if margin is None else difference - margin)
    return loss + center_coef * (chosen + rejected).square() if center_coef else loss


def pair_sums(loss: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What a trainer logs of the losses and the rewards of pairs, each [B]: sums over them. A tie is not accurate."""
    return {
        "loss": loss.sum(),
        "accuracy": (chosen > rejected).sum(),
        "margin": (chosen - rejected).sum(),
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
    }


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each pair, and the rewards beta * (log π(y) - log π_ref(y)) of its two answers (detached), each [B].

    With d = log π(chosen)/π_ref(chosen) - log π(rejected)/π_ref(rejected), all log-probabilities [B] summed over the
    answer's tokens:

    - "sigmoid": -(1 - label_smoothing) log σ(beta d) - label_smoothing log σ(-beta d). Rafailov et al. 2023, equation
      7; label_smoothing, the share of pairs that are labelled the wrong way round, is Mitchell's conservative DPO.
    - "ipo": (d' - 1 / (2 beta))², d' being d with each log-ratio divided by its answer's number of tokens,
      chosen_tokens and rejected_tokens [B] (at least 1; "sigmoid" does not use them). Azar et al. 2023, equation 17,
      normalised as its authors do.

    Raises ValueError where shapes differ, beta is not > 0, label_smoothing is not in [0, 0.5) or, with "ipo", not 0,
    and where "ipo" gets no numbers of tokens.
    """
    logprobs = {
        "chosen_logprobs": chosen_logprobs,
        "rejected_logprobs": rejected_logprobs,
        "ref_chosen_logprobs": ref_chosen_logprobs,
        "ref_rejected_logprobs": ref_rejected_logprobs,
    }
    tokens = {"chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens}
    _check_shapes(**logprobs, **{name: value for name, value in tokens.items() if value is not None})
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    chosen_ratio = chosen_logprobs - ref_chosen_logprobs
    rejected_ratio = rejected_logprobs - ref_rejected_logprobs
    if loss_type == "sigmoid":
        logits = beta * (chosen_ratio - rejected_ratio)
        loss = -F.logsigmoid(logits)
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)
    elif loss_type == "ipo":
        if label_smoothing:
            raise ValueError(f"label_smoothing must be 0 with loss_type 'ipo', got {label_smoothing}")
        if chosen_tokens is None or rejected_tokens is None:
            raise ValueError("loss_type 'ipo' needs chosen_tokens and rejected_tokens")
        loss = (chosen_ratio / chosen_tokens - rejected_ratio / rejected_tokens - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"loss_type must be one of {', '.join(DPO_LOSSES)}, got {loss_type!r}")
    return loss, beta * chosen_ratio.detach(), beta * rejected_ratio.detach()


def _check_shapes(**tensors: Tensor) -> None:
    (first, like), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.shape != like.shape:
            raise ValueError(f"{name} must be {list(like.shape)} like {first}, got {list(tensor.shape)}")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(π ‖ π_ref) from sampled tokens, with d = log π_ref - log π (Schulman 2020, "Approximating KL").

    k1: -d, unbiased, may be negative. k2: d²/2, biased, small variance. k3: e^d - 1 - d, unbiased and never negative.

    logprobs, ref_logprobs: any equal shape; returns that shape. Raises ValueError for other shapes or another kind.
    """
    _check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = ref_logprobs - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"kind must be one of {', '.join(KL_KINDS)}, got {kind!r}")


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The next kl_coef: kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon); Ziegler et al. 2019, 2.2.

    kl: mean over the answers of the KL summed over their tokens; episodes: answers since the last call.
    """
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


def token_masks(lengths: Tensor, width: int, position: str = "after") -> tuple[Tensor, Tensor]:
    """policy_mask and value_mask, bool [B, width], of answers with `lengths` [B] tokens.

    The policy mask holds the answer's tokens, and so does the value mask with position "last". With "after" it holds
    one position more, where there is one: the state after the last token, which has the score; see `token_rewards`.
    """
    index = torch.arange(width, device=lengths.device)
    policy_mask = index < lengths[:, None]
    return policy_mask, policy_mask if position == "last" else index <= lengths[:, None]


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coef: float, position: str = "after") -> Tensor:
    """The reward of each token: -kl_coef * kl on the answer's tokens, and the score once.

    position: "after" adds the score at the state after the last token, the last one where the answer fills the width
    (index min(n + 1, L - 1) with the last token at n), as the TL;DR reproduction of Huang et al. 2024 does; "last"
    adds it at the last token, as OpenRLHF and verl do. With gamma = lam = 1 the two are the same.

    scores: [B]; kl: [B, L], its values past an answer ignored; lengths: [B], tokens of each answer, 1 to L. Returns
    [B, L]. Ouyang et al. 2022, equation 2, token by token. Raises ValueError for another position or lengths off range.
    """
    if position not in SCORE_POSITIONS:
        raise ValueError(f"position must be one of {', '.join(SCORE_POSITIONS)}, got {position!r}")
    width = kl.shape[1]
    if not bool(((lengths >= 1) & (lengths <= width)).all()):
        raise ValueError(f"lengths must be in 1 to {width}, got {lengths.tolist()}")
    policy_mask, _ = token_masks(lengths, width)
    rewards = torch.where(policy_mask, -kl_coef * kl, 0.0)
    at = lengths - 1 if position == "last" else lengths.clamp(max=width - 1)
    return rewards.scatter_add(1, at[:, None], scores.to(rewards.dtype)[:, None])


def gae(
    rewards: Tensor, values: Tensor, value_mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16): (advantages, returns), each [B, L].

    delta_t = r_t + gamma V_(t+1) - V_t;  A_t = delta_t + gamma lam A_(t+1);  return_t = A_t + V_t.

    rewards, values: [B, L], values[:, t] being that of the state in which token t is chosen. Outside of value_mask,
    bool [B, L], and beyond L both are taken as 0, whatever is stored there, and so are the results.
    """
    _check_shapes(rewards=rewards, values=values, value_mask=value_mask)
    rewards, values = (torch.where(value_mask, tensor, 0.0) for tensor in (rewards, values))
    advantages = torch.zeros_like(values)
    ahead = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        ahead = delta + gamma * lam * ahead
        advantages[:, t] = ahead
        next_value = values[:, t]
    advantages = torch.where(value_mask, advantages, 0.0)
    return advantages, advantages + values


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Σ x[mask] / count, a scalar; count is by default the number of True in mask.

    Values off the mask may be NaN. With `count` of a whole minibatch, the results of its micro-batches add up.
    """
    return torch.where(mask, x, 0.0).sum() / (mask.sum() if count is None else count)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / √(var + 1e-8) over mask, 0 off it; var is the unbiased variance. shift_mean=False puts mean back.

    x, mask: [B, L]. Raises ValueError for a mask with fewer than two True, which have no such variance.
    """
    count = mask.sum()
    if count < 2:
        raise ValueError(f"mask must hold at least 2 values, got {int(count)}")
    mean = masked_mean(x, mask, count)
    variance = masked_mean((x - mean).square(), mask, count - 1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


class PolicyLoss(NamedTuple):
    """Means over tokens; all but `loss` are detached. `ratio` [B, L] is 1 off the mask."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float = 0.2,
    dual_clip: float | None = None,
    count: Tensor | float | None = None,
) -> PolicyLoss:
    """PPO's clipped loss, mean over mask of max(-A ratio, -A clip(ratio, 1 - cliprange, 1 + cliprange)).

    ratio = exp(logprobs - old_logprobs); Schulman et al. 2017, equation 7. dual_clip: > 1, bounds the loss of a token
    with A < 0 by -A dual_clip, so that a large ratio can't dominate (Ye et al. 2020, equation 5).

    logprobs (with gradient), old_logprobs, advantages, mask (bool): [B, L]. count: what the sums are divided by, see
    `masked_mean`. `clip_fraction`: share of tokens where the clipped term is the larger one; `approx_kl`: mean of
    (logprobs - old_logprobs)²/2. Raises ValueError where shapes differ or dual_clip is not > 1.
    """
    _check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, got {dual_clip}")
    # Off the mask both may hold anything; exp of it could be inf, and inf * 0 NaN in the gradient.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > unclipped).to(loss.dtype), mask, count)
        approx_kl = masked_mean(log_ratio.square() / 2, mask, count)
    return PolicyLoss(masked_mean(loss, mask, count), clip_fraction, approx_kl, ratio.detach())


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange: float = 0.2,
    count: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, clip fraction): half the mean over mask of max((V - R)², (clip(V, old - c, old + c) - R)²), c = cliprange.

    values (with gradient), old_values, returns, mask (bool): [B, L]. count: see `masked_mean`. The clip fraction,
    detached, is the share where the clipped term is the larger one. Huang et al. 2024, after OpenAI's code.
    """
    _check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    clipped = torch.minimum(torch.maximum(values, old_values - cliprange), old_values + cliprange)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    loss = masked_mean(torch.maximum(error, clipped_error), mask, count) / 2
    return loss, masked_mean((clipped_error > error).to(loss.dtype), mask, count).detach()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over mask: 1 is perfect, 0 no better than a constant; NaN-free."""
    variances = [x[mask].var(correction=0) for x in (returns - values, returns)]
    return 1 - variances[0] / variances[1].clamp(min=1e-12)
