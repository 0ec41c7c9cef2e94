import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from places import TESTS, run_python
from safetensors.torch import load_file
from tiny_chat import tiny_llama, tiny_records, tiny_tokenizer
from tiny_models import logits, perturb, tiny_batch, tiny_model
from torch import nn
from torch.nn import functional as F

from lora_kernels import (
    AdaLoRAConfig,
    LoRAConfig,
    LoRAPlusAdamW,
    adapters_disabled,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lora_kernels.data.dataset import build_dataset
from lora_kernels.methods import training_hook
from lora_kernels.methods.adalora import RankAllocator, Triplets, orthogonality
from lora_kernels.methods.lora import lora_modules, replace_module
from lora_kernels.nn.nf4_linear import NF4Linear
from lora_kernels.train import loop
from lora_kernels.train.adapter import method_config
from lora_kernels.train.config import SFTConfig
from lora_kernels.train.plots import plot_ranks
from lora_kernels.train.sft import run_sft, train_sft

ORACLE = TESTS / "oracles" / "adalora_oracle.json"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def ranks_of(model):
    return {name: layer.r for name, layer in lora_modules(model)}


def adalora(kind="llama", train=False, **changes):
    torch.manual_seed(5)
    settings = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": TARGETS}
    return inject(tiny_model(kind), AdaLoRAConfig(**{**settings, **changes})).train(train)


def cut(model, ranks=(0, 1, 3)):
    """Cuts the adapters to `ranks` in turn: what the end of the schedule leaves."""
    perturb(model)
    for (_, layer), r in zip(lora_modules(model), 20 * ranks, strict=False):
        layer.keep_ranks(torch.randperm(layer.r, generator=torch.Generator().manual_seed(2))[:r])
    return model


def lm_loss(model):
    return model(input_ids=tiny_batch(), labels=tiny_batch()).loss


def tensors(values, dtype=torch.float32):
    return {
        name: Triplets(*(torch.tensor(values[name][field], dtype=dtype) for field in Triplets._fields))
        for name in values
    }


@pytest.mark.parametrize("interrupted", [False, True])
def test_allocator_against_the_figures_of_peft(interrupted):
    """tests/oracles/adalora_oracle.json: PEFT 0.21.2's RankAllocator, driven with given weights and gradients."""
    oracle = json.loads(ORACLE.read_text())
    total_step = oracle["config"].pop("total_step")
    arguments = (AdaLoRAConfig(**oracle["config"]), {"a": 4, "b": 4}, total_step)
    allocator, compared = RankAllocator(*arguments), 0
    for number, step in enumerate(oracle["steps"], start=1):
        weights = tensors(step["weights"])
        allocator.allocate(number, weights, tensors(step["grads"]))
        assert allocator.budget(number) == step["budget"]
        for name, values in step["lora_e_after"].items():
            assert weights[name].lora_e.tolist() == pytest.approx(values, abs=1e-7)
        masks = {name: mask.tolist() for name, mask in allocator.masks.items()}
        assert masks == (step["masks"] or {})
        if masks:
            assert allocator.kept == sum(map(sum, masks.values()))
            compared += 1
        if interrupted:
            state = allocator.state_dict()
            allocator = RankAllocator(*arguments)
            allocator.load_state_dict(state)
    assert number == 12 and compared == 9


def test_scores_against_the_formula_in_float64():
    generator = torch.Generator().manual_seed(0)

    def draw():
        shapes = {"x": ((3, 5), (4, 3), (3,)), "y": ((3, 2), (6, 3), (3,))}
        return {
            name: Triplets(*(torch.randn(shape, generator=generator) for shape in shape3))
            for name, shape3 in shapes.items()
        }

    allocator = RankAllocator(AdaLoRAConfig(init_r=3, target_r=1, beta1=0.7, beta2=0.6), {"x": 3, "y": 3}, 50)
    smooth, spread = {}, {}
    for step in range(1, 5):
        weights, grads = draw(), draw()
        allocator.allocate(step, {name: Triplets(*map(torch.clone, w)) for name, w in weights.items()}, grads)
        for name in weights:
            for i in range(3):
                sensitivity = (weights[name][i].double() * grads[name][i].double()).abs()
                smooth[name, i] = 0.7 * smooth.get((name, i), 0) + 0.3 * sensitivity
                spread[name, i] = 0.6 * spread.get((name, i), 0) + 0.4 * (sensitivity - smooth[name, i]).abs()
    for name, score in allocator.scores().items():
        a, b, e = (smooth[name, i] * spread[name, i] for i in range(3))
        torch.testing.assert_close(score.double(), e + a.mean(1) + b.mean(0), rtol=1e-5, atol=1e-9)


def test_equal_scores_still_meet_the_budget():
    """PEFT takes away every rank at or below a threshold, so all of them here."""
    zeros = {name: Triplets(torch.zeros(4, 3), torch.zeros(2, 4), torch.ones(4)) for name in "ab"}
    allocator = RankAllocator(AdaLoRAConfig(init_r=4, target_r=3), {"a": 4, "b": 4}, 1)
    allocator.allocate(1, zeros, zeros)
    assert allocator.kept == 6 == sum(int(mask.sum()) for mask in allocator.masks.values())


def test_training_agrees_with_peft_until_the_cut(tmp_path):
    """Seven steps with the orthogonality term, AdamW and masks, against PEFT's own training of the same adapters."""
    schedule = {"tinit": 2, "tfinal": 3, "total_step": 12}
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, target_modules=TARGETS, deltaT=2, task_type="CAUSAL_LM", **schedule
    )
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model("llama"), config).train()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(tiny_model("llama"), tmp_path).train()
    assert ours.adapter_config == AdaLoRAConfig(
        init_r=4,
        target_r=2,
        lora_alpha=8,
        target_modules=ours.adapter_config.target_modules,
        delta_t=2,
        modules_to_save=(),
        **schedule,
    )
    hook = training_hook(ours, 12)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05) for model in (theirs, ours)
    ]
    peft_layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_E")
    }
    masked = 0
    for step in range(1, 9):
        lm_loss(theirs).backward()
        optimizers[0].step()
        theirs.base_model.update_and_allocate(step)
        optimizers[0].zero_grad()
        (lm_loss(ours) + hook.extra_loss()).backward()
        optimizers[1].step()
        assert hook.after_step(optimizers[1], step) is False
        optimizers[1].zero_grad()
        for name, layer in hook.layers.items():
            other = peft_layers[name]
            e = other.lora_E["default"][:, 0]
            assert torch.equal(layer.lora_e == 0, e == 0), (step, name)
            masked += int((e == 0).sum())
            torch.testing.assert_close(layer.lora_e, e, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(layer.lora_a, other.lora_A["default"], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(layer.lora_b, other.lora_B["default"], rtol=1e-3, atol=1e-4)
    assert masked > 20


def test_orthogonality_and_its_gradient_against_float64():
    model = cut(adalora())
    layers = dict(lora_modules(model))
    terms, leaves = [], {}
    for name, layer in layers.items():
        for kind in ("lora_a", "lora_b") if layer.r else ():
            leaves[name, kind] = getattr(layer, kind).detach().double().requires_grad_()
            rows = leaves[name, kind] if kind == "lora_a" else leaves[name, kind].T
            terms.append(((rows @ rows.T - torch.eye(layer.r, dtype=torch.float64)) ** 2).sum().sqrt())
    expected = sum(terms) / len(terms)
    expected.backward()
    found = orthogonality(model)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, kind), leaf in leaves.items():
        torch.testing.assert_close(getattr(layers[name], kind).grad.double(), leaf.grad, rtol=1e-5, atol=1e-7)


def test_the_cut_keeps_outputs_optimizer_state_and_training():
    model = adalora(train=True, tinit=1, tfinal=3)
    hook = training_hook(model, 8)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.02)
    for step in range(1, 6):
        (lm_loss(model) + hook.extra_loss()).backward()
        optimizer.step()
        if step == 5:
            before = {
                name: [dict(optimizer.state[p]) for p in _parameters(layer)] for name, layer in hook.layers.items()
            }
        assert hook.after_step(optimizer, step) is (step == 5)
        optimizer.zero_grad()
    masks = hook.allocator.masks
    assert sum(hook.ranks().values()) == 2 * len(masks) == sum(int(mask.sum()) for mask in masks.values())
    assert hook.metrics() == {"budget": 12, "average_rank": 2.0}
    in_optimizer = optimizer.param_groups[0]["params"]
    assert {id(p) for p in in_optimizer} == {id(p) for p in model.parameters() if p.requires_grad}
    assert set(optimizer.state) == set(in_optimizer)
    for name, layer in hook.layers.items():
        for place, parameter in enumerate(_parameters(layer)):
            if not parameter.numel():
                assert not parameter.requires_grad
                continue
            for key in ("exp_avg", "exp_avg_sq"):
                whole = before[name][place][key]
                kept = whole[:, masks[name]] if place == 1 else whole[masks[name]]
                assert torch.equal(optimizer.state[parameter][key], kept)
    ranks = hook.ranks()
    for step in range(6, 9):
        loss = lm_loss(model)
        loss.backward()
        optimizer.step()
        assert hook.after_step(optimizer, step) is False
        optimizer.zero_grad()
    assert hook.ranks() == ranks
    assert lm_loss(model) < loss
    with pytest.raises(ValueError, match=r"has rank \d and init_r is 4: its ranks have been allocated"):
        training_hook(model, 8)


