import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import warnings

import pytest
import torch
from places import run_python
from tiny_chat import tiny_llama, tiny_records, tiny_tokenizer
from tiny_sft import losses, read_metrics, settings, tiny_dataset, train_tiny
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel

from lora_kernels.data.dataset import TokenDataset, build_dataset
from lora_kernels.methods.lora import LoRAConfig, inject
from lora_kernels.train import loop, metrics
from lora_kernels.train.adapter import target_modules
from lora_kernels.train.causal_lm import AnswerLoss
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.metrics import truncate_metrics
from lora_kernels.train.sft import run_sft, train_sft
from lora_kernels.train.steps import StepPlan, lr_factor


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.json"
    path.write_text(json.dumps(tiny_records(22)))
    return path


def test_run_from_files_writes_everything_and_the_loss_falls(tmp_path, model_dir, data):
    from peft import PeftModel

    out, seen = tmp_path / "out", []
    config = settings(
        out,
        model=str(model_dir),
        data=str(data),
        eval_data=str(data),
        epochs=8,
        batch_size=8,
        lora_dropout=0.05,
        lr=2e-2,
    )
    result = run_sft(config, callbacks=[seen.append], progress=False)
    metrics = read_metrics(out)
    assert seen == metrics
    train = [record for record in metrics if "loss" in record]
    assert [record["step"] for record in train] == list(range(1, result.steps + 1))
    assert result.steps == math.ceil(8 * 22 / 8)
    assert train[-1]["loss"] < 0.7 * train[0]["loss"]
    assert train[-1]["epoch"] == 8
    assert train[-1]["lr"] < 0.05 * config.lr
    assert {"grad_norm", "tokens", "tokens_per_second"} <= train[0].keys()
    evals = [record["eval_loss"] for record in metrics if "eval_loss" in record]
    assert result.best_eval_loss == min(evals) < evals[0]
    files = "adapter_config.json adapter_model.safetensors checkpoint-last config.yaml loss.png metrics.jsonl"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    assert SFTConfig.from_yaml(out / "config.yaml") == config
    base = tiny_llama()
    adapted = PeftModel.from_pretrained(base, out).eval()
    dataset = tiny_dataset()
    batch = dataset.batch(range(len(dataset)))
    logits = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(result.best_eval_loss, rel=1e-4)

    with pytest.raises(FileExistsError, match="holds another run"):
        run_sft(config, progress=False)
    finished = run_sft(dataclasses.replace(config, resume=True), progress=False)
    assert (finished.steps, finished.loss) == (result.steps, None)
    assert read_metrics(out) == metrics
    with pytest.raises(ValueError, match=r"made with lr = 0.02, this run has 0.001"):
        run_sft(dataclasses.replace(config, resume=True, lr=1e-3), progress=False)


def test_the_template_of_a_model_without_one_is_saved_with_every_adapter(tmp_path, data):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "model")
    config = settings(tmp_path / "out", model=str(tmp_path / "model"), data=str(data), max_steps=1, target="q_proj")
    run_sft(config, progress=False)
    for directory in (tmp_path / "out", tmp_path / "out" / "checkpoint-last"):
        assert "### Response:" in (directory / "chat_template.jinja").read_text()
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["q_proj"]


def test_loss_is_the_mean_over_the_answer_tokens_of_a_padded_step(tmp_path):
    """Against the model's own logits, with its own attention mask."""
    dataset = tiny_dataset()
    model = tiny_llama()
    config = {"max_steps": 1, "batch_size": 2, "gradient_accumulation_steps": 3, "seed": 5}
    plan = StepPlan(rows=22, batch_size=2, accumulation=3, processes=1, epochs=1, max_steps=1, seed=5)
    batch = dataset.batch(plan.step_rows(0))
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    train_tiny(tmp_path, dataset, **config)
    assert losses(tmp_path) == pytest.approx([expected.item()], rel=1e-5)


@pytest.mark.parametrize("method", ["accumulation", "checkpointing"])
def test_same_training_however_the_step_is_computed(tmp_path, method):
    common = {"max_steps": 8, "weight_decay": 0.1, "lr_scheduler": "linear"}
    model, _ = train_tiny(tmp_path / "a", batch_size=4, **common)
    if method == "accumulation":
        other, _ = train_tiny(tmp_path / "b", batch_size=1, gradient_accumulation_steps=4, **common)
    else:
        other, _ = train_tiny(tmp_path / "b", batch_size=4, gradient_checkpointing=True, **common)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if ours.requires_grad:
            assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4), name


