"""Each setting of each trainer does what its formula says, in the run itself: gradients, metrics.jsonl, files."""

import dataclasses
import functools
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import settings_oracle as oracle
import torch
from safetensors.torch import load_file
from tiny_chat import tiny_llama, tiny_records, tiny_tokenizer
from tiny_models import in_backward
from tiny_pairs import tiny_pairs

from lora_kernels import backends
from lora_kernels.methods.lora import lora_modules
from lora_kernels.train import reward, run
from lora_kernels.train.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from lora_kernels.train.dpo import run_dpo
from lora_kernels.train.ppo import trainer as ppo
from lora_kernels.train.ppo.reward_function import RewardError
from lora_kernels.train.ppo.trainer import run_ppo
from lora_kernels.train.reward import run_reward
from lora_kernels.train.sft import run_sft

TRAINERS = {
    "sft": (SFTConfig, run_sft), "reward": (RewardConfig, run_reward), "dpo": (DPOConfig, run_dpo),
    "ppo": (PPOConfig, run_ppo),
}  # fmt: skip
LOOP = ("sft", "reward", "dpo")
# Names that tests claim to cover, by trainer.
COVERED = {trainer: set() for trainer in TRAINERS}
TIMINGS = ("tokens_per_second", "eval_seconds", "seconds/rollout", "seconds/score", "seconds/update")

BASE = {
    "dtype": "float32", "r": 3, "lora_alpha": 1.5, "init": "both_gaussian", "lr": 2e-2, "warmup_ratio": 0.4,
    "weight_decay": 0.5, "max_grad_norm": 0.5, "max_length": 40, "seed": 3, "max_steps": 5, "batch_size": 2,
    "eval_steps": 3, "save_steps": 100,
}  # fmt: skip
OWN = {
    "sft": {},
    "reward": {"center_coef": 0.02},
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "ppo": {
        "reward": "test_settings:score", "lora_alpha": 1.0, "lr": 1e-2, "max_steps": 3, "batch_size": 4,
        "rollout_size": 5, "max_new_tokens": 6, "temperature": 0.8, "missing_eos_penalty": 0.5, "kl_coef": 0.1,
        "kl_target": 4.0, "kl_horizon": 20.0, "gamma": 0.9, "lam": 0.8, "ppo_epochs": 2, "minibatches": 2,
        "cliprange": 0.1, "cliprange_value": 0.15, "vf_coef": 0.4, "value_lr": 3e-2, "eval_prompts": 2,
    },
}  # fmt: skip


def score(prompts, responses):
    """Vowels in each answer."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in responses]


def length(prompts, responses):
    return [float(len(text)) for text in responses]


def picky(prompts, responses):
    """No number for some of the answers."""
    found = score(prompts, responses)
    return [vowels if len(text) % 3 else math.nan for text, vowels in zip(responses, found, strict=True)]


@dataclasses.dataclass
class Calls:
    """What a spy saw of a run: rows of the decoder's calls with and without gradients, whether backward ran its layer,
    the backend in force and the seed of torch's generator meanwhile, sizes of what was sampled together; the model."""

    model: object = None
    learned: list = dataclasses.field(default_factory=list)
    judged: list = dataclasses.field(default_factory=list)
    recomputed: bool = False
    backends: set = dataclasses.field(default_factory=set)
    seeds: set = dataclasses.field(default_factory=set)
    sampled: list = dataclasses.field(default_factory=list)

    def watch(self, model):
        self.model = model
        model.model.register_forward_pre_hook(self._decoder, with_kwargs=True)
        model.model.layers[0].mlp.register_forward_pre_hook(self._layer)
        return model

    def _decoder(self, decoder, arguments, named):
        (self.learned if torch.is_grad_enabled() else self.judged).append(len(named["input_ids"]))
        self.backends.add(backends.selected())
        if torch.is_grad_enabled():
            self.seeds.add(torch.initial_seed())

    def _layer(self, layer, arguments):
        self.recomputed |= in_backward()