def _parameters(layer):
    return (layer.lora_a, layer.lora_b, layer.lora_e)


def test_a_layer_without_lora_e_is_named():
    model = adalora()
    next(layer for _, layer in lora_modules(model)).lora_e = None
    with pytest.raises(ValueError, match=r"FusedLoRALinear\(in_features=.* has no lora_e; allowed: the layers that"):
        training_hook(model, 8)


def test_masked_ranks_can_be_cut_without_a_trace():
    model = adalora()
    perturb(model)
    for index, (_, layer) in enumerate(lora_modules(model)):
        layer.lora_e.data[index % 5 :] = 0
    expected = logits(model)
    for index, (_, layer) in enumerate(lora_modules(model)):
        layer.keep_ranks(torch.arange(index % 5))
    assert set(ranks_of(model).values()) == {0, 1, 2, 3, 4}
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)


def test_init_r_equal_to_target_r_cuts_nothing():
    model = adalora(train=True, target_r=4)
    hook = training_hook(model, 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, 4):
        lm_loss(model).backward()
        optimizer.step()
        hook.after_step(optimizer, step)
        optimizer.zero_grad()
    assert set(ranks_of(model).values()) == {4}
    assert all(layer.lora_e.all() for _, layer in lora_modules(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_starts_at_the_base_model_and_goes_back_to_it(kind):
    base = logits(tiny_model(kind))
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else TARGETS
    model = adalora(kind, target_modules=targets)
    torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-6)
    layer = next(layer for _, layer in lora_modules(model))
    for matrix in (layer.lora_a, layer.lora_b):
        assert 0.015 < matrix.std() < 0.025
    assert not layer.lora_e.any() and layer.lora_e.dtype == torch.float32
    assert layer.scaling == 8 / (4 + 1e-5)
    cut(model)
    adapted = logits(model)
    assert not torch.allclose(adapted, base, atol=1e-3)
    with adapters_disabled(model):
        torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-6)
    merged = merge(model)
    assert not ranks_of(merged) and not hasattr(merged, "adapter_config")
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)