def test_trains_like_peft(tmp_path):
    """Same data, same initial adapters, 20 steps of the same loop: PEFT's modules against the fused ones."""
    import peft

    ours = tiny_llama()
    torch.manual_seed(1)
    inject(ours, LoRAConfig(r=4, lora_alpha=8))
    theirs = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    pairs = {"lora_A.default.weight": "lora_a", "lora_B.default.weight": "lora_b"}
    mine = dict(ours.named_parameters())
    count = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            for spelling, own in pairs.items():
                name = name.replace(spelling, own)
            parameter.data.copy_(mine[name])
            count += 1
    assert count == 2 * 7 * 2 == sum(parameter.requires_grad for parameter in mine.values())
    common = {"max_steps": 20, "batch_size": 4}
    train_tiny(tmp_path / "ours", model=ours, **common)
    config = settings(tmp_path / "theirs", **common)
    train_sft(
        theirs, tiny_dataset(), None, config, progress=False,
        save_adapter=lambda model, directory: model.save_pretrained(directory),
    )  # fmt: skip
    assert len(losses(tmp_path / "ours")) == 20
    assert losses(tmp_path / "ours")[-1] < losses(tmp_path / "ours")[0]
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "theirs"), rel=1e-4)


KILLED = """
import os, signal, sys
import test_sft as t
die_at = int(sys.argv[2])
def callback(record):
    if record["step"] == die_at and "loss" in record:
        os.kill(os.getpid(), signal.SIGKILL)
t.train_for_resume(sys.argv[1], callbacks=[callback])
"""


def train_for_resume(output_dir, **changes):
    changes = {"optimizer": "loraplus"} | changes
    eval_set = tiny_dataset(6, seed=9)
    config = {"lora_dropout": 0.3, "epochs": 3, "batch_size": 4, "save_steps": 5, "eval_steps": 4, "logging_steps": 3}
    return train_tiny(output_dir, eval_set=eval_set, **{**config, **changes})


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    model, result = train_for_resume(tmp_path / "whole")
    process = run_python(KILLED, tmp_path / "killed", 9)
    assert process.returncode == -signal.SIGKILL, process.stderr
    state = json.loads((tmp_path / "killed" / "checkpoint-last" / "training_state.json").read_text())
    assert state["step"] == 5
    assert state["window_count"] > 0
    other, resumed = train_for_resume(tmp_path / "killed", resume=True)
    assert resumed.steps == result.steps == 17
    whole, killed = (read_metrics(tmp_path / name) for name in ("whole", "killed"))
    for record in whole + killed:
        for timing in ("tokens_per_second", "eval_seconds"):
            record.pop(timing, None)
    assert whole == killed
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for file in ("adapter_model.safetensors", "checkpoint-last/adapter_model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_resume_refuses_another_run_and_survives_a_death_between_renames(tmp_path):
    train_for_resume(tmp_path, epochs=1)
    os.replace(tmp_path / "checkpoint-last", tmp_path / ".checkpoint-last.old")
    # Which saves memory and changes nothing.
    _, result = train_for_resume(tmp_path, epochs=1, resume=True, gradient_checkpointing=True)
    assert result.steps == 6
    assert result.loss is None
    with pytest.raises(ValueError, match="epochs 0.5 is 3 steps, and 6 are done; allowed: 6 steps or more"):
        train_for_resume(tmp_path, epochs=0.5, resume=True)
    with pytest.raises(ValueError, match="max_steps 5 is 5 steps, and 6 are done"):
        train_for_resume(tmp_path, max_steps=5, resume=True)
    with pytest.raises(ValueError, match="data rows = 22, this run has 21"):
        train_for_resume(tmp_path, max_steps=6, resume=True, dataset=tiny_dataset(21))
    same = tiny_dataset(22)
    same.input_ids.reverse(), same.answer_mask.reverse()
    with pytest.raises(ValueError, match="data digest = "):
        train_for_resume(tmp_path, epochs=1, resume=True, dataset=TokenDataset(same.input_ids, same.answer_mask))
    model = inject(tiny_llama(), LoRAConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"down_proj\.lora_a is missing here, \[4, 48\] there"):
        train_for_resume(tmp_path, epochs=1, resume=True, model=model)
    assert SFTConfig.from_yaml(tmp_path / "config.yaml").epochs == 1


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path, monkeypatch):
    made = []

    class Writer:
        def __init__(self, directory, purge_step):
            self.directory, self.purge_step, self.steps = directory, purge_step, []
            made.append(self)

        def add_scalar(self, name, value, step):
            self.steps += [step] * (name == "loss")

        def close(self):
            pass

    def stop(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "summary_writer", lambda: Writer)
    plan = {"max_steps": 6, "batch_size": 4, "save_steps": 2, "tensorboard": True}
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, callbacks=[stop], **plan)
    train_tiny(tmp_path, resume=True, **plan)
    assert [writer.purge_step for writer in made] == [1, 5]
    assert made[0].steps[:4] == [1, 2, 3, 4] and made[1].steps == [5, 6]
    assert made[0].directory == str(tmp_path / "tensorboard")