@dataclasses.dataclass
class Ran:
    config: object
    records: list
    parameters: dict
    gradients: dict  # of the last step, where that is the first one too
    drawn: list
    evaluations: list
    calls: Calls


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "tie_word_embeddings": False}  # fmt: skip
    for name, seed in (("model", 0), ("other", 1)):
        model = tiny_llama(seed, **size)
        with torch.no_grad():
            # Some answers of PPO are to end, and some to hold the token that `stop` names.
            model.lm_head.weight[[2, *tiny_tokenizer()("apple").input_ids]] *= 4
        model.save_pretrained(directory / name)
        tiny_tokenizer().save_pretrained(directory / name)
    for name, count, seed in (("train", 7, 0), ("more", 6, 1), ("eval", 3, 2)):
        (directory / f"{name}.json").write_text(json.dumps(tiny_records(count, seed)))
        pairs = [{**pair, "margin": 0.1 * i} for i, pair in enumerate(tiny_pairs(count, seed))]
        (directory / f"{name}_pairs.json").write_text(json.dumps(pairs))
    return directory


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """run(trainer, **changes of the base settings) -> Ran, each only once."""
    patch = pytest.MonkeyPatch()
    # Nobody looks at the plots here, and they take longer than the training.
    for module, name in ((run, "plot_loss"), (run, "plot_ranks"), (ppo, "plot_ppo"), (reward, "plot_rewards")):
        patch.setattr(module, name, lambda *_, **__: None)
    calls, drawn = Calls(), []
    load_model, sample = run.load_model, ppo.sample

    def watched(*arguments, **named):
        model, tokenizer = load_model(*arguments, **named)
        return calls.watch(model), tokenizer

    def spied(*arguments):
        drawn.extend(found := sample(*arguments))
        calls.sampled.append(len(found))
        return found

    patch.setattr(run, "load_model", watched)
    patch.setattr(ppo, "sample", spied)

    @functools.cache
    def once(trainer, changes):
        nonlocal calls
        calls = Calls()
        drawn.clear()
        config = make(world, trainer, tmp_path_factory.mktemp("run") / "out", **dict(changes))
        rollouts, evaluations = [], []

        def split(record):
            if trainer == "ppo":
                (evaluations if "eval_score" in record else rollouts).append(drawn.copy())
                drawn.clear()

        TRAINERS[trainer][1](config, callbacks=[split], progress=False)
        return finish(config, rollouts, evaluations, calls)

    yield lambda trainer, **changes: once(trainer, tuple(sorted(changes.items())))
    patch.undo()


def make(world, trainer, output_dir, **changes):
    pairs = "_pairs" if trainer in ("reward", "dpo") else ""
    settings = {"model": "model", "data": "train", "eval_data": "eval", **BASE, **OWN[trainer], **changes}
    settings["model"] = str(world / settings["model"])
    for name in ("data", "eval_data"):
        settings[name] = settings[name] and str(world / f"{settings[name]}{pairs}.json")
    if settings.get("method") in ("prefix", "prompt", "full", "adalora") and "init" not in changes:
        del settings["init"]
    if settings.get("adapter"):
        # Its own are in its files.
        settings = {
            name: x for name, x in settings.items() if name in changes or name not in ("r", "lora_alpha", "init")
        }
    if settings.get("reward_adapter"):
        settings["reward"] = None
    return TRAINERS[trainer][0](output_dir=str(output_dir), **settings)


def finish(config, rollouts=(), evaluations=(), calls=None):
    output_dir = Path(config.output_dir)
    tensors = load_file(output_dir / "checkpoint-last" / "training_state.safetensors")
    of_model = "" if isinstance(config, PPOConfig) else "model."
    tensors = {name.replace("/model.", "/", of_model != ""): x.double() for name, x in tensors.items() if x.numel()}
    parameters = {name.removeprefix("parameter/"): x for name, x in tensors.items() if name.startswith("parameter/")}
    gradients = {name: tensors[f"optimizer/{name}/exp_avg"] / 0.1 for name in parameters}
    return Ran(config, records_of(output_dir), parameters, gradients, list(rollouts), list(evaluations), calls)


