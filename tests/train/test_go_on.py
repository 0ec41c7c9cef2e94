"""Going on from an adapter in every trainer, and leaving modules out."""

import dataclasses
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_chat import CHATML, tiny_llama, tiny_records, tiny_tokenizer
from tiny_models import perturb
from tiny_pairs import tiny_pairs
from tiny_sft import read_metrics
from transformers import MambaConfig, MambaForCausalLM

from lora_kernels.data.dataset import load_dataset
from lora_kernels.io.adapters import load_adapter, save_adapter
from lora_kernels.io.models import load_model
from lora_kernels.methods import AdaLoRAConfig, PrefixConfig, PromptConfig, inject
from lora_kernels.methods.lora import LoRAConfig, lora_modules
from lora_kernels.train.causal_lm import AnswerLoss
from lora_kernels.train.checkpoint import find_checkpoint
from lora_kernels.train.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from lora_kernels.train.dpo import run_dpo
from lora_kernels.train.ppo.trainer import run_ppo
from lora_kernels.train.reward import run_reward
from lora_kernels.train.run import start
from lora_kernels.train.sft import run_sft

_TARGETS = ["q_proj", "up_proj"]
_KINDS = {
    "lora": LoRAConfig(r=2, lora_alpha=6, target_modules=_TARGETS),
    "head": LoRAConfig(r=2, lora_alpha=6, target_modules=_TARGETS, modules_to_save=["lm_head"]),
    "dora": LoRAConfig(r=2, lora_alpha=6, target_modules=_TARGETS, use_dora=True),
    "prefix": PrefixConfig(num_virtual_tokens=3),
    "prompt": PromptConfig(num_virtual_tokens=3),
    "adalora": AdaLoRAConfig(init_r=3, target_r=2),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model, data for each trainer, and an adapter of each kind that is not the base model."""
    directory = tmp_path_factory.mktemp("files")
    tiny_llama().save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    for name, records in (("sft", tiny_records(12)), ("pairs", tiny_pairs(12))):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for kind, config in _KINDS.items():
        model = inject(tiny_llama(), config)
        perturb(model, std=0.1)
        save_adapter(model, directory / kind)
    return directory


def settings(config_class, files, out, **changes):
    data = "sft.jsonl" if config_class is SFTConfig else "pairs.jsonl"
    defaults = {
        "model": str(files / "model"), "data": str(files / data), "output_dir": str(out), "dtype": "float32",
        "max_steps": 2, "adapter": str(files / "lora"),
    }  # fmt: skip
    return config_class(**defaults | changes)


def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["lora", "dora", "prefix", "prompt", "qlora"])
def test_sft_starts_at_the_adapter_and_saves_one_of_its_kind(kind, files, tmp_path):
    adapter = files / ("lora" if kind == "qlora" else kind)
    config = settings(SFTConfig, files, tmp_path / "out", method=kind, adapter=str(adapter), batch_size=12, max_steps=1)
    run_sft(config, progress=False)
    quantize = "nf4" if kind == "qlora" else None
    model, tokenizer = load_model(files / "model", "float32", quantize)
    load_adapter(model, adapter)
    rows = load_dataset(config.data, tokenizer, config.max_length)
    batch = rows.batch(range(len(rows)))
    expected = AnswerLoss(model)(**batch)["loss"] / rows.loss_counts.sum()
    assert read_metrics(tmp_path / "out")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    raw, before = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "out", adapter))
    names = {"peft_type", "r", "lora_alpha", "target_modules", "use_dora", "num_virtual_tokens"}
    assert {n: raw.get(n) for n in names} == {n: before.get(n) for n in names}
    after = tensors(tmp_path / "out")
    assert after.keys() == tensors(adapter).keys()
    assert all(not torch.equal(after[name], tensor) for name, tensor in tensors(adapter).items())


@pytest.mark.parametrize("precompute_ref", [True, False])
def test_the_reference_of_dpo_is_the_adapter_as_it_was(precompute_ref, files, tmp_path):
    changes = {"precompute_ref": precompute_ref, "lr": 1e-2, "max_steps": 2, "batch_size": 12}
    run_dpo(settings(DPOConfig, files, tmp_path / "out", **changes), progress=False)
    first, second = read_metrics(tmp_path / "out")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["reward_chosen"] == 0
    assert second["loss"] < first["loss"] and second["reward_chosen"] != 0


@pytest.mark.parametrize("kind", ["lora", "head"])
def test_both_ways_to_the_reference_agree(kind, files, tmp_path):
    metrics = []
    for precompute_ref in (True, False):
        out = tmp_path / str(precompute_ref)
        changes = {"adapter": str(files / kind), "precompute_ref": precompute_ref, "lr": 1e-2, "max_steps": 4}
        run_dpo(settings(DPOConfig, files, out, **changes), progress=False)
        metrics.append(read_metrics(out))
    for one, other in zip(*metrics, strict=True):
        for name in ("loss", "reward_chosen", "reward_rejected", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_go_on_in_dpo(kind, files, tmp_path):
    config = settings(DPOConfig, files, tmp_path / "out", method=kind, adapter=str(files / kind), max_steps=2)
    run_dpo(config, progress=False)
    assert read_metrics(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match=f"precompute_ref must be true with adapter and method {kind}"):
        dataclasses.replace(config, precompute_ref=False)


def test_a_reward_model_from_an_sft_adapter_and_on_from_there(files, tmp_path):
    run_reward(settings(RewardConfig, files, tmp_path / "first", lr=1e-9), progress=False)
    run_reward(settings(RewardConfig, files, tmp_path / "plain", adapter=None, lr=1e-9, r=2), progress=False)
    first, plain = tensors(tmp_path / "first"), tensors(tmp_path / "plain")
    head = "base_model.model.score.weight"
    # The head is a function of the seed, the adapters are those of the file.
    assert torch.allclose(first[head], plain[head], atol=1e-6)
    for name, tensor in tensors(files / "lora").items():
        assert torch.allclose(first[name], tensor, atol=1e-6)
    config = settings(RewardConfig, files, tmp_path / "second", adapter=str(tmp_path / "first"), seed=5, lr=1e-9)
    run_reward(config, progress=False)
    second = tensors(tmp_path / "second")
    assert second.keys() == first.keys()
    assert all(torch.allclose(second[name], tensor, atol=1e-6) for name, tensor in first.items())
    with pytest.raises(ValueError, match="no head"):
        run_sft(settings(SFTConfig, files, tmp_path / "sft", adapter=str(tmp_path / "first")), progress=False)


class Killed(Exception):
    pass


@pytest.mark.parametrize("run", [(run_sft, SFTConfig, {}), (run_dpo, DPOConfig, {"precompute_ref": False})])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(run, files, tmp_path):
    train, config_class, changes = run
    changes = {"max_steps": 5, "save_steps": 2, "lr": 1e-2, "lora_dropout": 0.2, **changes}
    whole = settings(config_class, files, tmp_path / "whole", **changes)
    train(whole, progress=False)

    def stop(record):
        if record["step"] == 3:
            raise Killed

    stopped = dataclasses.replace(whole, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(Killed):
        train(stopped, callbacks=[stop], progress=False)
    # The adapter may have moved meanwhile.
    (tmp_path / "moved").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "moved" / name).write_bytes((files / "lora" / name).read_bytes())
    resumed = dataclasses.replace(stopped, adapter=str(tmp_path / "moved"), resume=True)
    train(resumed, progress=False)
    for name, tensor in tensors(tmp_path / "whole").items():
        assert torch.equal(tensors(tmp_path / "stopped")[name], tensor), name
    with pytest.raises(ValueError, match="adapter digest"):
        train(dataclasses.replace(resumed, adapter=str(another(files, tmp_path))), progress=False)


def ppo(config, **arguments):
    run_ppo(config, reward=lambda prompts, answers: [float(len(answer)) for answer in answers], **arguments)


_PPO = {"reward": "rules:length", "rollout_size": 2, "max_new_tokens": 2, "max_length": 128, "eval_prompts": 1}


@pytest.mark.parametrize("run, config_class, changes", [(run_sft, SFTConfig, {}), (ppo, PPOConfig, _PPO)])
def test_the_adapter_may_move_while_it_trains(run, config_class, changes, files, tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_bytes((files / "lora" / name).read_bytes())

    def move(record):
        if record["step"] == 1:
            (tmp_path / "adapter").rename(tmp_path / "moved")

    changes = {"data": str(files / "sft.jsonl"), "adapter": str(tmp_path / "adapter"), **changes}
    run(settings(config_class, files, tmp_path / "out", **changes), callbacks=[move], progress=False)
    assert (tmp_path / "moved").is_dir() and find_checkpoint(tmp_path / "out")


def another(files, tmp_path):
    model = load_adapter(tiny_llama(), files / "lora")
    perturb(model)
    save_adapter(model, tmp_path / "another")
    return tmp_path / "another"


def test_lora_dropout_may_be_another_and_the_chat_template_is_the_adapters(files, tmp_path):
    template = CHATML.replace("<|im_end|>", "<|im_end|>!")
    (tmp_path / "adapter").mkdir()
    for file in (files / "lora").iterdir():
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter" / "chat_template.jinja").write_text(template)
    config = settings(SFTConfig, files, tmp_path / "out", adapter=str(tmp_path / "adapter"), lora_dropout=0.25)
    run = start(config, progress=False)
    run.adapt()
    assert run.tokenizer.chat_template == template
    assert {layer.lora_dropout for _, layer in lora_modules(run.model)} == {0.25}
    run.save_adapter(run.model, tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == template
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["lora_dropout"] == 0.25


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 3}, "r is 3, but adapter .*lora has 2"),
        ({"lora_alpha": 32}, "lora_alpha is 32.0, but adapter .*lora has 6"),
        ({"use_rslora": True}, "use_rslora is True, but adapter .*lora has False"),
        ({"target": "q_proj"}, "target is 'q_proj', but adapter .*lora has .*q_proj.*up_proj"),
        ({"target": "all-linear"}, "target is 'all-linear'"),
        ({"exclude_modules": "q_proj"}, "exclude_modules is 'q_proj'"),
        ({"method": "dora"}, "without DoRA's magnitudes; method must be lora or qlora"),
        ({"method": "prefix"}, "has peft_type 'LORA', which goes on with method dora, lora, qlora; got 'prefix'"),
        ({"adapter": "prefix"}, "has peft_type 'PREFIX_TUNING', which goes on with method prefix; got 'lora'"),
        ({"adapter": "prefix", "method": "prefix", "num_virtual_tokens": 4}, "num_virtual_tokens is 4, .*prefix has 3"),
        ({"adapter": "adalora"}, "one of AdaLoRA.*as_lora=True"),
        ({"adapter": "model"}, "holds a whole model; give it as model"),
        ({"adapter": "absent"}, "adapter_config.json does not exist"),
        ({"output_dir": "lora"}, "choose another output_dir"),
    ],
)
def test_what_the_adapter_says_otherwise_is_refused_before_anything_is_written(changes, words, files, tmp_path):
    for name in ("adapter", "output_dir"):
        if name in changes:
            changes = {**changes, name: str(files / changes[name])}
    before = sorted(files.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run_sft(settings(SFTConfig, files, tmp_path / "out", **changes), progress=False)
    assert not (tmp_path / "out").exists() and sorted(files.rglob("*")) == before


def test_settings_that_say_the_same_are_taken(files, tmp_path):
    same = {"r": 2, "lora_alpha": 6, "use_rslora": False, "target": "up_proj,q_proj"}
    first = settings(SFTConfig, files, tmp_path / "first", adapter=None, lora_dropout=0.1, **same)
    run_sft(first, progress=False)
    assert (first.init, first.to_dict()["r"]) == ("default", 2)
    changes = {"adapter": str(tmp_path / "first"), "output_dir": str(tmp_path / "second")}
    run_sft(SFTConfig.from_yaml(tmp_path / "first" / "config.yaml", **changes), progress=False)
    config = settings(SFTConfig, files, tmp_path / "out", **same)
    run_sft(config, progress=False)
    again = SFTConfig.from_yaml(tmp_path / "out" / "config.yaml")
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_model_that_bypasses_layers_goes_on_with_its_own_config(method, files, tmp_path):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 64, "intermediate_size": 128}
    tokenizer = tiny_tokenizer()
    MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes = {"model": str(tmp_path / "model"), "method": method, "adapter": None, "max_steps": 1}
    run_sft(settings(SFTConfig, files, tmp_path / "first", **changes), progress=False)
    changes = {"adapter": str(tmp_path / "first"), "output_dir": str(tmp_path / "second")}
    run_sft(SFTConfig.from_yaml(tmp_path / "first" / "config.yaml", **changes), progress=False)
    assert tensors(tmp_path / "second").keys() == tensors(tmp_path / "first").keys()
    with pytest.raises(ValueError, match="target is 'all-linear', but adapter .*x_proj"):
        changes = {**changes, "exclude_modules": "x_proj", "output_dir": str(tmp_path / "third")}
        run_sft(SFTConfig.from_yaml(tmp_path / "first" / "config.yaml", **changes), progress=False)


@pytest.mark.parametrize("changes", [{"init": "gaussian"}, {"method": "full"}, {"method": "adalora"}])
def test_what_has_no_meaning_beside_an_adapter_is_refused(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name} must be .*with adapter"):
        SFTConfig(model="m", data="d", adapter="a", **changes)


@pytest.mark.parametrize(
    ("name", "changes"), [("init", {"init": "gaussian"}), ("mlp_hidden", {"method": "prefix", "mlp_hidden": 6})]
)
def test_the_config_of_the_first_run_goes_on_once_its_start_is_null(name, changes, tmp_path):
    SFTConfig(model="m", data="d", **changes).save_yaml(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=f"{name} must be left out, or null in a file, with adapter"):
        SFTConfig.from_yaml(tmp_path / "config.yaml", adapter="a")
    assert getattr(SFTConfig.from_yaml(tmp_path / "config.yaml", adapter="a", **{name: None}), name) is None


def test_defaults_are_those_of_a_run_without_an_adapter():
    config = SFTConfig(model="m", data="d")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (16, 32.0, 0.0, False)
    assert (config.target, config.init, config.exclude_modules) == ("all-linear", "default", None)
    assert PPOConfig(**{**PPOConfig(model="m", data="d", reward="r:f").to_dict()}).lora_dropout == 0.0


@pytest.mark.parametrize("excluded", ["q_proj,down_proj", ["q_proj", "down_proj"], r".*\.(q|down)_proj"])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_excluded_modules_are_pefts(method, excluded, files, tmp_path):
    changes = {"method": method, "adapter": None, "exclude_modules": excluded, "max_steps": 1}
    config = settings(SFTConfig, files, tmp_path / "out", **changes)
    run_sft(config, progress=False)
    names = excluded if isinstance(excluded, list) or "(" in excluded else excluded.split(",")
    theirs = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", exclude_modules=names))
    expected = {name.removesuffix(".lora_A") for name, m in theirs.named_modules() if name.endswith(".lora_A")}
    found = {name.split(".lora_A")[0] for name in tensors(tmp_path / "out") if ".lora_A" in name}
    assert found == expected and not any("q_proj" in name or "down_proj" in name for name in found)
    if method != "adalora":
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")


def test_full_fine_tuning_leaves_excluded_modules_alone(files, tmp_path):
    changes = {"method": "full", "adapter": None, "exclude_modules": ["mlp", "embed_tokens", "lm_head"]}
    run_sft(settings(SFTConfig, files, tmp_path / "out", **changes), progress=False)
    after, before = (load_file(d / "model.safetensors") for d in (tmp_path / "out", files / "model"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if ".mlp." in name or "embed_tokens" in name}
    with pytest.raises(ValueError, match="exclude_modules: 'absent' matches no module"):
        run_sft(settings(SFTConfig, files, tmp_path / "no", **changes | {"exclude_modules": "absent"}), progress=False)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_have_no_modules_to_exclude(method):
    with pytest.raises(ValueError, match=f"exclude_modules must be left out with method {method}"):
        SFTConfig(model="m", data="d", method=method, exclude_modules="q_proj")
