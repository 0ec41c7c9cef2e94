"""The losses of reward models and DPO against TRL 1.12's own trainers, on the same weights and the same batches.

tests/oracles/trl_oracle.json holds what TRL gave; where TRL is installed, the file is compared with it. To write it
anew: `PYTHONPATH=tests python tests/train/test_trl.py`.
"""

import json
import tempfile

import pytest
import torch
from places import TESTS
from tiny_chat import tiny_llama, tiny_tokenizer

from lora_kernels.methods.lora import LoRAConfig, inject, merge
from lora_kernels.train.dpo import DPOLoss
from lora_kernels.train.reward import RewardLoss, attach_head
from lora_kernels.train.rl import dpo_loss, reward_loss

ORACLE = TESTS / "oracles" / "trl_oracle.json"
PAIRS = [
    ("say one", "one", "two two two", 0.5),
    ("the cat says", "red plum", "dog", 0.0),
    ("three", "bird one apple green", "blue", 1.25),
]
# TRL has no label smoothing for its sigmoid loss any more; for one pair, its "aot" is the same formula.
DPO = {
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.1},
    "sigmoid, beta 0.7": {"loss_type": "sigmoid", "beta": 0.7},
    "ipo": {"loss_type": "ipo", "beta": 0.3},
}
SMOOTHED = {"beta": 0.2, "label_smoothing": 0.1}
REWARD = {"plain": (False, 0.0), "margin": (True, 0.0), "centred": (True, 0.01)}


def set_weights(model, scale=0.3):
    """Values that no random generator's version changes."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin((index + 1.0) + 0.37 * torch.arange(parameter.numel(), dtype=torch.float64))
            value = scale * wave.view(parameter.shape)
            parameter.copy_(1 + value if "norm" in name else value)
    return model


def policy():
    """A model with adapters that change it; without them, it is the reference. In float64: the loss is a difference of
    sums over many tokens."""
    model = inject(set_weights(tiny_llama()), LoRAConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        wave = torch.cos(index + 0.61 * torch.arange(parameter.numel(), dtype=torch.float64))
        parameter.data.copy_(0.4 * wave.view(parameter.shape))
    return model.double().eval()


def reward_model():
    model = attach_head(set_weights(tiny_llama()))
    model.score.weight.data.copy_(torch.linspace(-1, 1, 32)[None] ** 3)
    return model.eval()


def turn(role, content):
    return [{"role": role, "content": content}]


def trl_values():
    """What TRL gives: its batches as lists, and its losses and metrics on them."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    rows = [
        {
            "prompt": turn("user", prompt),
            "chosen": turn("assistant", chosen),
            "rejected": turn("assistant", rejected),
            "margin": margin,
        }
        for prompt, chosen, rejected, margin in PAIRS
    ]
    common = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    common |= {"dataloader_pin_memory": False}
    values = {"dpo": {}, "smoothed": [], "reward": {}}

    def dpo_trainer(rows, **settings):
        arguments = DPOConfig(tempfile.mkdtemp(), per_device_train_batch_size=len(rows), **common, **settings)
        return DPOTrainer(
            model=merge(policy()), ref_model=set_weights(tiny_llama()).double(), args=arguments,
            train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(),
        )  # fmt: skip

    for name, settings in DPO.items():
        trainer = dpo_trainer(rows, **settings)
        trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
        loss = trainer.compute_loss(trainer.model, batch)
        metrics = trainer._metrics["eval"]
        values["dpo"][name] = {
            "input_ids": batch["input_ids"].tolist(),
            "completion_mask": batch["completion_mask"].tolist(),
            "loss": loss.item(),
            **{key: metrics[f"rewards/{key}"][0] for key in ("chosen", "rejected", "accuracies", "margins")},
        }
    for row in rows:
        trainer = dpo_trainer([row], loss_type="aot", **SMOOTHED)
        trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[0]])
        names = ("input_ids", "completion_mask")
        loss = trainer.compute_loss(trainer.model, batch).item()
        values["smoothed"].append({"loss": loss, **{name: batch[name].tolist() for name in names}})

    for name, (with_margin, center) in REWARD.items():
        ours = reward_model()
        ours.config.num_labels = 1
        classifier = LlamaForSequenceClassification(ours.config)
        classifier.load_state_dict({key: v for key, v in ours.state_dict().items() if key != "lm_head.weight"})
        data = [{k: v for k, v in row.items() if with_margin or k != "margin"} for row in rows]
        arguments = RewardConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=3, center_rewards_coefficient=center or None, **common
        )
        trainer = RewardTrainer(
            model=classifier, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tiny_tokenizer()
        )
        trainer.model.eval()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        given = {key: value.clone() for key, value in batch.items()}
        loss = trainer.compute_loss(trainer.model, batch)
        metrics = trainer._metrics["eval"]
        values["reward"][name] = {
            **{f"{key}_given" if key == "margin" else key: value.tolist() for key, value in given.items()},
            "loss": loss.item(),
            **{key: metrics[key][0] for key in ("accuracy", "margin", "mean_reward")},
        }
    return values


def oracle():
    return json.loads(ORACLE.read_text())


def labels_of(case):
    ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["completion_mask"])
    return ids, ids.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("given", [False, True], ids=["reference on the fly", "reference given"])