def records_of(output_dir):
    """The lines of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def expected(trainer, ran, config=None):
    """(records, parameters) that the settings mean, by default those of the run; PPO's answers are the run's."""
    config = config or ran.config
    if trainer != "ppo":
        return oracle.expected(trainer, config)[:2]
    stops = {2} | ({oracle.encode(oracle.load(config.model)[1], config.stop)[0]} if config.stop else set())
    reward = globals()[config.reward.split(":")[1]] if config.reward else None
    return oracle.PPO(config, lambda text: reward(None, [text])[0], stops, ran.drawn, ran.evaluations).run()


def differences(found, wanted, tolerance):
    """What of (records, parameters) is not the same."""
    texts = []
    if [sorted(record) for record in found[0]] != [sorted(record) for record in wanted[0]]:
        return [f"records {[sorted(r) for r in found[0]]} for {[sorted(r) for r in wanted[0]]}"]
    for ours, theirs in zip(found[0], wanted[0], strict=True):
        for name, value in theirs.items():
            if not math.isnan(value) and ours[name] != pytest.approx(value, rel=tolerance, abs=tolerance):
                texts.append(f"step {theirs['step']}: {name} {ours[name]} for {value}")
    if found[1].keys() != wanted[1].keys():
        return [*texts, f"parameters {sorted(found[1])} for {sorted(wanted[1])}"]
    for name, value in wanted[1].items():
        if found[1][name].shape != value.shape:
            texts.append(f"{name} is {tuple(found[1][name].shape)} for {tuple(value.shape)}")
        elif (found[1][name] - value).norm() > tolerance * (1 + value.norm()):
            texts.append(f"{name} by {(found[1][name] - value).norm():.2g} of {value.norm():.2g}")
    return texts


ALL = tuple(TRAINERS)
VIRTUAL = ("sft", "dpo")  # with every method
RANKS = {"method": "adalora", "init_r": 4, "target_r": 2, "tfinal": 1, "max_steps": 6}
PREFIX = {"method": "prefix", "num_virtual_tokens": 4}
PROMPT = {"method": "prompt", "num_virtual_tokens": 4}
# (trainers, field, another value than the base's, further settings)
CASES = [
    (ALL, "model", "other", {}),
    (ALL, "data", "more", {}),
    (ALL, "eval_data", "more", {}),
    (ALL, "eval_data", None, {}),
    (ALL, "method", "qlora", {}),
    (("sft", "reward", "dpo"), "method", "dora", {}),
    (VIRTUAL, "method", "adalora", {}),
    (VIRTUAL, "method", "full", {}),
    (VIRTUAL, "method", "prefix", {}),
    (VIRTUAL, "method", "prompt", {}),
    (ALL, "double_quant", True, {"method": "qlora"}),
    (ALL, "r", 2, {}),
    (ALL, "lora_alpha", 4.0, {}),
    (ALL, "use_rslora", True, {}),
    (ALL, "target", "q_proj,down_proj", {}),
    (VIRTUAL, "target", "q_proj,lm_head,norm", {"method": "full"}),
    (ALL, "exclude_modules", "q_proj,down_proj", {}),
    (VIRTUAL, "exclude_modules", "mlp,norm", {"method": "full"}),
    (ALL, "init", "default", {}),
    (ALL, "init", "gaussian", {}),
    (ALL, "init", "b_gaussian", {}),
    (ALL, "epochs", 1.5, {"max_steps": None}),
    (ALL, "max_steps", 2, {}),
    (ALL, "max_steps", None, {}),
    (LOOP, "batch_size", 3, {}),
    (LOOP, "gradient_accumulation_steps", 2, {}),
    (ALL, "optimizer", "loraplus", {"lr_ratio": 4.0}),
    (ALL, "lr_ratio", 2.0, {"optimizer": "loraplus", "lr_ratio": 4.0}),
    (ALL, "lr", 5e-3, {}),
    (LOOP, "lr_scheduler", "linear", {}),
    (LOOP, "lr_scheduler", "constant", {}),
    (("ppo",), "lr_scheduler", "cosine", {"warmup_ratio": 0.0}),
    (("ppo",), "lr_scheduler", "constant", {"warmup_ratio": 0.0}),
    (ALL, "warmup_ratio", 0.0, {}),
    (ALL, "warmup_ratio", 0.7, {}),
    (ALL, "weight_decay", 2.0, {}),
    (VIRTUAL, "weight_decay", 2.0, {"method": "full"}),
    (("sft", "reward", "dpo"), "weight_decay", 2.0, {"method": "dora"}),
    (ALL, "max_grad_norm", 0.0, {}),
    (ALL, "max_grad_norm", 2.0, {}),
    (ALL, "max_length", 19, {}),
    (ALL, "seed", 4, {}),
    (LOOP, "eval_steps", 2, {}),
    (ALL, "eval_steps", None, {}),
    (LOOP, "logging_steps", 3, {}),
    (ALL, "chat_template", oracle.jinja(oracle.PLAIN), {}),
    (ALL, "date", "2021-04-03", {"date": "2020-01-02", "chat_template": oracle.DATED, "max_length": 60}),
    (VIRTUAL, "init_r", 3, RANKS),
    (VIRTUAL, "target_r", 1, RANKS),
    (VIRTUAL, "tinit", 3, RANKS),
    (VIRTUAL, "tfinal", 3, RANKS),
    (VIRTUAL, "delta_t", 2, RANKS),
    (VIRTUAL, "beta1", 0.2, RANKS),
    (VIRTUAL, "beta2", 0.01, {**RANKS, "max_steps": 9}),
    (VIRTUAL, "orth_reg_weight", 3.0, RANKS),
    (VIRTUAL, "lora_alpha", 4.0, RANKS),
    (VIRTUAL, "num_virtual_tokens", 3, PREFIX),
    (VIRTUAL, "num_virtual_tokens", 3, PROMPT),
    (VIRTUAL, "init", "random", PREFIX),
    (VIRTUAL, "init", "random", PROMPT),
    (VIRTUAL, "init", "zero", PREFIX),
    (VIRTUAL, "init_text", "red apple", {**PREFIX, "init": "text", "init_text": "green pear"}),
    (VIRTUAL, "init_text", "two red apple", {**PROMPT, "init": "text", "init_text": "green pear"}),
    (VIRTUAL, "mlp_hidden", 5, PREFIX),
    (("reward",), "center_coef", 0.5, {}),
    (("dpo",), "loss", "ipo", {"label_smoothing": 0.0}),
    (("dpo",), "beta", 0.05, {}),
    (("dpo",), "beta", 1.0, {"loss": "ipo", "label_smoothing": 0.0}),
    (("dpo",), "label_smoothing", 0.0, {}),
    (("ppo",), "rollout_size", 4, {}),
    (("ppo",), "max_new_tokens", 4, {}),
    (("ppo",), "temperature", 1.5, {}),
    (("ppo",), "stop", "apple", {}),
    (("ppo",), "missing_eos_penalty", 1.5, {}),
    (("ppo",), "kl_coef", 0.4, {}),
    (("ppo",), "kl_estimator", "k2", {}),
    (("ppo",), "kl_estimator", "k3", {}),
    (("ppo",), "kl_target", None, {}),
    (("ppo",), "kl_target", 6.0, {}),
    (("ppo",), "kl_horizon", 50.0, {}),
    (("ppo",), "gamma", 0.5, {}),
    (("ppo",), "lam", 0.4, {}),
    (("ppo",), "score_position", "last", {}),
    (("ppo",), "whiten_rewards", True, {}),
    (("ppo",), "whiten_advantages", False, {}),
    (("ppo",), "ppo_epochs", 3, {}),
    (("ppo",), "minibatches", 3, {}),
    (("ppo",), "cliprange", 0.3, {}),
    (("ppo",), "cliprange_value", 0.01, {}),
    (("ppo",), "dual_clip", 1.05, {}),
    (("ppo",), "vf_coef", 0.0, {}),
    (("ppo",), "target_kl", 0.01, {"ppo_epochs": 3}),
    (("ppo",), "value_lr", None, {}),
    (("ppo",), "eval_prompts", 1, {}),
    (("ppo",), "reward", "test_settings:length", {}),
    (("ppo",), "bad_rewards", "skip", {"reward": "test_settings:picky"}),
]


def cases():
    for trainers, field, value, further in CASES:
        for trainer in trainers:
            COVERED[trainer].add(field)
            named = "".join(f"-{name}={x}" for name, x in further.items() if name in ("method", "loss"))
            yield pytest.param(trainer, field, value, further, id=f"{trainer}-{field}={str(value)[:12]}{named}")


def covers(trainers, *fields):
    """Marks a test of these settings, which runs for each of the trainers."""
    for trainer in trainers:
        COVERED[trainer] |= {*fields}
    return pytest.mark.parametrize("trainer", trainers)


def assert_as_expected(trainer, ran):
    wanted = expected(trainer, ran)
    assert not differences((ran.records, ran.parameters), wanted, 1e-4)
    return wanted


@covers(ALL, "output_dir")
def test_a_run_is_what_its_settings_say(trainer, runs):
    ran = runs(trainer)
    assert_as_expected(trainer, ran)
    output_dir = Path(ran.config.output_dir)
    assert TRAINERS[trainer][0].from_yaml(output_dir / "config.yaml") == ran.config


@covers(LOOP, "eval_data")
def test_the_adapter_is_that_of_the_best_evaluation(trainer, runs):
    ran = runs(trainer, lr=0.1, seed=4, eval_steps=1)
    assert_as_expected(trainer, ran)
    losses = [record["eval_loss"] for record in ran.records if "eval_loss" in record]
    assert min(losses) < losses[-1]
    adapter, scale, saved = oracle.read_adapter(ran.config.output_dir)
    assert not differences(([], {**adapter, **saved}), ([], oracle.expected(trainer, ran.config)[2]), 1e-4)
    assert scale == oracle.scaling(ran.config)
    if trainer == "reward":
        judged = oracle.read(Path(ran.config.output_dir) / "reward_eval.json")
        best = next(record for record in ran.records if record.get("eval_loss") == min(losses))
        for name in ("accuracy", "margin", "reward_chosen", "reward_rejected"):
            assert judged[name] == pytest.approx(best[f"eval_{name}"], abs=1e-5), name


@pytest.mark.filterwarnings("ignore:.*dropped")
@pytest.mark.parametrize(("trainer", "field", "value", "further"), cases())
def test_another_value(trainer, field, value, further, runs, world):
    """The run is that of the formula with this value, and one with the base's value would be another."""
    ran = runs(trainer, **{**further, field: value})
    wanted = assert_as_expected(trainer, ran)
    ignored = make(world, trainer, ran.config.output_dir, **further)
    assert getattr(ignored, field) != getattr(ran.config, field)
    try:
        other = expected(trainer, ran, ignored)
    except oracle.Mismatch:
        return
    assert differences(other, wanted, 1e-3)


