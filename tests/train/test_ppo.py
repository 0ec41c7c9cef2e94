import copy
import dataclasses
import json
import math
import shutil
import signal
import zlib

import numpy as np
import pytest
import torch
from places import run_python
from safetensors.torch import load_file
from tiny_chat import tiny_llama, tiny_records, tiny_tokenizer
from tiny_pairs import tiny_pairs
from tiny_ppo import data as data
from tiny_ppo import model_dir as model_dir
from tiny_ppo import read_lines, run_for_resume, settings, steps_of, vowels
from typer.testing import CliRunner

from lora_kernels import use_backend
from lora_kernels.cli.commands import app
from lora_kernels.data.prompts import encode_prompt
from lora_kernels.io.adapters import load_adapter, save_adapter
from lora_kernels.methods.lora import LoRAConfig, inject, lora_modules
from lora_kernels.methods.named import adapter_names, use_adapter
from lora_kernels.testing import assert_close_to_reference
from lora_kernels.train.causal_lm import AnswerLoss
from lora_kernels.train.config import PPOConfig, RewardConfig
from lora_kernels.train.ppo import trainer as ppo
from lora_kernels.train.ppo.learner import Learner
from lora_kernels.train.ppo.reward_function import FunctionReward, RewardError, load_function
from lora_kernels.train.ppo.roles import Roles
from lora_kernels.train.ppo.rollout import (
    Episode,
    collate,
    micro_batches,
    sample,
)
from lora_kernels.train.ppo.trainer import run_ppo
from lora_kernels.train.reward import HEAD, attach_head, load_reward_model, run_reward

TIMINGS = ("tokens_per_second", "eval_seconds", "seconds/rollout", "seconds/score", "seconds/update")


def a_reward_adapter(directory):
    """What a reward model leaves: a LoRA adapter and a score head, saved with a causal LM's module paths."""
    model = tiny_llama()
    attach_head(model)
    torch.manual_seed(4)
    inject(model, LoRAConfig(r=3, lora_alpha=6, init="both_gaussian", modules_to_save=[HEAD]))
    torch.nn.init.normal_(model.score.weight)
    save_adapter(model, directory)
    return model.eval()


def an_sft_adapter(directory):
    model = inject(tiny_llama(), LoRAConfig(r=5, lora_alpha=5, lora_dropout=0.3, init="both_gaussian"))
    save_adapter(model, directory)
    return model.eval()


def tiny_roles(temperature=1.0, **adapters):
    model = tiny_llama()
    attach_head(model)
    torch.manual_seed(1)
    inject(model, LoRAConfig(r=4, init="both_gaussian"))
    return Roles(model, LoRAConfig(r=4, modules_to_save=[HEAD]), temperature, **adapters)


# Rollouts


PROMPTS = [[5, 9, 30], [7, 8, 9, 10, 11, 12, 13], [44], [60, 61, 62, 63, 64]]


def test_sampled_logprobs_are_those_that_training_scores():
    """With the KV cache, left padding, rows that leave the batch and a temperature, against whole sequences alone."""
    roles = tiny_roles(temperature=0.6)
    generator = torch.Generator().manual_seed(0)
    episodes = sample(roles.lm, PROMPTS * 4, set(range(0, 340, 9)), 12, 0.6, generator=generator)
    lengths = [len(episode.response) for episode in episodes]
    assert len(set(lengths)) > 3 and max(lengths) > 5
    batch = collate(episodes)
    scored = roles.logprobs(batch)
    exact = copy.deepcopy(roles.model).double()

    def whole(model, prompt, response):
        """Log-probabilities and entropies of a response, from one row without cache or padding."""
        ids = torch.tensor([[*prompt, *response]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.6
        logprobs = torch.log_softmax(logits, -1)
        return logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)

    eager, expected = [], []
    for row, (episode, prompt) in enumerate(zip(episodes, PROMPTS * 4, strict=True)):
        assert episode.prompt == prompt
        assert episode.ended == (episode.response[-1] % 9 == 0)
        assert not any(token % 9 == 0 for token in episode.response[:-1])
        assert not scored[row, lengths[row] :].any()
        with torch.no_grad(), use_backend("reference"):
            eager.append(whole(roles.model, prompt, episode.response))
            expected.append(whole(exact, prompt, episode.response))
    (eager, eager_entropies), (expected, entropies) = (
        [torch.cat(rows) for rows in zip(*found, strict=True)] for found in (eager, expected)
    )
    sampled = torch.tensor([value for episode in episodes for value in episode.logprobs])
    assert_close_to_reference(sampled, eager, expected, "sampled")
    found = torch.tensor([value for episode in episodes for value in episode.entropies])
    assert_close_to_reference(found, eager_entropies, entropies, "entropies")
    again = torch.cat([scored[row, :length].detach() for row, length in enumerate(lengths)])
    assert_close_to_reference(again, eager, expected, "scored")


def test_a_softcap_comes_before_the_temperature():
    roles = tiny_roles(temperature=0.5)
    roles.lm.logit_softcap, roles.lm.logit_scale = 2.0, 0.7
    (episode,) = sample(roles.lm, PROMPTS[:1], {2}, 5, 0.5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[*PROMPTS[0], *episode.response]])
    logits = 2.0 * torch.tanh(0.7 * roles.model(input_ids=ids).logits[0, 2:-1] / 2.0) / 0.5
    expected = torch.log_softmax(logits, -1).gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(episode.logprobs), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(roles.logprobs(collate([episode]))[0], expected, rtol=0, atol=2e-5)


