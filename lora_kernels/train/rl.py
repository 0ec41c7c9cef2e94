"""The mathematics of learning from preferences and rewards: tensors in, tensors out, no model."""

from torch import Tensor
from torch.nn import functional as F

DPO_LOSSES = ("sigmoid", "ipo")


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