@covers(LOOP, "lora_dropout")
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_dropout(trainer, method, runs):
    """While lora_b, or AdaLoRA's lora_e, is 0, its gradient is linear in dropout(x): the mean is that without dropout,
    the variance goes with p / (1 - p)."""
    if method == "adalora" and trainer not in VIRTUAL:
        pytest.skip(f"{trainer} has no adalora")
    first = {"method": method, "max_steps": 1, "max_grad_norm": 0.0, "batch_size": 6}
    first |= {"init": "default"} if method == "lora" else {"init_r": 16, "target_r": 16}
    zero = "lora_b" if method == "lora" else "lora_e"

    def gradient(p, seed):
        found = runs(trainer, lora_dropout=p, seed=seed, **first).gradients
        return torch.cat([x.flatten() for name, x in sorted(found.items()) if name.endswith(zero)])

    # Of three seeds, since the masks of one are not many.
    plain, little, much = (torch.cat([gradient(p, seed) for seed in (3, 4, 5)]) for p in (0.0, 0.2, 0.5))
    little, much = little - plain, much - plain
    assert (much.norm() / little.norm()) ** 2 == pytest.approx(4.0, rel=0.4)
    for noise in (little, much):
        assert abs(noise @ plain) < 0.3 * plain @ plain
    assert little.norm() > 0.02 * plain.norm()