def test_tensorboard_shows_each_step_once(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    plan = {"max_steps": 6, "batch_size": 4, "save_steps": 2, "tensorboard": True}
    # The board is a callback too, after this one: step 4 is the checkpoint's, and 3 is not written twice.
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, callbacks=[stop], **plan)
    train_tiny(tmp_path, resume=True, **plan)
    shown = events.EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    found = [(event.step, pytest.approx(event.value)) for event in shown.Scalars("loss")]
    assert found == [(record["step"], record["loss"]) for record in read_metrics(tmp_path)]


def test_tensorboard_without_its_package_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="the package tensorboard can't be imported"):
        run_sft(settings(tmp_path, model="no/model", tensorboard=True), progress=False)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_more_epochs_go_on_where_the_run_ended(tmp_path, capfd, monkeypatch, batch_size):
    """With 22 rows and 4 a step, the last step of the first run has 2: the next one starts with the second epoch."""
    seen = {}
    rows = StepPlan.step_rows
    monkeypatch.setattr(StepPlan, "step_rows", lambda plan, step: seen.setdefault(step, rows(plan, step)))
    plan = {"batch_size": batch_size, "lr_scheduler": "linear", "warmup_ratio": 0.2}
    train_tiny(tmp_path / "out", progress=True, **plan)
    done = len(seen)
    capfd.readouterr()
    _, result = train_tiny(tmp_path / "out", epochs=2, resume=True, progress=True, **plan)
    total = 2 * done
    text = f"the run has {total} steps now, {done} when its checkpoint was written; the learning rate follows"
    assert text in capfd.readouterr().err
    assert result.steps == total
    order = [row for step in sorted(seen) for row in seen[step]]
    assert len(order) == 44 and sorted(order[:22]) == sorted(order[22:]) == list(range(22))
    records = read_metrics(tmp_path / "out")
    assert [record["step"] for record in records] == list(range(1, total + 1))
    warmup = math.ceil(0.2 * total)
    factors = [1 - (step - warmup) / (total - warmup) for step in range(done, total)]
    assert [record["lr"] for record in records[done:]] == pytest.approx([5e-3 * factor for factor in factors])
    assert records[done - 1]["epoch"] == 1 and records[-1]["epoch"] == 2
    # Once more, and to a number of steps: what the first run lacked is still lacked.
    _, result = train_tiny(tmp_path / "out", max_steps=total + 1, resume=True, **plan)
    assert result.steps == total + 1
    assert read_metrics(tmp_path / "out")[-1]["epoch"] == pytest.approx((44 + batch_size) / 22, abs=1e-4)