def test_over_an_nf4_base():
    base = tiny_model("llama")
    for name, module in list(base.named_modules()):
        if name.endswith("_proj"):
            replace_module(base, name, NF4Linear.from_linear(module))
    dense = tiny_model("llama")
    for name, module in list(dense.named_modules()):
        if name.endswith("_proj"):
            replace_module(dense, name, NF4Linear.from_linear(module).to_linear())
    models = []
    for model in (base, dense):
        torch.manual_seed(5)
        models.append(cut(inject(model, AdaLoRAConfig(init_r=4, target_r=2, target_modules=TARGETS))).train())
    for model in models:
        lm_loss(model).backward()
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-4, atol=1e-5)
    pairs = list(zip(lora_modules(models[0]), lora_modules(models[1]), strict=True))
    for (_, layer), (_, other) in pairs:
        if layer.r:
            assert layer.lora_e.grad.abs().max() > 0
            torch.testing.assert_close(layer.lora_e.grad, other.lora_e.grad, rtol=1e-3, atol=1e-6)
    adapted = logits(models[0].eval())
    torch.testing.assert_close(logits(merge(models[0])), adapted, rtol=1e-4, atol=1e-4)
    assert merge(models[1], quantize="nf4").merge_cost.error


@pytest.mark.parametrize("is_cut", [True, False])
def test_peft_loads_ours(tmp_path, is_cut):
    model = adalora(modules_to_save=["embed_tokens"])
    model = cut(model) if is_cut else model
    perturb(model, 0.05)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    again = load_adapter(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert ranks_of(again) == ranks_of(model)
    assert again.adapter_config.init_r == 4
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]