@covers(ALL, "seed")
def test_seed(trainer, runs):
    """What else than initial values and the order of rows, which the formula has, depends on it."""
    given = {"adapter": runs("sft").config.output_dir} if trainer == "ppo" else {}
    one, other = (runs(trainer, seed=seed, **given) for seed in (3, 4))
    if trainer == "ppo":
        # The same policy answers the same prompts.
        answers, others = ([e.response for e in ran.evaluations[0]] for ran in (one, other))
        assert answers != others
    else:
        # Dropout comes from torch's generator.
        assert (one.calls.seeds, other.calls.seeds) == ({3}, {4})


@covers(ALL, "dtype")
def test_dtype(trainer, runs):
    for dtype in (torch.float32, torch.bfloat16):
        ran = runs(trainer, dtype=str(dtype).removeprefix("torch."))
        model = ran.calls.model
        assert model.lm_head.weight.dtype == dtype
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    if trainer in LOOP:
        exact = runs(trainer).records[0]["loss"]
        assert ran.records[0]["loss"] == pytest.approx(exact, rel=0.1) and ran.records[0]["loss"] != exact


@covers(ALL, "gradient_checkpointing")
def test_gradient_checkpointing(trainer, runs):
    base, ran = runs(trainer), runs(trainer, gradient_checkpointing=True)
    assert_as_expected(trainer, ran)
    assert (base.calls.recomputed, ran.calls.recomputed) == (False, True)