def test_going_on_at_a_constant_rate_is_the_longer_run(tmp_path):
    plan = {"batch_size": 2, "lr_scheduler": "constant", "lora_dropout": 0.1}
    train_tiny(tmp_path / "out", epochs=1, **plan)
    model, _ = train_tiny(tmp_path / "out", epochs=2, resume=True, **plan)
    other, _ = train_tiny(tmp_path / "whole", epochs=2, **plan)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_run_goes_on_with_the_model_elsewhere_but_not_with_another(tmp_path, model_dir, data, monkeypatch):
    config = settings(tmp_path / "out", model=str(model_dir), data=str(data), max_steps=1)
    run_sft(config, progress=False)
    moved = tmp_path / "moved"
    shutil.copytree(model_dir, moved)
    monkeypatch.chdir(tmp_path)
    for step, path in enumerate([f"{model_dir}/", "moved", "./moved/../moved", str(moved)], start=2):
        changes = {"model": path, "resume": True, "max_steps": step, "fuse_decoder": step % 2 == 0}
        assert run_sft(dataclasses.replace(config, **changes), progress=False).steps == step
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 1e-3
    other.save_pretrained(moved)
    with pytest.raises(ValueError, match="made with digest of the frozen weights = .*, this run has"):
        run_sft(dataclasses.replace(config, model=str(moved), resume=True, max_steps=6), progress=False)


def test_other_evaluation_data_have_a_best_loss_of_their_own(tmp_path):
    """A loss that was lower on easier data would else keep every later adapter from being written."""

    def stop(record):
        if record["step"] == 3 and "loss" in record:
            raise KeyboardInterrupt

    config = {"batch_size": 4, "save_steps": 2, "eval_steps": 2, "max_steps": 4}
    easier = build_dataset([({"instruction": "q", "output": "ZZ##ZZ"}, "data:1")], tiny_tokenizer(), 128, "data")
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path, eval_set=easier, callbacks=[stop], **config)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    _, result = train_tiny(tmp_path, eval_set=tiny_dataset(6, seed=9), resume=True, **config)
    first, second = [record["eval_loss"] for record in read_metrics(tmp_path) if "eval_loss" in record]
    assert second > first and result.best_eval_loss == second
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before


def test_rows_longer_than_the_context(tmp_path):
    with pytest.warns(UserWarning, match="exceeds the model's context of 16"):
        train_tiny(tmp_path / "a", max_steps=1, model=inject(tiny_llama(max_position_embeddings=16), LoRAConfig(r=2)))
    config = GPT2Config(vocab_size=340, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"exceeds the model's context of 16; lower max_length \(1024\)"):
        train_tiny(tmp_path / "b", model=inject(GPT2LMHeadModel(config), LoRAConfig(r=2)))


def test_loraplus_needs_lora_b():
    with pytest.raises(ValueError, match="optimizer must be adamw with method prefix, which has no lora_b"):
        settings("o", method="prefix", optimizer="loraplus")
    with pytest.raises(ValueError, match="epochs must be finite"):
        settings("o", epochs=math.inf)


@pytest.mark.parametrize("optimizer", ["adamw", "loraplus"])
def test_a_step_is_clip_grad_norm_and_torchs_adamw(tmp_path, optimizer, monkeypatch):
    """With LoRA+'s learning rates where they are asked for: the metrics and the adapters of three steps."""
    config = {"max_steps": 3, "optimizer": optimizer, "lr": 1e-3, "max_grad_norm": 0.1, "weight_decay": 0.1}

    class Torchs(torch.optim.AdamW):
        def step(self):
            self.grad_norm = clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.1)
            super().step()

    def make_torchs(module, config):
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        ratios = {"lora_a": 1, "lora_b": 16 if optimizer == "loraplus" else 1}
        return Torchs([
            {"params": [p for n, p in trained.items() if n.endswith(name)], "lr": 1e-3 * ratio, "peak_lr": 1e-3 * ratio}
            for name, ratio in ratios.items()
        ], weight_decay=0.1)  # fmt: skip

    ours, _ = train_tiny(tmp_path / "ours", **config)
    monkeypatch.setattr(loop, "make_optimizer", make_torchs)
    theirs, _ = train_tiny(tmp_path / "theirs", **config)
    for key in ("loss", "grad_norm", "lr"):
        found, expected = ([r[key] for r in read_metrics(tmp_path / name)] for name in ("ours", "theirs"))
        assert found == pytest.approx(expected, rel=1e-5), key
    assert min(found) > 0 and read_metrics(tmp_path / "ours")[0]["grad_norm"] > 0.1
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)


TWO_PROCESSES = """
import sys
import warnings
import test_sft as t
t.train_for_processes(sys.argv[1], gradient_accumulation_steps=2)
"""


