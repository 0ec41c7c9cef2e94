"""The mathematics of PPO against an oracle made with TRL's own functions, and against float64 loops."""

import inspect
import json
import math

import pytest
import torch
from places import TESTS

from lora_kernels.train import rl

ORACLE = json.loads((TESTS / "oracles" / "ppo_oracle.json").read_text())
CONFIG, INPUTS, DERIVED = ORACLE["config"], ORACLE["inputs"], ORACLE["derived"]


DPO_INPUTS = (
    *("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs"),
    *("chosen_tokens", "rejected_tokens"),
)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def oracle_masks():
    lengths = torch.tensor(DERIVED["sequence_lengths"]) + 1
    return lengths, *rl.token_masks(lengths, 7)


def test_masks_of_the_oracle():
    _, policy_mask, value_mask = oracle_masks()
    assert policy_mask.int().tolist() == DERIVED["policy_mask"]
    assert value_mask.int().tolist() == DERIVED["value_mask"]


def oracle_advantages(kind, whiten):
    lengths, policy_mask, value_mask = oracle_masks()
    kl = rl.kl_estimate(tensor(INPUTS["logprobs"]), tensor(INPUTS["ref_logprobs"]), kind)
    rewards = rl.token_rewards(tensor(INPUTS["scores"]), kl, lengths, CONFIG["kl_coef"])
    if whiten:
        rewards = rl.masked_whiten(rewards, value_mask, shift_mean=False)
    advantages, returns = rl.gae(rewards, tensor(INPUTS["values"]), value_mask, CONFIG["gamma"], CONFIG["lam"])
    return kl, rewards, rl.masked_whiten(advantages, policy_mask), returns


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("whiten", [False, True])
def test_kl_rewards_advantages_and_returns_of_the_oracle(kind, whiten):
    expected = ORACLE["expected"][f"{kind}_whiten{int(whiten)}"]
    _, policy_mask, value_mask = oracle_masks()
    kl, rewards, advantages, returns = oracle_advantages(kind, whiten)
    close(torch.where(policy_mask, kl, 0.0), expected["kl"])
    close(rewards, expected["rewards"])
    close(advantages, expected["advantages"])
    close(torch.where(value_mask, returns, 0.0), torch.where(value_mask, tensor(expected["returns"]), 0.0))