@covers(ALL, "fuse_decoder")
def test_fuse_decoder(trainer, runs):
    for value in (True, False):
        ran = runs(trainer, fuse_decoder=value)
        assert_as_expected(trainer, ran)
        assert ("forward" in vars(ran.calls.model.model.norm)) is (value and not torch.accelerator.is_available())


@covers(ALL, "backend")
def test_backend(trainer, runs):
    assert runs(trainer).calls.backends == {backends.selected()}
    ran = runs(trainer, backend="reference")
    assert ran.calls.backends == {"reference"}
    assert_as_expected(trainer, ran)


@covers(ALL, "batch_size", "gradient_accumulation_steps", "rollout_batch_size")
def test_rows_together(trainer, runs):
    """How many rows the model sees at a time, which changes nothing else where a step has as many."""
    if trainer == "ppo":
        # Minibatches of 3 and 2 answers; policy and value model; two epochs of three steps.
        for size, rows in ((4, [3, 3, 2, 2]), (2, [2, 2, 1, 1, 2, 2])):
            ran = runs(trainer, batch_size=size)
            assert ran.calls.learned == rows * 6
            assert_as_expected(trainer, ran)
        # Two prompts for each evaluation, five for each step.
        assert ran.calls.sampled == [2, 5, 5, 5, 2]
        ran = runs(trainer, rollout_batch_size=2)
        assert ran.calls.sampled == [2, *[2, 2, 1] * 3, 2]
        assert_as_expected(trainer, ran)
        return
    answers = 1 if trainer == "sft" else 2
    for size, accumulation in ((2, 1), (1, 2), (3, 1), (2, 2)):
        ran = runs(trainer, batch_size=size, gradient_accumulation_steps=accumulation)
        assert ran.calls.learned == [answers * size] * 5 * accumulation
        assert_as_expected(trainer, ran)


def saved_step(config):
    state = Path(config.output_dir) / "checkpoint-last" / "training_state.json"
    return json.loads(state.read_text())["step"] if state.exists() else 0