def test_sampling_follows_the_distribution_that_top_k_and_top_p_leave():
    lm = AnswerLoss(tiny_llama().eval())
    probs = torch.softmax(lm.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.5, -1)
    ordered, order = probs.sort(descending=True)
    for top_k, top_p in ((0, 1.0), (6, 1.0), (0, 0.4), (6, 0.5)):
        left = ordered.clone()
        if top_k:
            left[top_k:] = 0
        left /= left.sum()
        left[left.cumsum(0) - left >= top_p] = 0
        left /= left.sum()
        generator = torch.Generator().manual_seed(1)
        episodes = sample(lm, [PROMPTS[0]] * 4000, set(), 1, 1.5, top_k, top_p, generator)
        counts = torch.bincount(torch.tensor([episode.response[0] for episode in episodes]), minlength=340)[order]
        assert not counts[left == 0].any()
        # Four standard deviations for the total variation of the frequent tokens.
        torch.testing.assert_close(counts / 4000, left, rtol=0, atol=4 * math.sqrt(0.25 / 4000))


def test_values_and_rewards_are_read_at_the_right_states(tmp_path):
    a_reward_adapter(tmp_path)
    roles = tiny_roles(reward_adapter=str(tmp_path))
    assert sorted(adapter_names(roles.model)) == ["default", "reward", "value"]
    episodes = sample(roles.lm, PROMPTS, set(range(0, 340, 9)), 9, generator=torch.Generator().manual_seed(2))
    batch = collate(episodes)
    with roles.value():
        values = roles.values(batch)
    with roles.reward():
        rewards = roles.rewards(batch)
    alone = tiny_llama()
    attach_head(alone)
    load_adapter(alone, tmp_path)
    for row, episode in enumerate(episodes):
        ids = torch.tensor([[*episode.prompt, *episode.response]])
        states = alone.score(alone.eval().model(input_ids=ids).last_hidden_state)[0, :, 0]
        n = len(episode.response)
        torch.testing.assert_close(values[row, : n + 1], states[len(episode.prompt) - 1 :], rtol=0, atol=2e-5)
        torch.testing.assert_close(rewards[row], states[-1], rtol=0, atol=2e-5)


def test_the_roles_share_the_base_and_the_reference_does_not_learn(tmp_path):
    an_sft_adapter(tmp_path / "sft")
    a_reward_adapter(tmp_path / "reward")
    model = tiny_llama()
    base = {parameter.data_ptr() for parameter in model.parameters()}
    attach_head(model)
    load_adapter(model, tmp_path / "sft")
    value = LoRAConfig(modules_to_save=[HEAD])
    roles = Roles(model, value, 1.0, str(tmp_path / "sft"), str(tmp_path / "reward"))
    batch = collate([Episode(prompt, [9, 8]) for prompt in PROMPTS])
    policy = roles.logprobs(batch)
    with roles.reference():
        assert torch.equal(roles.logprobs(batch), policy)
        assert not any(layer.lora_a.requires_grad for _, layer in lora_modules(model))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    of_value = {id(parameter) for parameter in roles.value_parameters()}
    of_policy = {id(p) for _, layer in lora_modules(model) for p in (layer.lora_a, layer.lora_b)}
    assert of_value and trained == of_value | of_policy and not of_value & of_policy
    frozen = [p for p in model.parameters() if not p.requires_grad and p.data_ptr() not in base]
    adapters = [p for name in ("reference", "reward") for p in adapter_parameters(model, name)]
    assert {id(p) for p in frozen} - {id(p) for p in adapters} == {id(model.score.weight)}