def test_losses_of_the_oracle():
    expected = ORACLE["loss_for_k1_whiten0"]
    _, policy_mask, value_mask = oracle_masks()
    _, _, advantages, returns = oracle_advantages("k1", False)
    policy = rl.policy_loss(
        tensor(INPUTS["new_logprobs"]), tensor(INPUTS["logprobs"]), advantages, policy_mask, CONFIG["cliprange"]
    )
    loss, clip_fraction = rl.value_loss(
        tensor(INPUTS["vpred"]), tensor(INPUTS["values"]), returns, value_mask, CONFIG["cliprange_value"]
    )
    close(policy.loss, expected["pg_loss"])
    close(policy.clip_fraction, expected["pg_clipfrac"])
    close(loss, expected["vf_loss"])
    close(clip_fraction, expected["vf_clipfrac"])
    close(policy.loss + CONFIG["vf_coef"] * loss, expected["total"])
    # TRL averages over the padding too, where the difference is 0.
    close(policy.approx_kl * policy_mask.sum() / policy_mask.numel(), expected["approxkl_trl_unmasked"])


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, width = (int(torch.randint(low, 9, (), generator=generator)) for low in (1, 2))
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)

    def draw():
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    return lengths, draw(), draw(), draw(), draw(), torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("position", rl.SCORE_POSITIONS)
@pytest.mark.parametrize("kind", rl.KL_KINDS)
def test_random_cases_equal_plain_loops(seed, position, kind):
    lengths, logprobs, ref_logprobs, values, new_logprobs, scores = random_case(seed)
    rows, width = logprobs.shape
    gamma, lam, kl_coef, dual_clip = 0.97, 0.9, 0.3, 1.5
    policy_mask, value_mask = rl.token_masks(lengths, width, position)
    # What lies off the masks must not matter.
    for x, mask in ((logprobs, policy_mask), (ref_logprobs, policy_mask), (values, value_mask)):
        x[~mask] = math.nan
    kl = rl.kl_estimate(logprobs, ref_logprobs, kind)
    rewards = rl.token_rewards(scores, kl, lengths, kl_coef, position)
    advantages, returns = rl.gae(rewards, values, value_mask, gamma, lam)
    policy = rl.policy_loss(new_logprobs, logprobs, advantages, policy_mask, 0.2, dual_clip)
    loss, clip_fraction = rl.value_loss(new_logprobs, values, returns, value_mask, 0.3)
    for x in (rewards, advantages, returns):
        assert torch.isfinite(x).all()

    flat, flat_loss, flat_clipped, flat_kl, value_terms, value_clipped = [], 0.0, 0, 0.0, 0.0, 0
    for i in range(rows):
        n = int(lengths[i])
        states = n if position == "last" else min(n + 1, width)
        reward = [0.0] * width
        for t in range(n):
            d = float(ref_logprobs[i, t] - logprobs[i, t])
            reward[t] = -kl_coef * {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[kind]
        reward[states - 1] += float(scores[i])
        assert rewards[i].tolist() == pytest.approx(reward, abs=1e-6)
        for t in range(states):
            # The sum that defines the estimator, not its recursion.
            expected = 0.0
            for k in range(t, states):
                ahead = float(values[i, k + 1]) if k + 1 < states else 0.0
                expected += (gamma * lam) ** (k - t) * (reward[k] + gamma * ahead - float(values[i, k]))
            assert float(advantages[i, t]) == pytest.approx(expected, abs=1e-6)
            target = expected + float(values[i, t])
            assert float(returns[i, t]) == pytest.approx(target, abs=1e-6)
            old, new = float(values[i, t]), float(new_logprobs[i, t])
            clipped = (min(max(new, old - 0.3), old + 0.3) - target) ** 2
            value_terms += max((new - target) ** 2, clipped) / 2
            value_clipped += clipped > (new - target) ** 2
            if t < n:
                flat.append(expected)
                log_ratio = float(new_logprobs[i, t] - logprobs[i, t])
                ratio = math.exp(log_ratio)
                plain, bounded = -expected * ratio, -expected * min(max(ratio, 0.8), 1.2)
                worst = max(plain, bounded)
                flat_loss += min(worst, -expected * dual_clip) if expected < 0 else worst
                flat_clipped += bounded > plain
                flat_kl += log_ratio**2 / 2
    tokens, states = len(flat), int(value_mask.sum())
    assert float(policy.loss) == pytest.approx(flat_loss / tokens, rel=1e-6, abs=1e-6)
    assert float(policy.clip_fraction) == pytest.approx(flat_clipped / tokens)
    assert float(policy.approx_kl) == pytest.approx(flat_kl / tokens, rel=1e-6)
    assert float(loss) == pytest.approx(value_terms / states, rel=1e-6)
    assert float(clip_fraction) == pytest.approx(value_clipped / states)
    if tokens > 1:
        mean = sum(flat) / tokens
        deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / (tokens - 1) + 1e-8)
        whitened = rl.masked_whiten(advantages, policy_mask)
        assert whitened[policy_mask].tolist() == pytest.approx([(a - mean) / deviation for a in flat], abs=1e-6)
        assert not whitened[~policy_mask].any()
        shifted = rl.masked_whiten(advantages, policy_mask, shift_mean=False)
        assert shifted[policy_mask].tolist() == pytest.approx([(a - mean) / deviation + mean for a in flat], abs=1e-6)