@covers(ALL, "save_steps")
def test_save_steps(trainer, runs, world, tmp_path):
    # By default once an epoch of 7 rows: every fourth step of 2, every step of 5.
    for save_steps, every in ((2, 2), (None, 4 if trainer in LOOP else 1)):
        config, seen = make(world, trainer, tmp_path / str(save_steps), save_steps=save_steps), {}

        def watch(record, config=config, seen=seen):
            if record["step"]:
                seen.setdefault(record["step"], saved_step(config))

        TRAINERS[trainer][1](config, callbacks=[watch], progress=False)
        assert seen == {step: (step - 1) // every * every for step in seen} and saved_step(config) == max(seen)
        assert finish(config).records == runs(trainer).records


@covers(ALL, "resume")
def test_resume(trainer, runs, world, tmp_path):
    config, base = make(world, trainer, tmp_path, save_steps=1), runs(trainer)

    def stop(record):
        if record["step"] == 3 and "lr" in record:
            raise KeyboardInterrupt

    train = TRAINERS[trainer][1]
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[stop], progress=False)
    assert saved_step(config) == 2
    with pytest.raises(FileExistsError, match="holds another run"):
        train(config, progress=False)
    assert saved_step(config) == 2
    train(dataclasses.replace(config, resume=True), progress=False)
    found = finish(config)
    assert found.records == base.records
    assert all(torch.equal(value, base.parameters[name]) for name, value in found.parameters.items())


@covers(ALL, "tensorboard")
def test_tensorboard(trainer, runs, monkeypatch):
    """Every number of metrics.jsonl, in a writer of the run's directory that is closed at the end."""
    writers = []

    class Writer:
        def __init__(self, log_dir, **options):
            self.log_dir, self.scalars, self.closed = log_dir, [], False
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    ran = runs(trainer, tensorboard=True)
    assert_as_expected(trainer, ran)
    (writer,) = writers
    scalars = [scalar for scalar in writer.scalars if scalar[0] not in TIMINGS]
    assert scalars == [
        (name, x, record["step"]) for record in ran.records for name, x in record.items() if name != "step"
    ]
    assert writer.closed and Path(writer.log_dir).parent == Path(ran.config.output_dir)
    assert not runs(trainer).config.tensorboard and len(writers) == 1


@covers(("sft",), "cuda_graphs")
def test_cuda_graphs(trainer, runs):
    """What they compute, on a GPU, is in tests/backends/test_gpu.py."""
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda_graphs needs one process on a CUDA GPU"):
            runs(trainer, cuda_graphs=True)


@covers(("dpo",), "precompute_ref")
def test_precompute_ref(trainer, runs):
    """The reference sees each of the 7 + 3 pairs once in advance, or those of each batch of training and evaluation."""
    for value in (True, False):
        ran = runs(trainer, precompute_ref=value)
        assert_as_expected(trainer, ran)
        evaluations = [4, 2] * 2
        check, training = [1], [4] * 5
        assert ran.calls.learned == training
        reference = [4, 4, 4, 2, 4, 2] if value else training + evaluations
        assert sorted(ran.calls.judged) == sorted(check * 2 + reference + evaluations)