def train_for_processes(output_dir, **changes):
    # 45 rows in steps of 8: the last one has 5, so one of two processes gets an empty micro-batch.
    eval_set = tiny_dataset(5, seed=9)
    return train_tiny(
        output_dir, eval_set=eval_set, batch_size=2, epochs=2.04, logging_steps=2, save_steps=3, **changes
    )


def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = run_python(str(script), tmp_path / "two", launcher=launcher)
    assert process.returncode == 0, process.stderr
    train_for_processes(tmp_path / "one", gradient_accumulation_steps=4)
    assert (tmp_path / "two" / "checkpoint-last" / "rng-1.json").exists()
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for key, tolerance in {"loss": 1e-4, "eval_loss": 1e-4, "grad_norm": 1e-3, "lr": 0}.items():
        single, shared = ([record[key] for record in records if key in record] for records in (one, two))
        assert len(single) >= 2
        assert single == pytest.approx(shared, rel=tolerance), key


def test_every_row_once_an_epoch_and_the_same_rows_however_shared():
    def plan(**changes):
        defaults = {"rows": 10, "batch_size": 2, "accumulation": 2, "processes": 1, "epochs": 2.5, "max_steps": None}
        return StepPlan(**{**defaults, "seed": 3, **changes})

    one, two = plan(), plan(accumulation=1, processes=2)
    order = [row for step in range(one.total_steps) for row in one.step_rows(step)]
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20] != list(range(10))
    lengths = torch.arange(10).numpy()
    for step in range(one.total_steps):
        rows = two.step_rows(step)
        assert rows == one.step_rows(step)
        shares = [two.micro_batches(rows, lengths, process) for process in range(2)]
        assert len(shares[0]) == len(shares[1])
        assert all(len(batch) <= 2 for share in shares for batch in share)
        assert sorted(row for share in shares for batch in share for row in batch) == sorted(rows)
    assert plan(max_steps=3).total_steps == 3
    assert plan(seed=4).step_rows(0) != one.step_rows(0)


def test_lr_factor():
    assert [lr_factor(step, 10, 2, "cosine") for step in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert lr_factor(9, 10, 2, "linear") == pytest.approx(1 / 8)
    assert [lr_factor(step, 10, 0, "constant") for step in (0, 9)] == [1.0, 1.0]
    assert lr_factor(9, 10, 10, "cosine") == 1.0


def test_models_with_scaled_or_capped_logits_and_those_that_can_not_be_trained(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    shape = {
        "vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.5,
    }  # fmt: skip
    row = torch.arange(3, 11)
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=0.05)),
        CohereForCausalLM(CohereConfig(**{k: v for k, v in shape.items() if k != "head_dim"}, logit_scale=0.25)),
    ):
        AnswerLoss(model).check(row)
    capped = AnswerLoss(Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=0.05)))
    capped.logit_softcap = None
    with pytest.raises(ValueError, match="Gemma2ForCausalLM computes its logits in a way"):
        capped.check(row)
    with pytest.raises(ValueError, match="no trainable parameters"):
        train_tiny(tmp_path, model=tiny_llama().requires_grad_(False))
    model = inject(tiny_llama(tie_word_embeddings=False), LoRAConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="output embedding must be an nn.Linear without adapter, got FusedLoRALinear"):
        train_tiny(tmp_path, model=model)


def test_what_the_loss_does_not_reach_is_named_once(tmp_path):
    message = r"no gradient in the first step: model\.model\.layers\.\*\.unused\.weight\."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_tiny(tmp_path / "plain", max_steps=2)
        model = inject(tiny_llama(), LoRAConfig(r=4))
        for layer in model.model.layers:
            layer.unused = torch.nn.Linear(2, 2, bias=False)
        assert not any("no gradient" in str(warning.message) for warning in caught)
        train_tiny(tmp_path / "unused", model=model, max_steps=2)
        train_tiny(tmp_path / "unused", model=model, max_steps=4, resume=True)
    assert [bool(re.match(message, str(w.message))) for w in caught if "no gradient" in str(w.message)] == [True]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def poison(record):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)

    model = inject(tiny_llama(), LoRAConfig(r=2))
    with pytest.raises(FloatingPointError, match="became nan"):
        train_tiny(tmp_path, model=model, callbacks=[poison], save_steps=1, max_steps=4)
    state = json.loads((tmp_path / "checkpoint-last" / "training_state.json").read_text())
    assert state["step"] == 1


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(tmp_path):
    model = inject(tiny_llama(), LoRAConfig(r=2))
    calls = []

    def poison(grad):
        calls.append(None)
        return grad * math.inf if len(calls) == 3 else grad

    next(p for p in model.parameters() if p.requires_grad).register_hook(poison)
    with pytest.raises(FloatingPointError, match="gradient was not finite.*up to step 3"):
        train_tiny(tmp_path, model=model, save_steps=1, logging_steps=10, max_steps=4, gradient_accumulation_steps=1)
    state = json.loads((tmp_path / "checkpoint-last" / "training_state.json").read_text())
    assert state["step"] == 2


