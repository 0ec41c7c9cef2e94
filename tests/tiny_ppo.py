"""PPO runs of a tiny model that take seconds. `model_dir` and `data` are fixtures for the files that import them."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_chat import tiny_llama, tiny_records, tiny_tokenizer

from lora_kernels.train.config import PPOConfig
from lora_kernels.train.ppo.trainer import run_ppo


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def make_model(directory):
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "prompts.json")


def make_data(path, count=24):
    path.write_text(json.dumps(tiny_records(count)))
    return path


def vowels(prompts, responses):
    """Vowels in each answer."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in responses]


def settings(output_dir, model, data, **changes):
    defaults = {
        "reward": "tiny_ppo:vowels", "r": 4, "lora_alpha": 8, "lr": 2e-2, "dtype": "float32", "max_steps": 3,
        "rollout_size": 8, "rollout_batch_size": 5, "batch_size": 3, "max_new_tokens": 8, "max_length": 128,
        "temperature": 1.0, "ppo_epochs": 2, "minibatches": 2, "eval_prompts": 4, "method": "lora",
    }  # fmt: skip
    paths = {"model": str(model), "data": str(data), "output_dir": str(output_dir)}
    return PPOConfig(**{**defaults, **paths, **changes})


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def steps_of(output_dir):
    return [record for record in read_lines(Path(output_dir) / "metrics.jsonl") if "objective/kl" in record]


def run_for_resume(output_dir, model, data, callbacks=(), **changes):
    config = settings(output_dir, model, data, max_steps=6, save_steps=2, eval_steps=3, kl_target=0.1, kl_horizon=40)
    return run_ppo(dataclasses.replace(config, **changes), callbacks=callbacks, progress=False)