@covers(("reward",), "normalize_samples", "normalize_data", "normalize_tokens")
def test_normalization(trainer, runs, world, monkeypatch):
    """Gain and bias that give mean 0 and standard deviation 1 to the rewards of answers that the base model samples."""
    generated = []
    generate = reward.generate

    def spied(model, tokenizer, prompts, max_new_tokens, *arguments, **named):
        assert not list(lora_modules(model))
        found = generate(model, tokenizer, prompts, max_new_tokens, *arguments, **named)
        generated.append((prompts, found, max_new_tokens, torch.initial_seed()))
        return found

    def sampled():
        prompts, answers = ([text for call in generated for text in call[i]] for i in (0, 1))
        limits, seeds = ({call[i] for call in generated} for i in (2, 3))
        generated.clear()
        return prompts, answers, limits, seeds

    monkeypatch.setattr(reward, "generate", spied)
    assert not (Path(runs(trainer).config.output_dir) / "reward_normalization.json").exists()
    for samples, tokens, data in ((4, 3, None), (9, 6, "more_pairs.json")):
        data = data and str(world / data)
        changes = {"normalize_samples": samples, "normalize_tokens": tokens, "normalize_data": data}
        # Of the adapter of the best evaluation, which with these isn't the last.
        ran = runs(trainer, **changes, lr=0.1, seed=4, eval_steps=1)
        prompts, answers, limits, _ = sampled()
        there = [pair["prompt"] for pair in oracle.read(data or ran.config.data)]
        assert len(prompts) == samples and {*prompts} <= {*there} and limits == {tokens}
        best = oracle.expected(trainer, ran.config)[2]
        rows = [oracle.render(ran.config, *chat)[0] for chat in zip(prompts, answers, strict=True)]
        _, hidden = oracle.forward(ran.config, best, rows)
        scores = np.array([(hidden[i, len(row) - 1] @ best["score.weight"][0]).item() for i, row in enumerate(rows)])
        values = oracle.read(Path(ran.config.output_dir) / "reward_normalization.json")
        assert (values["gain"] * scores + values["bias"]).mean() == pytest.approx(0, abs=1e-3)
        assert (values["gain"] * scores).std(ddof=1) == pytest.approx(1, rel=1e-3)
    runs(trainer, **changes, seed=100)
    others, _, _, seeds = sampled()
    assert others != prompts and min(seeds) >= 100


@covers(("ppo",), "top_k", "top_p")
def test_what_is_sampled(trainer, runs):
    """The tokens of the first answers among the likeliest: their rank, and the probability of those before them."""

    def places(ran):
        policy = oracle.roles(ran.config)[0]
        episodes = ran.evaluations[0] + ran.drawn[0]
        logits, _ = oracle.forward(ran.config, policy.state, [e.prompt + e.response for e in episodes])
        ranks, before = [], []
        for row, e in enumerate(episodes):
            for at, token in enumerate(e.response, start=len(e.prompt) - 1):
                probs = (logits[row, at] / ran.config.temperature).softmax(-1)
                ranks.append((probs > probs[token]).sum().item())
                before.append(probs[probs > probs[token]].sum().item())
        return max(ranks), max(before)

    rank, before = places(runs(trainer))
    assert rank > 50 and before > 0.9
    rank, _ = places(runs(trainer, top_k=5))
    assert 1 < rank < 5
    _, before = places(runs(trainer, top_p=0.3))
    assert 0.05 < before < 0.3
    for changes in ({"top_k": 5}, {"top_p": 0.3}):
        assert_as_expected(trainer, runs(trainer, **changes))


@covers(("ppo",), "bad_rewards")
def test_a_bad_reward_ends_the_run(trainer, runs):
    with pytest.raises(RewardError, match="returned nan"):
        runs(trainer, reward="test_settings:picky")


@covers(("ppo",), "adapter", "reward_adapter")
@pytest.mark.parametrize("field", ["adapter", "reward_adapter"])
def test_adapters(trainer, field, runs, world):
    judge = {"normalize_samples": 4, "normalize_tokens": 3, "normalize_data": None}
    given = runs("sft") if field == "adapter" else runs("reward", **judge)
    ran = runs(trainer, **{field: given.config.output_dir})
    wanted = assert_as_expected(trainer, ran)
    other = expected(trainer, ran, make(world, trainer, ran.config.output_dir))
    assert differences(other, wanted, 1e-3)


@covers(LOOP, "adapter")
def test_going_on_from_an_adapter(trainer, runs, world):
    given = {"adapter": runs("sft").config.output_dir, "r": None, "lora_alpha": None, "init": None}
    ran = runs(trainer, **given)
    wanted = assert_as_expected(trainer, ran)
    other = expected(trainer, ran, make(world, trainer, ran.config.output_dir))
    assert differences(other, wanted, 1e-3)


def test_no_setting_is_without_a_test():
    """Whoever adds a field adds it to CASES, or a test that says `covers`."""
    for trainer, (config, _) in TRAINERS.items():
        fields = {field.name for field in dataclasses.fields(config)} - {*config.unused}
        assert not fields - COVERED[trainer], f"no test of {config.__name__}'s {', '.join(fields - COVERED[trainer])}"
