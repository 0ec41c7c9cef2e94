"""DPO: the reference, its log-probabilities in advance and on the fly, training with every method, resuming."""

import json
import math
import signal

import pytest
import torch
from places import run_python
from tiny_chat import tiny_llama, tiny_tokenizer
from tiny_models import perturb
from tiny_pairs import tiny_pairs
from tiny_sft import read_metrics

from lora_kernels.data.pairs import build_pairs
from lora_kernels.methods import FullConfig, PrefixConfig, PromptConfig, adapters_disabled, inject
from lora_kernels.methods.lora import LoRAConfig
from lora_kernels.train.config import DPOConfig
from lora_kernels.train.dpo import DPOLoss, reference_logprobs, run_dpo, train_dpo
from lora_kernels.train.launch import make_accelerator

CONFIGS = {
    "lora": LoRAConfig(r=4, lora_alpha=8),
    "lora with a head": LoRAConfig(r=4, lora_alpha=8, modules_to_save=["lm_head"]),
    "prefix": PrefixConfig(num_virtual_tokens=3, init="random"),
    "prompt": PromptConfig(num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dpo")
    tiny_llama().save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    for name, count, seed in (("train", 48, 0), ("eval", 20, 1)):
        lines = [json.dumps(record) + "\n" for record in tiny_pairs(count, seed)]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    return directory


def settings(output_dir, **changes):
    defaults = {"model": "tiny", "data": "tiny", "lr": 5e-3, "dtype": "float32", "beta": 0.3}
    return DPOConfig(**{**defaults, "output_dir": str(output_dir), **changes})


def pairs(count=24, seed=0):
    records = [(record, f"data:{i}") for i, record in enumerate(tiny_pairs(count, seed))]
    return build_pairs(records, tiny_tokenizer(), 128, "data")


def policy(method="lora"):
    torch.manual_seed(1)
    return inject(tiny_llama(), CONFIGS[method])


def full_logprobs(model, ids, mask):
    """Of one row, from the model's own logits."""
    row = torch.from_numpy(ids).long()[None]
    with torch.no_grad():
        logprobs = model(input_ids=row).logits[0, :-1].log_softmax(-1)
    picked = logprobs.gather(1, row[0, 1:, None])[:, 0]
    return picked[torch.from_numpy(mask[1:])].sum().item()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_run_from_files(files, tmp_path, loss):
    changes = {"lr": 5e-3, "beta": 0.3} if loss == "sigmoid" else {"loss": "ipo", "beta": 0.5, "lr": 1e-2}
    config = settings(
        tmp_path, model=str(files / "model"), data=str(files / "train.jsonl"), eval_data=str(files / "eval.jsonl"),
        epochs=4, batch_size=8, **changes,
    )  # fmt: skip
    result = run_dpo(config, progress=False)
    metrics = read_metrics(tmp_path)
    train = [record for record in metrics if "loss" in record]
    evals = [record for record in metrics if "eval_loss" in record]
    assert result.steps == len(train) == 24
    # Before the first step the policy is the reference.
    assert train[0]["loss"] == pytest.approx(math.log(2) if loss == "sigmoid" else 1.0, rel=1e-4)
    assert train[0]["reward_chosen"] == pytest.approx(0, abs=1e-4)
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]
    assert evals[-1]["eval_accuracy"] > 0.7 and evals[-1]["eval_margin"] > 0
    margin = evals[-1]["eval_reward_chosen"] - evals[-1]["eval_reward_rejected"]
    assert evals[-1]["eval_margin"] == pytest.approx(margin, rel=1e-3)
    names = "adapter_config.json adapter_model.safetensors checkpoint-last config.yaml loss.png metrics.jsonl"
    assert sorted(path.name for path in tmp_path.iterdir()) == names.split()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("method", CONFIGS)
def test_the_reference_is_the_model_without_adapters(method):
    model = policy(method)
    perturb(model)
    model.train()
    module, data = DPOLoss(model), pairs(7)
    found = reference_logprobs(module, data, 4, make_accelerator())
    assert found.shape == (7, 2) and module.training
    base = tiny_llama().eval()
    for side, rows in enumerate((data.chosen, data.rejected)):
        expected = [full_logprobs(base, *row) for row in rows]
        assert found[:, side] == pytest.approx(expected, rel=1e-4)
    policy_logprobs = [full_logprobs(model.eval(), *row) for row in data.chosen]
    assert abs(found[:, 0] - policy_logprobs).max() > 0.1

    on_the_fly = module(**data.batch(range(7)))
    data.ref_logprobs = found
    given = module(**data.batch(range(7)))
    for name, value in given.items():
        torch.testing.assert_close(value.float(), on_the_fly[name].float(), rtol=1e-4, atol=1e-4)
    d = 0.1 * (policy_logprobs - found[:, 0])
    assert given["reward_chosen"].item() == pytest.approx(d.sum(), rel=1e-4)


def test_the_gradient_is_that_of_the_formula_over_all_logits():
    model = policy()
    perturb(model, 0.1)
    data = pairs(3)
    with adapters_disabled(model):
        reference = [[full_logprobs(model, *row) for row in rows] for rows in (data.chosen, data.rejected)]
    reference = torch.tensor(reference)

    def logprobs(rows):
        sums = []
        for ids, mask in rows:
            row = torch.from_numpy(ids).long()[None]
            picked = model(input_ids=row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
            sums.append(picked[torch.from_numpy(mask[1:])].sum())
        return torch.stack(sums)

    d = logprobs(data.chosen) - reference[0] - logprobs(data.rejected) + reference[1]
    (-torch.log(torch.sigmoid(0.2 * d)).sum()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    DPOLoss(model, beta=0.2)(**data.batch(range(3)))["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    assert max(grad.abs().max() for grad in expected.values()) > 1e-3


def test_dropout_is_off_for_the_reference_only():
    torch.manual_seed(1)
    model = inject(tiny_llama(attention_dropout=0.3), LoRAConfig(r=4, lora_dropout=0.5)).train()
    module, data = DPOLoss(model), pairs(4)
    batch = data.batch(range(4))
    found = [module.reference(batch["input_ids"], batch["labels"]) for _ in range(2)]
    assert torch.equal(*found)
    sampled = [module.logprobs(batch["input_ids"], batch["labels"]) for _ in range(2)]
    assert not torch.equal(*sampled)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("precompute_ref", [True, False])
def test_virtual_tokens_learn(tmp_path, method, precompute_ref):
    config = settings(
        tmp_path, method=method, lr=5e-2, epochs=4, batch_size=8, num_virtual_tokens=3, precompute_ref=precompute_ref
    )
    train_dpo(policy(method), pairs(), None, config, progress=False)
    metrics = read_metrics(tmp_path)
    assert metrics[-1]["accuracy"] > 0.8 and metrics[-1]["loss"] < metrics[0]["loss"]


def test_full_fine_tuning_has_its_own_start_as_reference(tmp_path):
    config = settings(tmp_path, method="full", lr=1e-3, max_steps=6, batch_size=8)
    model = inject(tiny_llama(), FullConfig())
    data = pairs()
    train_dpo(model, data, None, config, progress=False)
    assert data.ref_logprobs[3, 0] == pytest.approx(full_logprobs(tiny_llama().eval(), *data.chosen[3]), rel=1e-4)
    metrics = read_metrics(tmp_path)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert metrics[-1]["loss"] < 0.6
    with pytest.raises(ValueError, match="precompute_ref must be true with method full, which has no adapters to turn"):
        settings(tmp_path, method="full", precompute_ref=False)


def test_config():
    assert settings("out", lr=None).lr == pytest.approx(2e-5)
    for changes, message in (
        ({"loss": "hinge"}, "loss must be one of sigmoid, ipo, got 'hinge'"),
        ({"beta": 0}, "beta must be finite and > 0, got 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing must be 0 with loss ipo, got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            settings("out", **changes)


KILLED = """
import os, signal, sys
import test_dpo as t
def callback(record):
    if record["step"] == 9 and "loss" in record:
        os.kill(os.getpid(), signal.SIGKILL)
t.train_for_resume(sys.argv[1], callbacks=[callback])
"""


def train_for_resume(output_dir, callbacks=(), **changes):
    config = {"epochs": 2, "batch_size": 2, "save_steps": 5, "eval_steps": 4, "logging_steps": 3, "lora_dropout": 0.3}
    torch.manual_seed(1)
    model = inject(tiny_llama(), LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.3))
    config = settings(output_dir, **config, **changes)
    return train_dpo(model, pairs(), pairs(6, seed=9), config, callbacks=callbacks, progress=False)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    train_for_resume(tmp_path / "whole")
    process = run_python(KILLED, tmp_path / "killed")
    assert process.returncode == -signal.SIGKILL, process.stderr
    state = json.loads((tmp_path / "killed" / "checkpoint-last" / "training_state.json").read_text())
    assert state["step"] == 5 and state["run"]["beta"] == 0.3
    train_for_resume(tmp_path / "killed", resume=True)
    whole, killed = (read_metrics(tmp_path / name) for name in ("whole", "killed"))
    for record in whole + killed:
        record.pop("tokens_per_second", None)
        record.pop("eval_seconds", None)
    assert whole == killed
    for name in ("adapter_model.safetensors", "checkpoint-last/training_state.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


TWO_PROCESSES = """
import sys
import test_dpo as t
t.train_for_processes(sys.argv[1], gradient_accumulation_steps=2)
"""


def train_for_processes(output_dir, **changes):
    # 9 rows in steps of 8: the second one has a single row, so one of two processes gets none.
    config = settings(output_dir, batch_size=2, **changes)
    return train_dpo(policy(), pairs(9), pairs(3, seed=9), config, progress=False)


def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = run_python(str(script), tmp_path / "two", launcher=launcher)
    assert process.returncode == 0, process.stderr
    train_for_processes(tmp_path / "one", gradient_accumulation_steps=4)
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [record.keys() - {"eval_seconds"} for record in one] == [record.keys() - {"eval_seconds"} for record in two]
    # Not the accuracy: in the first step it is of margins that are 0 but for rounding.
    for key in ("loss", "margin", "eval_loss", "eval_margin", "eval_accuracy", "grad_norm"):
        values = [[record[key] for record in records if key in record] for records in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-6), key