def test_micro_batches_add_up_to_the_minibatch():
    lengths, logprobs, advantages, values, new_logprobs, _ = random_case(3)
    policy_mask, value_mask = rl.token_masks(lengths, logprobs.shape[1])
    arguments = (new_logprobs.requires_grad_(), logprobs, advantages, policy_mask)
    whole = rl.policy_loss(*arguments)
    whole_value, _ = rl.value_loss(new_logprobs, values, advantages, value_mask)
    (gradient,) = torch.autograd.grad(whole.loss + whole_value, new_logprobs)
    total = 0.0
    for rows in (slice(0, 1), slice(1, None)):
        part = rl.policy_loss(*(x[rows] for x in arguments), count=policy_mask.sum())
        value = (new_logprobs, values, advantages, value_mask)
        part_value, _ = rl.value_loss(*(x[rows] for x in value), count=value_mask.sum())
        total = total + part.loss + part_value
    close(total, whole.loss + whole_value, 1e-12)
    close(torch.autograd.grad(total, new_logprobs)[0], gradient, 1e-12)
    assert not gradient[~value_mask].any()


def test_the_gradient_survives_what_lies_off_the_mask():
    new_logprobs = torch.tensor([[-1.0, 900.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    rl.policy_loss(new_logprobs, torch.tensor([[-1.0, -900.0]]), torch.tensor([[2.0, 0.0]]), mask).loss.backward()
    assert new_logprobs.grad.tolist() == [[-2.0, 0.0]]


def test_adaptive_kl_moves_towards_the_target_and_is_bounded():
    assert rl.adaptive_kl_coef(0.2, 6.0, 6.0, 64, 10000) == 0.2
    assert rl.adaptive_kl_coef(0.2, 60.0, 6.0, 500, 10000) == pytest.approx(0.2 * (1 + 0.2 * 0.05))
    assert rl.adaptive_kl_coef(0.2, 5.4, 6.0, 500, 10000) == pytest.approx(0.2 * (1 - 0.1 * 0.05))


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 4.0, math.nan]]), torch.tensor([[True, True, True, False]])
    assert rl.explained_variance(returns, returns, mask) == 1
    assert rl.explained_variance(torch.full_like(returns, 3.0), returns, mask) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, m: rl.kl_estimate(x, x, "k4"), "kind must be one of k1, k2, k3, got 'k4'"),
        (lambda x, m: rl.kl_estimate(x, x[:1]), r"ref_logprobs must be \[2, 3\] like logprobs, got \[1, 3\]"),
        (lambda x, m: rl.token_rewards(x[:, 0], x, torch.tensor([1, 4]), 0.1), r"lengths must be in 1 to 3, got"),
        (lambda x, m: rl.token_rewards(x[:, 0], x, torch.tensor([1, 2]), 0.1, "eos"), "position must be one of"),
        (lambda x, m: rl.masked_whiten(x, m), "mask must hold at least 2 values, got 1"),
        (lambda x, m: rl.policy_loss(x, x, x, m, dual_clip=1.0), "dual_clip must be > 1 or None, got 1.0"),
    ],
)
def test_bad_arguments_are_named(call, match):
    mask = torch.tensor([[True, False, False], [False, False, False]])
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(2, 3), mask)


def test_defaults_are_those_of_the_field():
    """OpenAI's and TRL's: gamma 1, lambda 0.95, both clips 0.2; Rafailov et al. 2023: beta 0.1, no smoothing."""
    defaults = {
        rl.gae: {"gamma": 1.0, "lam": 0.95},
        rl.policy_loss: {"cliprange": 0.2, "dual_clip": None, "count": None},
        rl.value_loss: {"cliprange": 0.2, "count": None},
        rl.masked_whiten: {"shift_mean": True},
        rl.reward_loss: {"margin": None, "center_coef": 0.0},
        rl.dpo_loss: {
            **{"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0},
            **{"chosen_tokens": None, "rejected_tokens": None},
        },
        rl.kl_estimate: {"kind": "k1"},
        rl.token_masks: {"position": "after"},
        rl.token_rewards: {"position": "after"},
    }
    for function, wanted in defaults.items():
        parameters = inspect.signature(function).parameters.items()
        assert {name: p.default for name, p in parameters if p.default is not p.empty} == wanted, function


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (rl.gae, ("rewards", "values", "value_mask")),
        (rl.policy_loss, ("logprobs", "old_logprobs", "advantages", "mask")),
        (rl.value_loss, ("values", "old_values", "returns", "mask")),
        (rl.kl_estimate, ("logprobs", "ref_logprobs")),
        (rl.reward_loss, ("chosen", "rejected", "margin")),
        (rl.dpo_loss, DPO_INPUTS),
    ],
)
def test_every_argument_has_to_have_the_shape_of_the_others(function, names):
    wide = (2, 3) if function not in (rl.reward_loss, rl.dpo_loss) else (2,)
    for odd in names:
        shapes = {name: (5, *wide[1:]) if name == odd else wide for name in names}
        arguments = {
            name: torch.ones(shape, dtype=torch.bool if "mask" in name else None) for name, shape in shapes.items()
        }
        with pytest.raises(ValueError, match=rf"\b{odd}\b"):
            function(**arguments)