def adapter_parameters(model, name):
    with use_adapter(model, name):
        heads = list(model.score.parameters()) if HEAD in model.lora_originals else []
        return [p for _, layer in lora_modules(model) for p in (layer.lora_a, layer.lora_b)] + heads


def test_micro_batches_cover_every_row_once():
    for count in (1, 5, 8, 13):
        for minibatches in (1, 2, 5):
            plan = micro_batches(range(count), minibatches, 3)
            rows = [[row for rows in minibatch for row in rows] for minibatch in plan]
            assert [index for row in rows for index in row] == list(range(count))
            assert len(plan) == min(minibatches, count)
            assert max(map(len, rows)) - min(map(len, rows)) <= 1
            assert all(1 <= len(part) <= 3 for minibatch in plan for part in minibatch)


# Runs


@pytest.mark.parametrize("from_adapter", [False, True])
@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("lora", "bfloat16"), ("qlora", "float32")])
def test_the_first_minibatch_has_ratio_1_and_the_first_rollout_kl_0(
    tmp_path, model_dir, data, from_adapter, method, dtype
):
    changes = {
        "method": method,
        "dtype": dtype,
        "ppo_epochs": 1,
        "minibatches": 1,
        "max_steps": 2,
        "kl_estimator": "k3",
    }
    if from_adapter:
        an_sft_adapter(tmp_path / "sft")
        changes["adapter"] = str(tmp_path / "sft")
    run_ppo(settings(tmp_path / "out", model_dir, data, **changes), progress=False)
    first, second = steps_of(tmp_path / "out")
    assert first["objective/kl"] == 0 and second["objective/kl"] > 0
    for record in (first, second):
        assert record["val/ratio"] == 1 and record["val/ratio_var"] == 0
        assert record["policy/clipfrac"] == record["policy/approxkl"] == record["policy/first_approxkl"] == 0


def test_a_run_writes_every_metric_its_samples_and_an_adapter_for_generate(tmp_path, model_dir, data):
    from peft import PeftModel

    out, seen = tmp_path / "out", []
    config = settings(out, model_dir, data, eval_steps=2, missing_eos_penalty=1.0, kl_target=0.5, kl_horizon=50)
    result = run_ppo(config, callbacks=[seen.append], progress=False)
    files = (
        "adapter_config.json adapter_model.safetensors checkpoint-last config.yaml metrics.jsonl ppo.png samples.jsonl"
    )
    assert sorted(path.name for path in out.iterdir()) == files.split()
    assert seen == read_lines(out / "metrics.jsonl")
    steps = steps_of(out)
    assert [record["step"] for record in steps] == [1, 2, 3] and result.steps == 3
    assert [record["episode"] for record in steps] == [8, 16, 24] and result.episodes == 24
    for record in steps:
        assert all(math.isfinite(value) for value in record.values())
        reward = (
            record["objective/scores"] - (1 - record["val/num_eos_tokens"] / 8) + record["objective/non_score_reward"]
        )
        assert record["objective/rlhf_reward"] == pytest.approx(reward, abs=1e-6)
        assert 0 < record["objective/entropy"] < math.log(340)
        assert 1 <= record["val/response_length"] <= 8 and record["policy/minibatches"] == 4
    kl_coefs = [record["objective/kl_coef"] for record in steps]
    assert kl_coefs[0] == 0.05 and kl_coefs[1] == pytest.approx(0.05 * (1 - 0.2 * 8 / 50))
    names = {"grad_norm", "lr", "loss/policy", "loss/value", "val/clipfrac", "val/explained_variance", *TIMINGS}
    assert names - {"eval_seconds"} <= steps[0].keys()
    evals = [record for record in seen if "eval_score" in record]
    assert [record["step"] for record in evals] == [0, 2, 3]
    assert (result.first_eval_score, result.eval_score) == (evals[0]["eval_score"], evals[-1]["eval_score"])
    samples = read_lines(out / "samples.jsonl")
    assert [line["step"] for line in samples] == [0] * 4 + [2] * 4 + [3] * 4
    assert samples[0]["prompt"] == tiny_records(24)[0]["instruction"]
    scores = [line["score"] for line in samples[:4]]
    assert scores == vowels(None, [line["response"] for line in samples[:4]])
    assert evals[0]["eval_score"] == pytest.approx(sum(scores) / 4)
    assert PPOConfig.from_yaml(out / "config.yaml") == config

    tensors = load_file(out / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    ids = torch.tensor([PROMPTS[1]])
    ours = load_adapter(tiny_llama(), out).eval()(input_ids=ids).logits
    theirs = PeftModel.from_pretrained(tiny_llama(), out).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - tiny_llama().eval()(input_ids=ids).logits).abs().max() > 1e-3

    with pytest.raises(FileExistsError, match="holds another run"):
        run_ppo(config, progress=False)
    finished = run_ppo(dataclasses.replace(config, resume=True), progress=False)
    assert (finished.steps, finished.score, finished.eval_score) == (3, None, result.eval_score)
    assert read_lines(out / "metrics.jsonl") == seen