def test_peft_loads_ours_as_plain_lora(tmp_path):
    model = cut(adalora())
    save_adapter(model, tmp_path, as_lora=True)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA"
    assert raw["rank_pattern"] == {f"^{re.escape(name)}": r for name, r in ranks_of(model).items() if r}
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    ours = load_adapter(tiny_model("llama"), tmp_path)
    assert isinstance(ours.adapter_config, LoRAConfig)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


def test_as_lora_keeps_apart_paths_of_which_one_ends_in_another(tmp_path):
    def model():
        torch.manual_seed(3)
        return nn.ModuleDict({"fc": nn.Linear(8, 8), "block": nn.ModuleDict({"fc": nn.Linear(8, 8)})})

    adapted = cut(inject(model(), AdaLoRAConfig(init_r=4, target_r=2)), (1, 3))
    save_adapter(adapted, tmp_path, as_lora=True)
    want = {name: (layer.r, layer.scaling) for name, layer in lora_modules(adapted)}
    assert {r for r, _ in want.values()} == {1, 3}
    loaded = load_adapter(model(), tmp_path)
    assert {name: (layer.r, layer.scaling) for name, layer in lora_modules(loaded)} == want
    theirs = PeftModel.from_pretrained(model(), tmp_path).base_model.model
    for name, (r, scaling) in want.items():
        layer = theirs.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (r, scaling)


def test_as_lora_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match="no module has a rank left"):
        save_adapter(cut(adalora(), (0,)), tmp_path, as_lora=True)
    from lora_kernels import PromptConfig

    with pytest.raises(ValueError, match="as_lora is True, but a PromptConfig was injected; allowed: AdaLoRAConfig"):
        save_adapter(inject(tiny_model("llama"), PromptConfig(num_virtual_tokens=2)), tmp_path, as_lora=True)


@pytest.mark.parametrize("masked", [True, False])
def test_we_load_peft(tmp_path, masked):
    config = AdaLoraConfig(
        init_r=4, target_r=1, tinit=1, tfinal=1, total_step=6, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.1
    )
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("llama"), config).train()
    perturb(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(1, 7) if masked else ():
        lm_loss(model).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    expected = logits(model)
    ours = load_adapter(tiny_model("llama"), tmp_path, trainable=False)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert sum(ranks_of(ours).values()) == (6 if masked else 24)
    assert 0 in ranks_of(ours).values() or not masked
    assert not any(p.requires_grad for p in ours.parameters())

    if not masked:
        carrying = adalora(init_r=4)
        load_adapter(carrying, tmp_path)
        torch.testing.assert_close(logits(carrying), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="file has scaling 2, the model 3.99"):
            load_adapter(adalora(init_r=4, lora_alpha=16), tmp_path)
    else:
        with pytest.raises(ValueError, match=r"doesn't fit the model: .*lora_A has shape"):
            load_adapter(adalora(init_r=4), tmp_path)
        raw = json.loads((tmp_path / "adapter_config.json").read_text())
        raw["rank_pattern"] = {name: [True] * 4 for name in raw["rank_pattern"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=r"rank_pattern gives .* rank 4, its tensors have rank"):
            load_adapter(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_r": 0}, "init_r is 0; allowed: an integer >= 1"),
        ({"target_r": 13}, "target_r is 13; allowed: at most init_r, which is 12"),
        ({"tinit": -1}, "tinit is -1; allowed: an integer >= 0"),
        ({"delta_t": 0}, "delta_t is 0; allowed: an integer >= 1"),
        ({"beta1": 1.0}, "beta1 is 1.0; allowed: 0 < beta < 1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight is -0.1; allowed: a finite number >= 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0; allowed: a finite number > 0"),
        ({"total_step": 10, "tinit": 5, "tfinal": 5}, r"tinit is 5 and tfinal 5, .*allowed: tinit \+ tfinal < 10"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        AdaLoRAConfig(**changes)


def test_a_hook_that_does_not_fit_the_schedule():
    with pytest.raises(ValueError, match=r"tinit is 4 and tfinal 0, which leaves no step of the 4"):
        training_hook(adalora(tinit=4), 4)
    with pytest.raises(ValueError, match=r"total_step is 9 in the config; this training has 10 steps"):
        training_hook(adalora(total_step=9), 10)
    assert training_hook(inject(tiny_model("llama"), LoRAConfig(r=2)), 10) is None
    allocator = RankAllocator(AdaLoRAConfig(), {"a": 12}, 5)
    with pytest.raises(ValueError, match="state belongs to other matrices than a"):
        allocator.load_state_dict({"kept": torch.tensor(3), "mask/b": torch.ones(12, dtype=torch.bool)})


def tiny_dataset():
    records = [(record, f"data:{i}") for i, record in enumerate(tiny_records(22))]
    return build_dataset(records, tiny_tokenizer(), 128, "data")


def settings(output_dir, **changes):
    defaults = {
        "model": "tiny", "data": "tiny", "method": "adalora", "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4,
        "delta_t": 2, "lora_alpha": 8, "lr": 1e-2, "max_steps": 10, "batch_size": 4, "dtype": "float32",
        "save_steps": 3, "eval_steps": 5, "lora_dropout": 0.05,
    }  # fmt: skip
    return SFTConfig(**{**defaults, "output_dir": str(output_dir), **changes})


def train_tiny(output_dir, callbacks=(), **changes):
    config = settings(output_dir, **changes)
    torch.manual_seed(1)
    model = inject(tiny_llama(), method_config(config))
    result = train_sft(model, tiny_dataset(), tiny_dataset(), config, callbacks=callbacks, progress=False)
    return model, result


def metrics_of(directory):
    records = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("tokens_per_second", "eval_seconds")} for record in records]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "loraplus"])
