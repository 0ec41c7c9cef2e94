"""Reward models: training, files that PEFT reads, evaluation, normalisation, resuming."""

import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import torch
from places import run_python
from tiny_chat import tiny_llama, tiny_tokenizer
from tiny_pairs import pairs, tiny_pairs
from tiny_sft import read_metrics

from lora_kernels.io.adapters import load_adapter, save_adapter
from lora_kernels.methods.lora import LoRAConfig, inject
from lora_kernels.train import reward
from lora_kernels.train.config import RewardConfig
from lora_kernels.train.launch import make_accelerator
from lora_kernels.train.reward import (
    Evaluation,
    RewardLoss,
    RewardModel,
    attach_head,
    evaluate_pairs,
    load_reward_model,
    read_normalization,
    rewards,
    run_reward,
    train_reward,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward")
    tiny_llama().save_pretrained(directory / "model")
    tiny_tokenizer(pad_is_eos=True).save_pretrained(directory / "model")
    for name, count, seed in (("train", 48, 0), ("eval", 20, 1)):
        lines = [json.dumps(record) + "\n" for record in tiny_pairs(count, seed)]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    return directory


def settings(output_dir, **changes):
    defaults = {"model": "tiny", "data": "tiny", "r": 4, "lora_alpha": 8, "lr": 2e-2, "dtype": "float32"}
    return RewardConfig(**{**defaults, "output_dir": str(output_dir), **changes})


def reward_model(**changes):
    model = attach_head(tiny_llama())
    torch.manual_seed(1)
    return inject(model, LoRAConfig(**{"r": 4, "lora_alpha": 8, "modules_to_save": ["score"], **changes}))


@pytest.fixture(scope="module")
def trained(files):
    out, seen = files / "out", []
    config = settings(
        out, model=str(files / "model"), data=[str(files / "train.jsonl")], eval_data=[str(files / "eval.jsonl")],
        epochs=6, batch_size=8, normalize_samples=12, normalize_tokens=6, center_coef=0.01,
    )  # fmt: skip
    result = run_reward(config, callbacks=[seen.append], progress=False)
    return out, config, result, seen


def test_run_from_files(trained):
    out, config, result, seen = trained
    metrics = read_metrics(out)
    assert seen == metrics
    train = [record for record in metrics if "loss" in record]
    evals = [record for record in metrics if "eval_loss" in record]
    assert result.steps == len(train) == 36
    assert train[0]["loss"] > 0.3 and train[-1]["loss"] < 0.1
    assert {"accuracy", "margin", "reward_chosen", "reward_rejected"} <= train[0].keys()
    assert {"eval_accuracy", "eval_margin", "eval_reward_chosen", "eval_reward_rejected"} <= evals[0].keys()
    assert evals[-1]["eval_accuracy"] > 0.9 and evals[-1]["eval_margin"] > 2
    margin = evals[-1]["eval_reward_chosen"] - evals[-1]["eval_reward_rejected"]
    assert evals[-1]["eval_margin"] == pytest.approx(margin, rel=1e-4)
    files = "adapter_config.json adapter_model.safetensors checkpoint-last config.yaml loss.png metrics.jsonl"
    files += " reward_eval.json reward_normalization.json rewards.png"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    assert (out / "rewards.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["task_type"], saved["modules_to_save"]) == ("SEQ_CLS", ["score"])
    # The adapter that was saved is the best one, and that is what was judged.
    report = json.loads((out / "reward_eval.json").read_text())
    assert report["data"] == config.eval_data[0]
    best = min(evals, key=lambda record: record["eval_loss"])
    for name in ("accuracy", "margin", "reward_chosen"):
        assert report[name] == pytest.approx(best[f"eval_{name}"], abs=1e-5), name
    finished = run_reward(dataclasses.replace(config, resume=True, normalize_samples=0), progress=False)
    assert finished.steps == result.steps and read_metrics(out) == metrics


def test_peft_gives_the_same_scores(trained, files):
    from peft import AutoPeftModelForSequenceClassification

    out = trained[0]
    ours, tokenizer = load_reward_model(out, dtype="float32")
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1, dtype=torch.float32).eval()
    gain, bias = read_normalization(out)
    assert gain != 1
    # Row by row: PEFT finds the last token by its pad token, which in this model ends turns too.
    for ids, _ in pairs(6, seed=3).chosen:
        row = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            expected = theirs(input_ids=row).logits.item()
            assert rewards(ours.model, row, torch.tensor([len(ids)])).item() == pytest.approx(expected, abs=1e-5)
            assert ours.score(row, torch.tensor([len(ids)])).item() == pytest.approx(gain * expected + bias, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert tokenizer.chat_template


def test_what_peft_saves_is_loaded(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    config = tiny_llama().config
    config.num_labels = 1
    torch.manual_seed(5)
    theirs = get_peft_model(
        LlamaForSequenceClassification(config), LoraConfig(task_type="SEQ_CLS", r=3, init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    base = tiny_llama()
    state = theirs.get_base_model().model.state_dict()
    base.model.load_state_dict({k.replace(".base_layer", ""): v for k, v in state.items() if "lora_" not in k})
    ours = load_adapter(attach_head(base), tmp_path, trainable=False).eval()
    ids = torch.tensor([[1, 7, 9, 4]])
    expected = theirs.eval()(input_ids=ids).logits.item()
    assert rewards(ours, ids, torch.tensor([4])).item() == pytest.approx(expected, abs=1e-5)


def test_normalised_rewards_have_mean_0_and_deviation_1(trained, files):
    values = json.loads((trained[0] / "reward_normalization.json").read_text())
    assert values["samples"] == 12
    assert values["gain"] * values["mean"] + values["bias"] == pytest.approx(0, abs=1e-9)
    assert values["gain"] * values["std"] == pytest.approx(1)
    model, tokenizer = load_reward_model(trained[0], dtype="float32")
    raw = RewardModel(model.model)
    chats = [
        [{"role": "user", "content": "say one"}, {"role": "assistant", "content": text}]
        for text in ("two apple", "two dog", "")
    ]
    scores = model.score_conversations(tokenizer, chats, batch_size=2)
    expected = values["gain"] * raw.score_conversations(tokenizer, chats) + values["bias"]
    torch.testing.assert_close(scores, expected)
    assert scores[0] > scores[1]
    (files / "bad").mkdir()
    (files / "bad" / "reward_normalization.json").write_text('{"gain": 1}')
    with pytest.raises(ValueError, match="reward_normalization.json must hold numbers gain and bias"):
        read_normalization(files / "bad")
    assert read_normalization(files) == (1, 0)


def learned_positions(directory):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 340, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def test_normalisation_takes_the_prompts_that_leave_room_for_an_answer(tmp_path, capsys, monkeypatch):
    """With as many tokens as the model has positions for, and answers that are longer as text than as tokens."""
    model, seen = learned_positions(tmp_path / "model"), []
    records = [*tiny_pairs(6), {"prompt": "apple " * 80, "chosen": "one", "rejected": "two"}]
    data, prompts = tmp_path / "data.json", tmp_path / "prompts.txt"
    data.write_text(json.dumps(records))
    prompts.write_text("say one\n" + "apple " * 80 + "\nsay two\n" + "pear " * 50)
    generate = reward.generate
    monkeypatch.setattr(reward, "generate", lambda *a, **k: seen.append((a, k)) or generate(*a, **k))
    monkeypatch.setattr(reward, "train_reward", lambda *a, **k: seen.append("training") or train_reward(*a, **k))
    changes = {"normalize_samples": 5, "normalize_tokens": 20, "normalize_data": str(prompts), "max_length": 64}
    with pytest.warns(UserWarning, match="dropped 1 pairs"):
        run_reward(settings(tmp_path / "out", model=model, data=str(data), max_steps=1, **changes))
    said = capsys.readouterr().out
    assert "normalisation: 2 prompts; 2 left out, longer than 44 tokens (max_length 64, context 64, less" in said
    assert "less normalize_tokens 20)" in said
    assert seen.index("training") == len(seen) - 1
    asked = [prompt for (_, _, prompts, *_), _ in seen[:-1] for prompt in prompts]
    assert sorted(set(asked)) == ["say one", "say two"] and len(asked) == 5
    values = json.loads((tmp_path / "out" / "reward_normalization.json").read_text())
    # Text of arbitrary bytes has more tokens than were sampled: what no longer fits was left out and counted.
    assert 2 <= values["samples"] <= 5
    assert (f"{values['samples']} answers, {5 - values['samples']} left out" in said) is (values["samples"] < 5)


@pytest.mark.parametrize("how", ["no room", "one answer", "absent", "empty"])
def test_what_can_not_be_normalised_is_said_before_training(files, tmp_path, monkeypatch, how):
    prompts = tmp_path / "prompts.txt"
    text = {"no room": "apple " * 300, "one answer": "say one", "empty": "\n"}
    if how in text:
        prompts.write_text(text[how])
    messages = {
        "no room": r"prompts.txt: no prompt leaves room for an answer: normalisation: 0 prompts; 1 left out",
        "one answer": r"prompts.txt: normalize_samples needs at least 2 different answers: normalisation: 3 answers",
        "absent": r"prompts.txt does not exist",
        "empty": r"prompts.txt: no prompt leaves room for an answer: normalisation: 0 prompts",
    }
    monkeypatch.setattr(reward, "generate", lambda model, tokenizer, prompts, *_, **__: ["one"] * len(prompts))
    config = settings(
        tmp_path / "out", model=str(files / "model"), data=str(files / "train.jsonl"), normalize_samples=3,
        normalize_data=str(prompts), normalize_tokens=8,
    )  # fmt: skip
    with pytest.raises((ValueError, FileNotFoundError), match=messages[how]):
        run_reward(config, progress=False)
    assert not (tmp_path / "out").exists()


def test_rewards_that_are_all_the_same_are_left_as_they_are():
    constant = RewardModel(torch.nn.Identity())
    constant.score_rows = lambda rows: torch.full((len(rows),), 2.0)
    samples = [np.arange(3), np.arange(5)]
    with pytest.warns(UserWarning, match="not normalised: those of 2 samples have mean 2.0 and deviation 0.0"):
        assert reward._normalization(constant, samples, 1, make_accelerator()) is None


TWO_PROCESSES = """
import sys
from pathlib import Path
import test_reward as t
t.run_for_processes(sys.argv[1], Path(sys.argv[2]), gradient_accumulation_steps=1)
assert all((Path(sys.argv[2]) / name).is_file() for name in t.AT_THE_END)
"""
AT_THE_END = ("loss.png", "reward_eval.json", "reward_normalization.json", "rewards.png")


def run_for_processes(files, output_dir, **changes):
    config = settings(
        output_dir, model=f"{files}/model", data=f"{files}/train.jsonl", eval_data=f"{files}/eval.jsonl", max_steps=2,
        lr=1e-3, normalize_samples=7, normalize_tokens=5, batch_size=2, **changes,
    )  # fmt: skip
    run_reward(config, progress=False)


def test_two_processes_judge_and_normalise_like_one(files, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = run_python(str(script), files, tmp_path / "two", launcher=launcher)
    assert process.returncode == 0, process.stderr
    run_for_processes(files, tmp_path / "one", gradient_accumulation_steps=2)
    for name in ("reward_eval.json", "reward_normalization.json"):
        one, two = (json.loads((tmp_path / run / name).read_text()) for run in ("one", "two"))
        assert one.pop("data", None) == two.pop("data", None)
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5), name
        assert one.get("samples", 7) == 7 and one.get("pairs", 20) == 20


def test_a_reward_adapter_needs_a_head(trained):
    with pytest.raises(ValueError, match="task_type is 'SEQ_CLS', a reward model or classifier, and the model has no"):
        load_adapter(tiny_llama(), trained[0])
    with pytest.raises(ValueError, match="LlamaForCausalLM, which has a module 'score'"):
        attach_head(attach_head(tiny_llama()))


def test_head():
    model = attach_head(tiny_llama(hidden_size=1024, num_attention_heads=4, intermediate_size=8), seed=3)
    head = model.score
    assert head.bias is None and head.weight.shape == (1, 1024) and head.weight.dtype == torch.float32
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    other = tiny_llama(hidden_size=1024, num_attention_heads=4, intermediate_size=8)
    before = torch.get_rng_state()
    assert torch.equal(head.weight, attach_head(other, seed=3).score.weight)
    assert torch.equal(before, torch.get_rng_state())


def test_the_last_token_is_told_by_the_length_and_padding_does_not_matter():
    model = reward_model().eval()
    data = pairs()
    batch = data.batch([0, 1, 2])
    assert (batch["input_ids"] == 2).sum() > 6  # the end token pads
    together = rewards(model, batch["input_ids"], batch["lengths"])
    rows = [data.chosen[i] for i in range(3)] + [data.rejected[i] for i in range(3)]
    for score, (ids, _) in zip(together, rows, strict=True):
        row = torch.from_numpy(ids).long()[None]
        hidden = model.model(input_ids=row).last_hidden_state[0, -1]
        torch.testing.assert_close(score, (model.score.weight[0] @ hidden), rtol=1e-4, atol=1e-5)


def test_sums_over_pairs():
    model = reward_model()
    data = pairs()
    module = RewardLoss(model, center_coef=0.1)
    sums = module(**data.batch(range(5)))
    parts = [module(**data.batch([i])) for i in range(5)]
    for name, value in sums.items():
        torch.testing.assert_close(value.float(), sum(part[name].float() for part in parts), rtol=1e-4, atol=1e-5)
    sums["loss"].backward()
    assert model.score.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_margin_and_centring_do_something(tmp_path):
    margins = pairs()
    margins.margins[:] = 3.0
    results = {}
    for name, data, changes in (
        ("plain", pairs(), {}),
        ("margin", margins, {}),
        ("centred", pairs(), {"center_coef": 1.0}),
    ):
        model = reward_model()
        train_reward(model, data, None, settings(tmp_path / name, epochs=8, **changes), progress=False)
        results[name] = evaluate_pairs(RewardModel(model.eval()), pairs()).summary()
    assert results["margin"]["margin"] > results["plain"]["margin"] + 1
    mean = {name: abs(value["reward_chosen"] + value["reward_rejected"]) for name, value in results.items()}
    assert mean["centred"] < 0.5 * mean["plain"]


def test_base_modules_have_the_paths_of_the_causal_lm():
    ours = {name for name, _ in reward_model().named_parameters() if "score" not in name}
    plain = inject(tiny_llama(), LoRAConfig(r=4, lora_alpha=8))
    assert ours == {name for name, _ in plain.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [{"method": "qlora"}, {"method": "dora"}, {"gradient_checkpointing": True, "lora_dropout": 0.1}],
    ids=["qlora", "dora", "checkpointing"],
)
def test_other_settings_run(files, tmp_path, changes):
    config = settings(
        tmp_path / "out", model=str(files / "model"), data=str(files / "train.jsonl"), max_steps=2, **changes
    )
    result = run_reward(config, progress=False)
    assert math.isfinite(result.loss)
    report = json.loads((tmp_path / "out" / "reward_eval.json").read_text())
    assert report["data"].endswith("train.jsonl (training data)") and report["pairs"] == 48


def test_evaluation_numbers():
    evaluation = Evaluation(np.array([2.0, 0.0, 1.0, 5.0]), np.array([0.0, 1.0, 1.0, 0.0]))
    values = evaluation.summary()
    assert (values["accuracy"], values["margin"], values["pairs"]) == (0.5, 1.5, 4)
    sigmoid = [1 / (1 + math.exp(-d)) for d in (2, -1, 0, 5)]
    assert values["loss"] == pytest.approx(-sum(map(math.log, sigmoid)) / 4)
    bins = evaluation.calibration()
    assert [count for *_, count in bins] == [1, 1, 1, 1]
    assert [right for _, right, _ in bins] == [0, 0, 1, 1]
    error = (0.5 + (1 - sigmoid[1]) + (1 - sigmoid[0]) + (1 - sigmoid[3])) / 4
    assert values["calibration_error"] == pytest.approx(error)


def test_config():
    with pytest.raises(ValueError, match="method must be one of dora, lora, qlora, got 'prefix'"):
        settings("out", method="prefix")
    with pytest.raises(ValueError, match="num_virtual_tokens must be left out, since RewardConfig has no use for it"):
        settings("out", num_virtual_tokens=6)
    with pytest.raises(ValueError, match="normalize_data must be left out with normalize_samples 0"):
        settings("out", normalize_data="x.jsonl")
    with pytest.raises(ValueError, match="normalize_samples must be 0 or >= 2, got 1"):
        settings("out", normalize_samples=1)
    with pytest.raises(ValueError, match=r"normalize_tokens must be < max_length \(64\), got 64"):
        settings("out", normalize_samples=2, max_length=64)
    with pytest.raises(ValueError, match="center_coef must be finite and >= 0, got -1"):
        settings("out", center_coef=-1)


KILLED = """
import os, signal, sys
import test_reward as t
def callback(record):
    if record["step"] == 9 and "loss" in record:
        os.kill(os.getpid(), signal.SIGKILL)
t.train_for_resume(sys.argv[1], callbacks=[callback])
"""


def train_for_resume(output_dir, callbacks=(), **changes):
    config = {"epochs": 2, "batch_size": 2, "save_steps": 5, "eval_steps": 4, "logging_steps": 3, "lr": 5e-3}
    model = reward_model(lora_dropout=0.3)
    config = settings(output_dir, lora_dropout=0.3, **config, **changes)
    return model, train_reward(model, pairs(), pairs(6, seed=9), config, callbacks=callbacks, progress=False)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    train_for_resume(tmp_path / "whole")
    process = run_python(KILLED, tmp_path / "killed")
    assert process.returncode == -signal.SIGKILL, process.stderr
    state = json.loads((tmp_path / "killed" / "checkpoint-last" / "training_state.json").read_text())
    assert state["step"] == 5
    assert {"loss", "accuracy", "margin"} <= state["window"].keys()
    train_for_resume(tmp_path / "killed", resume=True)
    whole, killed = (read_metrics(tmp_path / name) for name in ("whole", "killed"))
    for record in whole + killed:
        record.pop("tokens_per_second", None)
        record.pop("eval_seconds", None)
    assert whole == killed
    for name in ("adapter_model.safetensors", "checkpoint-last/training_state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_saved_and_loaded(tmp_path):
    model = reward_model()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1)
    save_adapter(model, tmp_path)
    batch = pairs().batch([0, 1])
    expected = rewards(model.eval(), batch["input_ids"], batch["lengths"])
    loaded = load_adapter(attach_head(tiny_llama(), seed=8), tmp_path).eval()
    assert torch.equal(rewards(loaded, batch["input_ids"], batch["lengths"]), expected)


def test_the_head_is_as_wide_as_what_the_decoder_gives():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 340}
    model = attach_head(OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16)))
    assert model.score.in_features == 16
    assert rewards(model, torch.randint(3, 300, (2, 5)), torch.tensor([5, 3])).shape == (2,)


def test_pairs_beyond_learned_positions(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=340, n_positions=8, n_embd=32, n_layer=1, n_head=2)
    model = inject(attach_head(GPT2LMHeadModel(config)), LoRAConfig(r=2, modules_to_save=["score"]))
    with pytest.raises(ValueError, match="exceeds the model's context of 8"):
        train_reward(model, pairs(), None, settings(tmp_path), progress=False)