@pytest.mark.parametrize("seed", range(2))
def test_a_rule_is_learned_within_seconds(tmp_path, model_dir, data, seed):
    """From about 2 vowels in an answer, where the mean over the 24 evaluation prompts has a deviation of about 0.3."""
    config = settings(
        tmp_path, model_dir, data, seed=seed, max_steps=15, rollout_size=32, batch_size=32, rollout_batch_size=32,
        lr=1e-2, lr_scheduler="constant", kl_coef=0.02, eval_prompts=24, eval_steps=100,
    )  # fmt: skip
    result = run_ppo(config, progress=False)
    assert result.eval_score > result.first_eval_score + 1.5, (result.first_eval_score, result.eval_score)
    assert steps_of(tmp_path)[-1]["objective/kl"] > 1


def test_a_reward_model_scores_and_starts_the_value_model(tmp_path, model_dir, data):
    """What `reward` trained, normalised, gives an answer of PPO the score that it gives that chat."""
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps(tiny_pairs(16)))
    changes = {"normalize_samples": 6, "normalize_tokens": 4, "lr": 1e-2, "max_steps": 4, "dtype": "float32", "r": 4}
    reward_dir = tmp_path / "reward"
    run_reward(
        RewardConfig(model=str(model_dir), data=str(pairs), output_dir=str(reward_dir), **changes), progress=False
    )
    model = tiny_llama()
    with torch.no_grad():
        # Some answers are to end, and to be texts that tokenise as they were sampled.
        model.lm_head.weight[2] += 0.7 * model.lm_head.weight[2].sign()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    changes = {"reward": None, "reward_adapter": str(reward_dir), "lr": 5e-3, "eval_prompts": 24, "max_steps": 1}
    run_ppo(settings(out, tmp_path / "model", data, **changes), progress=False)
    judge, tokenizer = load_reward_model(reward_dir, str(tmp_path / "model"), "float32")
    assert judge.gain != 1
    checked = 0
    for line in read_lines(out / "samples.jsonl")[:24]:
        chat = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["response"]}]
        if line["ended"] and line["response"].isascii() and line["response"] == line["response"].strip():
            (score,) = judge.score_conversations(tokenizer, [chat]).tolist()
            assert line["score"] == pytest.approx(score, abs=1e-4), line
            checked += 1
    assert checked >= 2

    (reward_dir / "reward_normalization.json").unlink()
    with pytest.raises(ValueError, match=r"made with reward normalisation = .*, this run has \[1.0, 0.0\]"):
        run_ppo(settings(out, tmp_path / "model", data, **changes, resume=True), progress=False)
    an_sft_adapter(tmp_path / "sft")
    with pytest.raises(ValueError, match="has no 'score' among its modules_to_save"):
        changes["reward_adapter"] = str(tmp_path / "sft")
        run_ppo(settings(tmp_path / "other", model_dir, data, **changes), progress=False)


def test_target_kl_leaves_the_rollout(tmp_path, model_dir, data):
    run_ppo(settings(tmp_path / "out", model_dir, data, target_kl=1e-9, max_steps=1), progress=False)
    (record,) = steps_of(tmp_path / "out")
    # The first minibatch has moved nothing yet; the second finds the policy moved by it.
    assert (record["policy/minibatches"], record["policy/stopped_early"]) == (2, 1)