def test_killed_and_resumed_is_not_killed(tmp_path, optimizer):
    """Killed once while ranks are taken away and once after the cut."""
    model, result = train_tiny(tmp_path / "whole", optimizer=optimizer, lr_ratio=4)
    for stop in (5, 8):

        def kill(record, stop=stop):
            if record["step"] == stop:
                raise Killed

        with pytest.raises(Killed):
            train_tiny(tmp_path / "parts", [kill], optimizer=optimizer, lr_ratio=4, resume=True)
    resumed, again = train_tiny(tmp_path / "parts", optimizer=optimizer, lr_ratio=4, resume=True)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    assert again.trainable_parameters == result.trainable_parameters
    for name in ("adapter_model.safetensors", "checkpoint-last/training_state.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert ranks_of(resumed) == ranks_of(model)
    finished, _ = train_tiny(tmp_path / "parts", optimizer=optimizer, lr_ratio=4, resume=True)
    assert ranks_of(finished) == ranks_of(model)
    with pytest.raises(ValueError, match=r"was made with target_r = 2, this run has 3"):
        train_tiny(tmp_path / "parts", optimizer=optimizer, lr_ratio=4, resume=True, target_r=3)


TWO_PROCESSES = """
import sys
from test_adalora import train_tiny
train_tiny(sys.argv[1], lora_dropout=0.0, batch_size=2)
"""


def test_two_processes_equal_one_beyond_the_cut(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = run_python(str(script), tmp_path / "two", launcher=launcher)
    assert process.returncode == 0, process.stderr
    train_tiny(tmp_path / "one", lora_dropout=0.0, batch_size=4)
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    for key in ("step", "loss", "eval_loss", "extra_loss", "average_rank"):
        single, shared = ([record[key] for record in records if key in record] for records in (one, two))
        assert len(single) >= 2 and single == pytest.approx(shared, rel=1e-4), key
    adapters = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(*adapters, rtol=1e-3, atol=1e-5)


def test_run_from_files(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.json").write_text(json.dumps(tiny_records(22)))
    data = str(tmp_path / "train.json")
    out = tmp_path / "out"
    result = run_sft(settings(out, model=str(tmp_path / "model"), data=data, eval_data=data, lora_dropout=0.0))
    assert "| rank 2.00 |" in capsys.readouterr().err
    metrics = metrics_of(out)
    train = [record for record in metrics if "loss" in record]
    assert [record["budget"] for record in train] == [56, 56, 39, 31, 28, 28, 28, 28, 28, 28]
    assert [record["average_rank"] for record in train] == [4.0] * 3 + [round(31 / 14, 4)] * 2 + [2.0] * 5
    assert train[-1]["loss"] < train[0]["loss"] and train[-1]["extra_loss"] < train[0]["extra_loss"]
    evals = {record["step"]: record["eval_loss"] for record in metrics if "eval_loss" in record}
    assert set(evals) == {5, 10} and result.best_eval_loss == evals[10]

    # The adapter is the cut one, and its loss the plain cross-entropy.
    loaded = PeftModel.from_pretrained(tiny_llama(), out).eval()
    sizes = {name: len(p) for name, p in loaded.named_parameters() if "lora_E" in name}
    assert sum(sizes.values()) == 28
    dataset = tiny_dataset()
    batch = dataset.batch(range(len(dataset)))
    found = loaded.base_model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(found[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(evals[10], rel=1e-4)

    image = matplotlib.image.imread(out / "ranks.png")
    assert (
        image.shape[0] > 100
        and image.shape[1] > 400
        and len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 20
    )
    trained = sum(p.numel() for p in load_adapter(tiny_llama(), out).parameters() if p.requires_grad)
    assert result.trainable_parameters == trained


def test_the_best_adapter_is_one_with_the_ranks_asked_for(tmp_path, monkeypatch):
    """The evaluation before the cut (step 5) is better than the one after it, by decree."""
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": next(losses)})
    _, result = train_tiny(tmp_path)
    assert result.best_eval_loss == 2.0
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(len(tensor) for name, tensor in saved.items() if name.endswith("lora_E")) == 28


def test_the_extra_loss_is_no_part_of_the_loss(tmp_path):
    train_tiny(tmp_path / "with", lora_dropout=0.0, max_steps=7)
    train_tiny(tmp_path / "without", lora_dropout=0.0, max_steps=7, orth_reg_weight=0.0)
    with_term, without = (
        [record for record in metrics_of(tmp_path / name) if "loss" in record] for name in ("with", "without")
    )
    assert with_term[0]["loss"] == without[0]["loss"]
    assert without[0]["extra_loss"] == 0 and with_term[0]["extra_loss"] > 0
    assert with_term[5]["loss"] != without[5]["loss"]


def test_method_settings_that_do_not_apply():
    for changes in ({"use_rslora": True}, {"init": "gaussian"}, {"num_virtual_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            settings("out", **changes)
    with pytest.raises(ValueError, match="target_r is 5; allowed: at most init_r, which is 4"):
        method_config(settings("out", target_r=5))


def test_rank_map(tmp_path):
    ranks = {"model.layers.0.q": 0, "model.layers.0.v": 8, "model.layers.1.v": 3, "head": 5}
    image = matplotlib.image.imread(plot_ranks(ranks, tmp_path / "ranks.png"))
    other = matplotlib.image.imread(plot_ranks({**ranks, "head": 1}, tmp_path / "other.png"))
    assert image.shape == other.shape and not np.array_equal(image, other)
    with pytest.raises(ValueError, match="ranks is empty"):
        plot_ranks({}, tmp_path / "none.png")


@pytest.mark.parametrize("max_grad_norm", [0.3, 1e9])
def test_scores_see_the_gradients_as_they_were_clipped(max_grad_norm):
    """As where clip_grad_norm_ clips them before the optimizer's step."""
    kept = []
    for clips in (True, False):
        model = inject(tiny_model("llama"), AdaLoRAConfig(init_r=6, target_r=2, tinit=2, tfinal=2))
        perturb(model)
        optimizer = LoRAPlusAdamW(model, lr=1e-2, lr_ratio=1, max_grad_norm=max_grad_norm if clips else None)
        hook = training_hook(model, 12)
        for step in range(1, 11):
            torch.manual_seed(step)
            # Steps of very different gradients.
            (lm_loss(model) * 10 ** (step % 3)).backward()
            if not clips:
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
            optimizer.step()
            hook.after_step(optimizer, step)
            optimizer.zero_grad()
        kept.append(hook.ranks())
    assert kept[0] == kept[1] and len(set(kept[0].values())) > 1


def test_a_step_that_changed_nothing_leaves_the_scores_finite():
    model = inject(tiny_model("llama"), AdaLoRAConfig(init_r=6, target_r=2, tinit=2, tfinal=2))
    optimizer, hook = LoRAPlusAdamW(model, lr=1e-2, lr_ratio=1, max_grad_norm=1.0), training_hook(model, 12)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    hook.after_step(optimizer, 1)
    assert all(torch.isfinite(score).all() for score in hook.allocator.scores().values())
