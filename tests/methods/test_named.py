"""Several LoRA adapters on one model: each one against a model of its own that has only it."""

import copy

import peft
import pytest
import torch
from tiny_models import logits, perturb, tiny_batch, tiny_model

from lora_kernels import (
    LoRAConfig,
    NF4Linear,
    PrefixConfig,
    adapters_disabled,
    add_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_summary,
    use_adapter,
)
from lora_kernels.methods.lora import lora_modules
from lora_kernels.methods.named import adapter_names

POLICY = {"r": 4, "lora_alpha": 8}
VALUE = {"r": 2, "lora_alpha": 3, "target_modules": r".*layers\.1.*|.*h\.1.*c_attn", "use_rslora": True}


def alone(kind, path, config, seed):
    """A model with one moved adapter, saved in `path`."""
    torch.manual_seed(seed)
    model = inject(tiny_model(kind), LoRAConfig(**config, init="both_gaussian"))
    save_adapter(model, path)
    return model


def value_config(kind):
    targets = {"gpt2": r".*h\.1\.attn\.c_attn"}.get(kind, r".*layers\.1\..*_proj")
    return VALUE | {"target_modules": targets}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama_classifier"])
def test_each_adapter_is_what_it_is_alone(kind, tmp_path):
    extra = {"modules_to_save": ["score"]} if kind == "llama_classifier" else {}
    configs = {"default": POLICY, "value": value_config(kind) | extra}
    for seed, (name, config) in enumerate(configs.items()):
        alone(kind, tmp_path / name, config, seed)
    want = {name: logits(load_adapter(tiny_model(kind), tmp_path / name)) for name in configs}
    base = logits(tiny_model(kind))
    assert (want["default"] - want["value"]).abs().max() > 1e-2

    model = load_adapter(tiny_model(kind), tmp_path / "default")
    add_adapter(model, "value", LoRAConfig(**configs["value"]))
    assert adapter_names(model) == ["default", "value"]
    assert torch.equal(logits(model), want["default"])
    with use_adapter(model, "value"):
        assert torch.equal(logits(model), base)
        load_adapter(model, tmp_path / "value")
        assert torch.equal(logits(model), want["value"])
        with use_adapter(model, "default"):
            assert torch.equal(logits(model), want["default"])
            with adapters_disabled(model):
                assert torch.equal(logits(model), base)
        with adapters_disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), want["value"])
        save_adapter(model, tmp_path / "again")
    assert torch.equal(logits(model), want["default"])
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path / "again").eval()
    torch.testing.assert_close(logits(theirs), want["value"], rtol=0, atol=1e-5)

    twin = copy.deepcopy(model)
    perturb(model)
    with use_adapter(twin, "value"):
        assert torch.equal(logits(twin), want["value"])
        assert torch.equal(logits(merge(twin)), want["value"]) or torch.allclose(logits(twin), want["value"], atol=1e-5)


def test_the_frozen_weights_are_there_once_and_move_with_the_model(tmp_path):
    model = inject(tiny_model("llama"), LoRAConfig(**POLICY))
    before = trainable_summary(model)
    add_adapter(model, "value", LoRAConfig(**value_config("llama")))
    add_adapter(model, "reward", LoRAConfig(**POLICY))
    added = sum(layer.lora_a.numel() + layer.lora_b.numel() for _, layer in used(model, "value"))
    after = trainable_summary(model)
    assert after.trainable - before.trainable == after.total - before.total == added + before.trainable
    assert after.adapted_modules == before.adapted_modules
    pointers = [{p.data_ptr() for p in model.parameters() if not p.requires_grad}]
    with use_adapter(model, "value"):
        pointers.append({p.data_ptr() for p in model.parameters() if not p.requires_grad})
    assert pointers[0] == pointers[1]
    model.double()
    for name in adapter_names(model):
        with use_adapter(model, name):
            assert logits(model).dtype == torch.float64


def used(model, name):
    with use_adapter(model, name):
        return list(lora_modules(model))


def test_training_one_leaves_the_others(tmp_path):
    model = inject(tiny_model("llama"), LoRAConfig(**POLICY))
    add_adapter(model, "value", LoRAConfig(**POLICY))
    ids = tiny_batch()
    with use_adapter(model, "value"):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()  # outside of the block: the graph knows its tensors
    for name, moved in (("default", False), ("value", True)):
        layers = used(model, name)
        assert layers and all((layer.lora_b.grad is not None) == moved for _, layer in layers)
        assert all(layer.lora_a.requires_grad for _, layer in layers)


def test_over_nf4_weights():
    torch.manual_seed(0)
    model = tiny_model("llama")
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            parent, _, child = name.rpartition(".")
            wide = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            setattr(model.get_submodule(parent), child, NF4Linear.from_linear(wide))
    base = logits(model)
    weights = [module for module in model.modules() if type(module).__name__ == "NF4Weight"]
    inject(model, LoRAConfig(**POLICY, init="both_gaussian"))
    add_adapter(model, "value", LoRAConfig(**value_config("llama"), init="both_gaussian"))
    policy = logits(model)
    with use_adapter(model, "value"):
        assert not torch.allclose(logits(model), policy, atol=1e-3)
        with adapters_disabled(model):
            assert torch.equal(logits(model), base)
        found = {module for module in model.modules() if type(module).__name__ == "NF4Weight"}
        assert found == set(weights)
    assert torch.equal(logits(model), policy)


def test_what_does_not_fit_is_refused_by_name():
    model = inject(tiny_model("llama"), LoRAConfig(**POLICY, init="both_gaussian"))
    want = logits(model)
    for name in ("", "a.b", "keys", 3, "default"):
        with pytest.raises(ValueError, match="name is "):
            add_adapter(model, name, LoRAConfig())
    with pytest.raises(ValueError, match="the model has no module 'q_porj'"):
        add_adapter(model, "value", LoRAConfig(target_modules=["q_porj"]))
    assert torch.equal(logits(model), want) and adapter_names(model) == ["default"]
    assert all(layer.lora_a.requires_grad for _, layer in lora_modules(model))
    with pytest.raises(ValueError, match="allowed: LoRAConfig for both"):
        add_adapter(model, "value", PrefixConfig())
    with pytest.raises(ValueError, match="the model's is a NoneType"):
        add_adapter(tiny_model("llama"), "value", LoRAConfig())
    with pytest.raises(ValueError, match="name is 'value'; the model has default"), use_adapter(model, "value"):
        pass

    model = inject(tiny_model("llama_classifier"), LoRAConfig(**POLICY, modules_to_save=["score"]))
    with adapters_disabled(model), pytest.raises(RuntimeError, match="inside adapters_disabled"):
        add_adapter(model, "value", LoRAConfig())
    assert adapter_names(model) == ["default"] and model.score.weight.requires_grad