@pytest.mark.filterwarnings("error:.*neither trained")  # of the value model's head, which it trains
def test_micro_batches_and_checkpointing_change_nothing_but_memory(tmp_path, model_dir, data):
    changes = [{"batch_size": 8}, {"batch_size": 3}, {"batch_size": 3, "gradient_checkpointing": True}]
    records = []
    for index, change in enumerate(changes):
        config = settings(tmp_path / str(index), model_dir, data, max_steps=2, lr=1e-3, fuse_decoder=False, **change)
        run_ppo(config, progress=False)
        records.append([drop_timings(record) for record in steps_of(tmp_path / str(index))])
    assert records[1] == records[2]
    for one, other in zip(records[0], records[1], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_value_lr_is_the_value_models(tmp_path, model_dir, data):
    config = settings(tmp_path, model_dir, data, value_lr=1e-3, lr=1e-4, optimizer="loraplus", lr_ratio=8)
    roles = tiny_roles()
    optimizer = ppo.Learner(roles, config).optimizer
    of_value = {id(parameter) for parameter in roles.value_parameters()}
    rates = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in roles.model.named_parameters():
        if parameter.requires_grad:
            lr = 1e-3 if id(parameter) in of_value else 1e-4
            assert rates.pop(id(parameter)) == pytest.approx(lr * (8 if name.endswith("lora_b") else 1)), name
    assert not rates


def test_the_command_line_and_generate_with_the_result(tmp_path, model_dir):
    (tmp_path / "prompts.txt").write_text("red apple\ngreen pear\n")
    (tmp_path / "more.jsonl").write_text('{"prompt": "blue plum"}\n')
    (tmp_path / "rule.py").write_text(
        "import math\n"
        "def score(prompts, responses):\n    return [len(text) for text in responses]\n"
        "def broken(prompts, responses):\n    return [math.nan for text in responses]\n"
    )
    out = tmp_path / "out"
    arguments = [
        "ppo", "--model", model_dir, "--data", tmp_path / "prompts.txt", "--data", tmp_path / "more.jsonl",
        "--dtype", "float32", "--max-steps", 1, "--rollout-size", 4, "--max-new-tokens", 6, "--output-dir", out,
        "--lr", 1e-2,
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*map(str, arguments), "--reward", f"{tmp_path / 'rule.py'}:score"])
    assert result.exit_code == 0, result.output
    assert "data: 3 prompts" in result.output and "adapter, metrics, samples and plots:" in result.output
    generate = ["generate", "--model", model_dir, "--adapter", out, "--prompt", "red apple", "--max-new-tokens", 4]
    assert CliRunner().invoke(app, list(map(str, generate))).exit_code == 0
    arguments[arguments.index(out)] = tmp_path / "broken"
    result = CliRunner().invoke(app, [*map(str, arguments), "--reward", f"{tmp_path / 'rule.py'}:broken"])
    assert result.exit_code == 2
    assert "error: step 0: the reward function broken returned nan for the prompt 'red apple'" in result.output
    assert "Traceback" not in result.output


# What goes wrong


def drop_timings(record):
    return {name: value for name, value in record.items() if name not in TIMINGS}