def test_parts_of_a_minibatch_have_its_divisor():
    """The loss, the clipped share and the KL of a micro-batch are sums over the count of the whole minibatch."""
    mask = torch.tensor([[True, True, False]])
    new, old = torch.log(tensor([[1.5, 1.0, 9.0]])), torch.zeros(1, 3, dtype=torch.float64)
    found = rl.policy_loss(new, old, tensor([[1.0, 1.0, 1.0]]), mask, 0.2, count=8)
    close(found.loss, -(1.2 + 1.0) / 8)
    close(found.clip_fraction, 1 / 8)
    close(found.approx_kl, math.log(1.5) ** 2 / 2 / 8)
    # What lies off the mask has a ratio of one.
    close(found.ratio, [[1.5, 1.0, 1.0]])
    assert found.clip_fraction.dtype == torch.float64 and not found.ratio.requires_grad
    loss, clipped = rl.value_loss(tensor([[2.0, 0.0, 9.0]]), old, old, mask, 0.2, count=8)
    close(loss, 0.5 * 4.0 / 8)
    # The clipped value is nearer to the return, so that the clip has no effect.
    close(clipped, 0.0)
    _, clipped = rl.value_loss(tensor([[2.0, 0.0, 9.0]]), old, tensor([[3.0, 0.0, 0.0]]), mask, 0.2, count=8)
    close(clipped, 1 / 8)


def test_advantages_off_the_mask_are_zero_and_one_token_is_enough():
    mask = torch.tensor([[True], [False]])
    advantages, returns = rl.gae(tensor([[2.0], [3.0]]), tensor([[0.5], [0.7]]), mask)
    close(advantages, [[1.5], [0.0]])
    close(returns[:1], [[2.0]])


def test_sums_of_pairs():
    chosen, rejected = tensor([1.0, 2.0, 0.0]), tensor([0.0, 2.0, 3.0])
    sums = rl.pair_sums(tensor([0.5, 0.25, 1.0]), chosen, rejected)
    wanted = {"loss": 1.75, "reward_chosen": 3.0, "reward_rejected": 5.0, "accuracy": 1.0, "margin": -2.0}
    assert {name: value.item() for name, value in sums.items()} == wanted


def test_bounds_of_the_adaptive_coefficient_and_of_the_variance():
    assert rl.adaptive_kl_coef(1.0, 0.0, 6.0, 10, 100.0) == pytest.approx(1 - 0.2 * 10 / 100)
    assert rl.adaptive_kl_coef(1.0, 60.0, 6.0, 10, 100.0) == pytest.approx(1 + 0.2 * 10 / 100)
    # Of two values the biased and the unbiased variance differ twofold, and so would a floor of one.
    mask = torch.tensor([[True, True]])
    close(rl.explained_variance(tensor([[0.0, 0.0]]), tensor([[0.0, 0.1]]), mask), 0.0)
    close(rl.explained_variance(tensor([[0.0, 0.05]]), tensor([[0.0, 0.1]]), mask), 0.75)