def test_truncate_metrics_drops_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1}\n{"step": 2, "text": "a\u2028b\x85"}\n{"step": 2}\n{"step": 3}\n{"ste', encoding="utf-8"
    )
    truncate_metrics(path, 2)
    kept = path.read_text(encoding="utf-8")
    assert kept == '{"step": 1}\n{"step": 2, "text": "a\u2028b\x85"}\n{"step": 2}\n'
    assert len(metrics.read_metrics(path)) == 3


def test_target_modules():
    assert target_modules("all-linear") == "all-linear"
    assert target_modules("q_proj") == ["q_proj"]
    assert target_modules("q_proj, self_attn.v_proj") == ["q_proj", "self_attn.v_proj"]
    assert target_modules(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"
    assert target_modules(["q_proj"]) == ["q_proj"]


def test_config_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d.json\nlr: 2e-4\nmax_steps: 10\ntarget: [q_proj, v_proj]\n")
    config = SFTConfig.from_yaml(path, r=8)
    assert (config.lr, config.max_steps, config.r, config.target) == (2e-4, 10, 8, ["q_proj", "v_proj"])
    config.save_yaml(tmp_path / "saved.yaml")
    assert SFTConfig.from_yaml(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ndata: d\nrank: 3\n", "unknown field 'rank'; allowed: model"),
        ("model: m\n", "missing field 'data'"),
        ("model: m\ndata: [d, 3]\n", "data must be str, got 3"),
        ("- a\n", "expected a mapping"),
        ("model: m\ndata: d\nr: 1.5\n", "r must be int or nothing, got 1.5"),
        ("model: m\ndata: d\nr: 0\n", "r must be >= 1 or left out, got 0"),
        ("model: m\ndata: d\nlr: fast\n", "lr must be float or nothing, got 'fast'"),
        ("model: m\ndata: d\nresume: 1\n", "resume must be bool, got 1"),
        ("model: m\ndata: d\nmethod: lore\n", "method must be one of adalora, dora, full, lora, prefix, prompt, qlora"),
        ("model: m\ndata: d\nlr_scheduler: step\n", "lr_scheduler must be one of cosine, linear, constant"),
        ("model: m\ndata: d\noptimizer: sgd\n", "optimizer must be one of adamw, loraplus, got 'sgd'"),
        ("model: m\ndata: d\nlr_ratio: 0.5\n", "lr_ratio must be finite and >= 1, got 0.5"),
        ("model: m\ndata: d\ninit_r: 6\n", "init_r must be left out with method lora, got 6"),
        ("model: m\ndata: d\nlora_dropout: 1\n", r"lora_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_config_errors(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        SFTConfig.from_yaml(tmp_path / "run.yaml")


def test_epochs_that_floats_cannot_hold():
    for epochs, rows, steps in ((2.2, 50, 11), (1.1, 100, 11), (0.55, 100, 6), (0.001, 50, 1)):
        plan = StepPlan(rows=rows, batch_size=10, accumulation=1, processes=1, epochs=epochs, max_steps=None, seed=0)
        assert plan.total_steps == steps


def test_evaluation_rows_beyond_learned_positions(tmp_path):
    config = GPT2Config(vocab_size=340, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    model = inject(GPT2LMHeadModel(config), LoRAConfig(r=2))
    longer = [({"instruction": "q", "output": "A0 " * 80}, "data:1")]
    with pytest.raises(ValueError, match=r"exceeds the model's context of 64"):
        train_tiny(tmp_path, model=model, eval_set=build_dataset(longer, tiny_tokenizer(), 128, "data"))