KILLED = """
import os, signal, sys
import tiny_ppo as t
def callback(record):
    if "loss" in record and record["step"] == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
t.run_for_resume(*sys.argv[1:4], callbacks=[callback])
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path, model_dir, data):
    run_for_resume(tmp_path / "whole", model_dir, data)
    process = run_python(KILLED, tmp_path / "killed", model_dir, data, 5)
    assert process.returncode == -signal.SIGKILL, process.stderr
    killed = steps_of(tmp_path / "killed")
    assert killed[-1]["step"] == 5
    state = json.loads((tmp_path / "killed" / "checkpoint-last" / "training_state.json").read_text())
    assert state["step"] == 4
    # What other code draws must not matter.
    torch.manual_seed(99)
    run_for_resume(tmp_path / "killed", model_dir, data, resume=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole, resumed = (
            [drop_timings(line) for line in read_lines(tmp_path / run / name)] for run in ("whole", "killed")
        )
        assert whole == resumed
    for name in ("adapter_model.safetensors", "checkpoint-last/training_state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    with pytest.raises(ValueError, match=r"made with kl_coef = 0.05, this run has 0.1"):
        run_for_resume(tmp_path / "whole", model_dir, data, resume=True, kl_coef=0.1)


def test_more_steps_and_places_that_moved(tmp_path, model_dir, data, monkeypatch):
    """At a constant rate three steps and three more are six, whatever model and reward function are called by."""
    (tmp_path / "rules.py").write_text("from tiny_ppo import vowels")
    rate = {"lr_scheduler": "constant", "warmup_ratio": 0.0}

    def run(name, model, rule, **changes):
        config = settings(tmp_path / name, model, data, reward=f"{rule}:vowels", save_steps=3, eval_steps=3)
        return run_ppo(dataclasses.replace(config, **rate, **changes), progress=False)

    run("whole", model_dir, tmp_path / "rules.py", max_steps=6)
    run("out", model_dir, tmp_path / "rules.py", max_steps=3)
    shutil.copytree(model_dir, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert run("out", "moved/", "rules.py", max_steps=6, resume=True).steps == 6
    file = "checkpoint-last/training_state.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    with pytest.raises(ValueError, match="max_steps 5 is 5 steps, and 6 are done"):
        run("out", "moved", "rules.py", max_steps=5, resume=True)


class Faulty:
    """A reward function that fails at its call number `at`, the evaluation before the first step being number 0."""

    def __init__(self, at, how):
        self.at, self.how, self.calls = at, how, 0

    def __call__(self, prompts, responses):
        scores = vowels(prompts, responses)
        if len(responses) > 1:
            self.calls += 1
            self.bad = prompts[1]
        if self.calls > self.at and self.bad in prompts:
            if self.how == "raises":
                raise KeyError("no score")
            scores[prompts.index(self.bad)] = float(self.how)
        return scores


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (
            "raises",
            r"step 2: the reward function Faulty raised KeyError: 'no score', for the prompt '.+' and the answer",
        ),
        ("nan", "step 2: the reward function Faulty returned nan for the prompt '.+' and the answer"),
        ("-inf", "step 2: the reward function Faulty returned -inf for the prompt"),
    ],
)
def test_a_bad_reward_names_prompt_and_step_and_the_run_goes_on_from_there(tmp_path, model_dir, data, how, match):
    with pytest.raises(RewardError, match=match):
        run_ppo(settings(tmp_path / "bad", model_dir, data), progress=False, reward=Faulty(2, how))
    state = json.loads((tmp_path / "bad" / "checkpoint-last" / "training_state.json").read_text())
    assert state["step"] == 1
    run_ppo(settings(tmp_path / "bad", model_dir, data, resume=True), progress=False, reward=vowels)
    run_ppo(settings(tmp_path / "good", model_dir, data), progress=False, reward=vowels)
    bad, good = ([drop_timings(record) for record in steps_of(tmp_path / name)] for name in ("bad", "good"))
    assert bad == good


def test_a_bad_reward_in_an_evaluation_is_evaluated_again(tmp_path, model_dir, data):
    # Call 4 of 6 is the evaluation after step 2.
    config = settings(tmp_path / "bad", model_dir, data, eval_steps=2)
    with pytest.raises(RewardError, match="step 2: "):
        run_ppo(config, progress=False, reward=Faulty(3, "nan"))
    run_ppo(dataclasses.replace(config, resume=True), progress=False, reward=vowels)
    run_ppo(dataclasses.replace(config, output_dir=str(tmp_path / "good")), progress=False, reward=vowels)
    for name in ("metrics.jsonl", "samples.jsonl"):
        bad, good = ([drop_timings(line) for line in read_lines(tmp_path / run / name)] for run in ("bad", "good"))
        assert bad == good


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_bad_rewards_may_be_skipped_and_are_counted(tmp_path, model_dir, data, how):
    config = settings(tmp_path, model_dir, data, bad_rewards="skip")
    result = run_ppo(config, progress=False, reward=Faulty(2, how))
    steps = steps_of(tmp_path)
    assert [record["skipped"] for record in steps] == [0, 1, 2]
    assert [record["episode"] for record in steps] == [8, 15, 22]
    assert result.episodes == 22 and all(math.isfinite(record["loss"]) for record in steps)
    shown = read_lines(tmp_path / "samples.jsonl")[-4:]
    assert [line["score"] is None for line in shown] == [False, True, False, False]


def fingerprint(prompt, text):
    """A score that no other answer, and not the same one to another prompt, has; NaN for about every third."""
    number = zlib.crc32(f"{prompt}|{text}".encode())
    return math.nan if number % 3 == 0 else number / 2**32


def by_prompts(prompts, responses):
    return [fingerprint(*pair) for pair in zip(prompts, responses, strict=True)]


def by_records(prompts, responses, records):
    return by_prompts([record["instruction"] for record in records], responses)


def raising(prompts, responses):
    scores = by_prompts(prompts, responses)
    if not all(map(math.isfinite, scores)):
        raise ValueError("no score")
    return scores


@pytest.fixture
def learned(monkeypatch):
    """(episode, score) of each answer that PPO learns from, a list for each step."""
    steps, rollout = [], Learner.rollout

    def spied(self, episodes, scores, kl_coef):
        steps.append(list(zip(episodes, scores, strict=True)))
        return rollout(self, episodes, scores, kl_coef)

    monkeypatch.setattr(Learner, "rollout", spied)
    return steps


# Rollouts of 8 answers to prompts of many lengths, of which 3 at a time are sampled, and as many scored.
SKIPPING = {"bad_rewards": "skip", "rollout_batch_size": 3, "batch_size": 3, "max_steps": 2, "eval_prompts": 8}


@pytest.mark.parametrize("function", [by_prompts, by_records, raising])
def test_answers_keep_their_own_scores_where_others_are_left_out(tmp_path, model_dir, data, learned, function):
    run_ppo(settings(tmp_path, model_dir, data, **SKIPPING), progress=False, reward=function)
    tokenizer = tiny_tokenizer()
    prompts = {tuple(encode_prompt(tokenizer, row["instruction"])): row["instruction"] for row in tiny_records(24)}
    for pairs in learned:
        assert 3 <= len(pairs) < 8
        for episode, score in pairs:
            ids = episode.response[: -1 if episode.ended else None]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert score == fingerprint(prompts[tuple(episode.prompt)], text)
    assert [record["skipped"] for record in steps_of(tmp_path)] == [8 - len(learned[0]), 16 - sum(map(len, learned))]
    scores = [line["score"] for line in read_lines(tmp_path / "samples.jsonl")]
    expected = [fingerprint(line["prompt"], line["response"]) for line in read_lines(tmp_path / "samples.jsonl")]
    assert scores == [score if math.isfinite(score) else None for score in expected] and None in scores


def test_answers_keep_the_scores_of_the_reward_model_where_others_are_left_out(
    tmp_path, model_dir, data, learned, monkeypatch
):
    a_reward_adapter(tmp_path / "reward")
    rewards, left_out = Roles.rewards, []

    def failing(self, batch):
        scores = rewards(self, batch)
        for row, length in enumerate(batch.lengths.tolist()):
            response = batch.labels[row, :length].tolist()
            if sum(response) % 3 == 0:
                scores[row] = math.nan
                left_out.append(response)
        return scores

    monkeypatch.setattr(Roles, "rewards", failing)
    changes = {**SKIPPING, "reward": None, "reward_adapter": str(tmp_path / "reward"), "eval_prompts": 0}
    run_ppo(settings(tmp_path / "out", model_dir, data, **changes), progress=False)
    judge, _ = load_reward_model(tmp_path / "reward", str(model_dir), "float32")
    for pairs in learned:
        assert 3 <= len(pairs) < 8
        for episode, score in pairs:
            assert sum(episode.response) % 3 != 0
            row = np.array([*episode.prompt, *episode.response], dtype=np.int32)
            assert score == pytest.approx(judge.score_rows([row]).item(), abs=1e-4)
    assert len({round(score, 3) for pairs in learned for _, score in pairs}) > 5
    assert len(left_out) == steps_of(tmp_path / "out")[-1]["skipped"] == 16 - sum(map(len, learned))


def test_prompts_that_leave_no_room_are_counted_and_left_out(tmp_path, model_dir, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("red\n" + "apple " * 100 + "\ngreen\n")
    config = settings(tmp_path / "out", model_dir, path, max_length=40, max_steps=1)
    run_ppo(config, reward=vowels)
    assert "2 prompts; 1 left out, longer than 32 tokens (max_length 40, context 256" in capsys.readouterr().out
    path.write_text("apple " * 100)
    with pytest.raises(ValueError, match="no prompt leaves room for an answer: data: 0 prompts; 1 left out"):
        run_ppo(dataclasses.replace(config, output_dir=str(tmp_path / "other")), progress=False, reward=vowels)


def test_empty_answers_are_scored_and_counted(tmp_path, model_dir, data):
    """The end token is made likely: an answer of it alone is a choice of the policy, not an error."""
    seen = []

    def reward(prompts, responses, records):
        seen.extend(responses)
        assert all(record["instruction"] == prompt for record, prompt in zip(records, prompts, strict=True))
        return [float(text == "") for text in responses]

    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[2] = 3 * model.lm_head.weight[2].sign()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run_ppo(settings(tmp_path / "out", tmp_path / "model", data, max_steps=1), progress=False, reward=reward)
    (record,) = steps_of(tmp_path / "out")
    answers = seen[4:12]
    assert "" in answers
    assert record["val/empty_responses"] == sum(not text.strip() for text in answers)
    assert record["objective/scores"] == answers.count("") / 8


def test_more_than_one_process_is_refused_by_name(tmp_path, model_dir, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2: ppo runs in one process"):
        run_ppo(settings(tmp_path, model_dir, data), progress=False)


def test_a_reward_function_beside_a_reward_model_is_refused(tmp_path, model_dir, data):
    config = settings(tmp_path / "out", model_dir, data, reward=None, reward_adapter="x")
    with pytest.raises(ValueError, match="reward is a function and config.reward None; allowed: a name for it in"):
        run_ppo(config, progress=False, reward=lambda prompts, answers: [0.0] * len(answers))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"reward": None}, "give one of reward and reward_adapter, got reward None"),
        ({"reward_adapter": "x"}, "give one of reward and reward_adapter, got reward 'tiny_ppo:vowels'"),
        ({"method": "prefix"}, "method must be one of lora, qlora, got 'prefix'"),
        ({"lora_dropout": 0.1}, "lora_dropout must be left out, since PPOConfig has no use for it, got 0.1"),
        ({"temperature": 0}, "temperature must be finite and > 0"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be left out, since PPOConfig"),
        ({"max_length": 8}, r"max_length must be > max_new_tokens \(8\), got 8"),
        ({"dual_clip": 0.5}, "dual_clip must be > 1 or left out"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        settings(tmp_path, "m", "d", **changes)


def test_reward_functions_are_found_and_their_faults_named(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text("def score(prompts, responses):\n    return [1.0] * len(prompts)\n")
    assert load_function(f"{tmp_path / 'my_reward.py'}:score")(["a"], ["b"]) == [1.0]
    monkeypatch.chdir(tmp_path)
    assert load_function("my_reward:score")(["a"], ["b"]) == [1.0]
    for spec, match in (
        ("my_reward", "allowed: module:function"),
        ("my_reward:absent", "my_reward has no function 'absent'"),
        ("not_there:score", "can't import not_there"),
        ("absent.py:score", "absent.py does not exist"),
    ):
        with pytest.raises(ValueError, match=match):
            load_function(spec)
    reward = FunctionReward(lambda prompts, responses: [1.0])
    with pytest.raises(RewardError, match="it returned 1 numbers for 2 answers, for 2 answers together, but not"):
        reward(["a", "b"], ["c", "d"], [None, None], 3)


def test_answers_are_scored_with_the_template_that_the_reward_model_knows(tmp_path):
    own, reward, other = "[{{ messages[0]['content'] }}]", tmp_path / "reward", tmp_path / "policy"
    for directory in (reward, other):
        directory.mkdir()
    (reward / "chat_template.jinja").write_text(own)
    config = settings(tmp_path, "m", "d", reward=None, reward_adapter=str(reward))
    tokenizer = tiny_tokenizer()
    ppo._set_template(tokenizer, config)
    assert tokenizer.chat_template == own
    (other / "chat_template.jinja").write_text(own + "!")
    with pytest.warns(UserWarning, match="reward.* is not the chat template in use"):
        ppo._set_template(tokenizer, dataclasses.replace(config, adapter=str(other)))
    assert tokenizer.chat_template == own + "!"
    with pytest.warns(UserWarning, match="reward.* is not the chat template in use"):
        ppo._set_template(tokenizer, dataclasses.replace(config, chat_template="{{ 'asked for' }}"))


def test_a_template_that_refuses_a_prompt():
    with pytest.raises(ValueError, match="^prompt: the chat template refuses .*no system"):
        encode_prompt(tiny_tokenizer("{{ raise_exception('no system') }}"), "a")
