"""TRL's trainers and transformers' Trainer on PEFT models, as PEFT made them and after `fuse_peft`."""

import peft
import pytest
import torch
from tiny_chat import tiny_llama, tiny_tokenizer
from tiny_models import perturb
from tiny_pairs import tiny_pairs
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments, set_seed

from lora_kernels import fuse_peft
from lora_kernels.integrations import peft as ours

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

STEPS = 4
COMMON = {
    "per_device_train_batch_size": 2, "max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-2, "save_steps": 2,
    "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 5,
}  # fmt: skip


def base_model(name):
    if name != "reward":
        return tiny_llama()
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 1, tiny_tokenizer().pad_token_id
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def peft_model(name, dropout=0.0):
    torch.manual_seed(1)
    task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type=task)
    model = peft.get_peft_model(base_model(name), config)
    perturb(model, 0.05)
    return model


def trainer_of(name, model, directory, **settings):
    tokenizer = tiny_tokenizer()
    rows = tiny_pairs(8)
    settings = {**COMMON, "output_dir": str(directory), **settings}
    data = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    if name == "sft":
        texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        data["train_dataset"] = datasets.Dataset.from_list(texts)
        return trl.SFTTrainer(model=model, args=trl.SFTConfig(**settings), **data)
    if name == "dpo":
        return trl.DPOTrainer(model=model, args=trl.DPOConfig(**settings), **data)
    if name == "reward":
        return trl.RewardTrainer(model=model, args=trl.RewardConfig(**settings), **data)
    if name == "grpo":
        data["train_dataset"] = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
        more = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "num_iterations": 2}
        return trl.GRPOTrainer(model=model, args=trl.GRPOConfig(**settings, **more), reward_funcs=count_letters, **data)
    encoded = tokenizer([row["prompt"] + row["chosen"] for row in rows], padding=True, return_tensors="pt")
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    examples = [
        {"input_ids": ids, "attention_mask": mask, "labels": own}
        for ids, mask, own in zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
    ]
    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=examples)


def count_letters(completions, **_):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def trained(name, model, directory, resume=False, **settings):
    """The trainer after its steps, and what it has logged of each: loss, norm of the gradient and rewards."""
    set_seed(7)
    trainer = trainer_of(name, model, directory, **settings)
    trainer.train(resume_from_checkpoint=resume)
    logged = [
        {key: value for key, value in entry.items() if key in ("loss", "grad_norm", "reward", "rewards/margins", "kl")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return trainer, logged


def assert_same_logs(found, wanted):
    assert len(found) == len(wanted) > 0
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5 if key == "loss" else 1e-4, abs=1e-7), (step, key)


def outputs(name, model):
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    "name, decoder",
    [("sft", False), ("sft", True), ("dpo", True), ("grpo", False), ("reward", False), ("trainer", True)],
)
def test_training_is_the_same_and_resumes(name, decoder, tmp_path):
    _, wanted = trained(name, peft_model(name), tmp_path / "plain")
    model = peft_model(name)
    report = fuse_peft(model, strict=True, decoder=decoder)
    trainer, found = trained(name, model, tmp_path / "fused")
    assert trainer.model is model or trainer.model.get_base_model() is model.get_base_model()
    assert sum(isinstance(module, ours.Linear) for module in trainer.model.modules()) == len(report.fused) == 14
    assert_same_logs(found, wanted)

    again = peft_model(name)
    fuse_peft(again, strict=True, decoder=decoder)
    _, rest = trained(name, again, tmp_path / "fused", resume=str(tmp_path / "fused" / "checkpoint-2"))
    assert_same_logs(rest, found)
    torch.testing.assert_close(outputs(name, again), outputs(name, model), rtol=1e-5, atol=1e-6)

    loaded = peft.PeftModel.from_pretrained(base_model(name), tmp_path / "fused" / f"checkpoint-{STEPS}")
    torch.testing.assert_close(outputs(name, loaded), outputs(name, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_dropout_is_the_same_under_checkpointing(name, tmp_path):
    runs = []
    for number, checkpointing in enumerate((False, False, True)):
        model = peft_model(name, dropout=0.2)
        fuse_peft(model, strict=True, decoder=True)
        runs.append(trained(name, model, tmp_path / str(number), gradient_checkpointing=checkpointing)[1])
    assert runs[0] == runs[1]
    assert_same_logs(runs[2], runs[0])