@pytest.mark.parametrize("name", DPO)
def test_dpo_equals_trl(name, given):
    case = oracle()["dpo"][name]
    ids, labels = labels_of(case)
    module = DPOLoss(policy(), DPO[name]["beta"], DPO[name]["loss_type"])
    batch = {"input_ids": ids, "labels": labels, "lengths": (ids != 0).sum(1), "margin": torch.zeros(3)}
    if given:
        batch["ref_logprobs"] = module.reference(ids, labels)
    means = {key: value.item() / 3 for key, value in module(**batch).items()}
    ours = {"chosen": "reward_chosen", "rejected": "reward_rejected", "accuracies": "accuracy", "margins": "margin"}
    assert means["loss"] == pytest.approx(case["loss"], abs=1e-6, rel=1e-6)
    for theirs, own in ours.items():
        assert means[own] == pytest.approx(case[theirs], abs=1e-7, rel=1e-6), own


def test_smoothed_dpo_equals_trl():
    module = DPOLoss(policy(), **SMOOTHED)
    for case in oracle()["smoothed"]:
        ids, labels = labels_of(case)
        loss = module(ids, labels)["loss"]
        assert loss.item() == pytest.approx(case["loss"], abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("name", REWARD)
def test_reward_equals_trl(name):
    case = oracle()["reward"][name]
    margin = torch.tensor(case["margin_given"]) if "margin_given" in case else torch.zeros(3)
    module = RewardLoss(reward_model(), REWARD[name][1])
    ids = torch.tensor(case["input_ids"])
    sums = module(ids, torch.tensor(case["attention_mask"]).sum(1), margin, labels=ids)
    assert sums["loss"].item() / 3 == pytest.approx(case["loss"], abs=1e-6, rel=1e-6)
    assert sums["accuracy"].item() / 3 == pytest.approx(case["accuracy"])
    assert sums["margin"].item() / 3 == pytest.approx(case["margin"], abs=1e-6, rel=1e-5)
    mean = (sums["reward_chosen"] + sums["reward_rejected"]).item() / 6
    assert mean == pytest.approx(case["mean_reward"], abs=1e-6, rel=1e-5)


def test_the_file_is_what_trl_gives():
    trl = pytest.importorskip("trl", reason="trl is not installed")
    if trl.__version__ != oracle()["version"]:
        pytest.skip(f"the file is of TRL {oracle()['version']}, here is {trl.__version__}")
    flat = {}

    def flatten(value, path):
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                flatten(item, (*path, key))
        else:
            flat.setdefault(path, []).append(value)

    flatten({"version": trl.__version__, **trl_values()}, ())
    flatten(oracle(), ())
    for path, values in flat.items():
        assert len(values) == 2, path
        live, saved = values
        assert live == (saved if isinstance(saved, str) else pytest.approx(saved, rel=1e-5, abs=1e-6)), path


def test_formulas():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    margin = torch.tensor([0.25, 1.0])
    loss = reward_loss(chosen, rejected, margin, center_coef=0.1)
    expected = -torch.log(torch.sigmoid(torch.tensor([0.25, -6.0]))) + 0.1 * torch.tensor([2.25, 1.0])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(reward_loss(chosen, rejected), torch.log1p(torch.exp(rejected - chosen)))
    # Where a sigmoid would be 0 and its logarithm infinite.
    assert reward_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == 1000

    given = [torch.tensor([value]) for value in (-10.0, -12.0, -11.0, -11.0)]
    loss, reward_chosen, reward_rejected = dpo_loss(*given, beta=0.5, label_smoothing=0.2)
    d = torch.tensor(0.5 * 2.0)
    torch.testing.assert_close(loss[0], -0.8 * torch.sigmoid(d).log() - 0.2 * torch.sigmoid(-d).log())
    assert (reward_chosen.item(), reward_rejected.item()) == (0.5, -0.5)
    tokens = torch.tensor([4]), torch.tensor([2])
    loss, *_ = dpo_loss(*given, beta=0.5, loss_type="ipo", chosen_tokens=tokens[0], rejected_tokens=tokens[1])
    assert loss.item() == pytest.approx((1 / 4 + 1 / 2 - 1) ** 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be > 0, got 0.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"loss_type": "hinge"}, "loss_type must be one of sigmoid, ipo, got 'hinge'"),
        ({"loss_type": "ipo"}, "^loss_type 'ipo' needs chosen_tokens and rejected_tokens"),
        ({"loss_type": "ipo", "chosen_tokens": torch.ones(2)}, "^loss_type 'ipo' needs"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing must be 0 with loss_type 'ipo', got 0.1"),
        ({"rejected_logprobs": torch.zeros(3)}, r"rejected_logprobs must be \[2\] like chosen_logprobs, got \[3\]"),
    ],
)
def test_bad_arguments(change, message):
    names = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    with pytest.raises(ValueError, match=message):
        dpo_loss(**{**{name: torch.zeros(2) for name in names}, **change})
    with pytest.raises(ValueError, match="center_coef must be >= 0, got -1"):
        reward_loss(torch.zeros(2), torch.zeros(2), center_coef=-1)
    with pytest.raises(ValueError, match=r"margin must be \[2\] like chosen, got \[1\]"):
        reward_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))


if __name__ == "__main__":
    import trl

    ORACLE.write_text(json.dumps({"version": trl.__version__, **trl_values()}, indent=None) + "\n")
