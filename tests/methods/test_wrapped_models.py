"""Every public function on models inside wrappers: as on the model itself, or refused by name."""

import copy
import inspect

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import logits, perturb, tiny_batch, tiny_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import lora_kernels
from lora_kernels import (
    AdaLoRAConfig,
    FullConfig,
    LoRAConfig,
    LoRAPlusAdamW,
    PrefixConfig,
    PromptConfig,
    adapters_disabled,
    add_adapter,
    fuse_decoder,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_summary,
    use_adapter,
)
from lora_kernels.io.nf4 import save_nf4_model
from lora_kernels.methods.adalora import TrainingHook
from lora_kernels.methods.lora import lora_modules, plan
from lora_kernels.methods.named import adapter_names, reference

CONFIG = LoRAConfig(r=3, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
SECOND = LoRAConfig(r=2, target_modules=["v_proj", "q_proj"], init="both_gaussian")
# The public functions that take a model; what else is public takes none.
TAKE_A_MODEL = {
    "LoRAPlusAdamW", "adapters_disabled", "add_adapter", "fuse_decoder", "fuse_peft", "inject", "load_adapter", "merge",
    "save_adapter", "trainable_summary", "unfuse_peft", "use_adapter",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """One process, for DistributedDataParallel."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def parts_compiled(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj = compiled(layer.self_attn.q_proj)
    model.model.layers[1] = compiled(model.model.layers[1])
    model.lm_head = compiled(model.lm_head)
    return model


def compiled_in_place(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
        layer.self_attn.q_proj.compile(backend="eager")
    return model


def data_parallel(model):
    return nn.DataParallel(compiled(model))


class MyDataParallel(nn.DataParallel):
    """As many write it."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class _FabricModule(nn.Module):
    """Stands for Lightning's, which is told by its name."""

    def __init__(self, module):
        super().__init__()
        self._forward_module = self._original_module = module

    def forward(self, *args, **kwargs):
        return self._forward_module(*args, **kwargs)

    def state_dict(self, *args, **kwargs):
        return self._original_module.state_dict(*args, **kwargs)


def in_fabric(model):
    model.model.layers[1] = _FabricModule(model.model.layers[1])
    return _FabricModule(model)


def in_own_data_parallel(model):
    model.lm_head = MyDataParallel(model.lm_head)
    return MyDataParallel(model)


def distributed(model):
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model.lm_head.weight.requires_grad_(True)
    return DistributedDataParallel(parts_compiled(model))


AROUND = [data_parallel, parts_compiled, in_fabric, in_own_data_parallel]
WRAPPERS = [*AROUND, distributed]
wrappers = pytest.mark.parametrize("wrap", WRAPPERS)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def trained(config=CONFIG):
    model = inject(tiny_model("llama"), config)
    perturb(model, 0.1)
    return model


def test_the_list_of_functions_that_take_a_model_is_complete():
    found = {
        name
        for name in lora_kernels.__all__
        if {"model", "model_or_groups"} & set(inspect.signature(getattr(lora_kernels, name)).parameters)
    }
    assert found == TAKE_A_MODEL


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, *WRAPPERS])
def test_save_writes_the_names_of_the_model(wrap, tmp_path):
    model = trained()
    want = logits(model)
    save_adapter(model, tmp_path / "bare")
    wrapped = wrap(model)
    same(logits(wrapped), want)
    save_adapter(wrapped, tmp_path / "wrapped")
    assert_same_files(tmp_path / "bare", tmp_path / "wrapped")
    same(logits(peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "wrapped").eval()), want)
    same(logits(load_adapter(tiny_model("llama"), tmp_path / "wrapped")), want)


def assert_same_files(one, other):
    assert (one / "adapter_config.json").read_text() == (other / "adapter_config.json").read_text()
    tensors, others = (load_file(directory / "adapter_model.safetensors") for directory in (one, other))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, *AROUND])
def test_inject_into_a_wrapped_model_that_has_run(wrap, tmp_path):
    want = logits(trained())
    torch.manual_seed(0)
    wrapped = wrap(tiny_model("llama"))
    same(logits(wrapped), logits(tiny_model("llama")))
    assert plan(wrapped, CONFIG).adapters == plan(tiny_model("llama"), CONFIG).adapters
    assert inject(wrapped, CONFIG) is wrapped
    source = dict(trained().named_parameters())
    with torch.no_grad():
        for name, layer in lora_modules(wrapped):
            layer.lora_a.copy_(source[f"{name}.lora_a"])
            layer.lora_b.copy_(source[f"{name}.lora_b"])
        wrapped.get_parameter(next(n for n, p in wrapped.named_parameters() if "lm_head" in n)).copy_(
            source["lm_head.weight"]
        )
    same(logits(wrapped), want)
    save_adapter(wrapped, tmp_path)
    same(logits(load_adapter(tiny_model("llama"), tmp_path)), want)
    same(logits(peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()), want)


@pytest.mark.parametrize("wrap", AROUND)
def test_load_into_a_wrapped_base_model(wrap, tmp_path):
    model = trained()
    save_adapter(model, tmp_path)
    wrapped = wrap(tiny_model("llama"))
    logits(wrapped)
    assert load_adapter(wrapped, tmp_path) is wrapped
    same(logits(wrapped), logits(model))


@wrappers
def test_load_into_a_wrapped_adapted_model(wrap, tmp_path):
    model = trained()
    save_adapter(model, tmp_path)
    wrapped = wrap(inject(tiny_model("llama"), CONFIG))
    logits(wrapped)
    load_adapter(wrapped, tmp_path)
    same(logits(wrapped), logits(model))


@wrappers
def test_disabled_merged_counted(wrap):
    model = trained()
    want, base, summary = logits(model), logits(tiny_model("llama")), trainable_summary(model)
    wrapped = wrap(copy.deepcopy(model))
    assert trainable_summary(wrapped) == summary
    with adapters_disabled(wrapped) as inner:
        assert inner is wrapped
        same(logits(wrapped), base)
    same(logits(wrapped), want)
    assert merge(wrapped) is wrapped
    same(logits(wrapped), want)
    assert not list(lora_modules(wrapped))
    with pytest.raises(ValueError, match="carries no"):
        merge(wrapped)


@wrappers
def test_several_adapters(wrap):
    model = trained()
    add_adapter(model, "second", SECOND)
    if wrap is distributed:
        wrapped = wrap(model)
    else:
        wrapped = wrap(trained())
        logits(wrapped)
        assert add_adapter(wrapped, "second", SECOND) is wrapped
    want = logits(trained())
    assert adapter_names(wrapped) == ["default", "second"]
    same(logits(wrapped), want)
    with use_adapter(wrapped, "second") as inner:
        assert inner is wrapped
        perturb(wrapped, 0.1)
        second = logits(wrapped)
        assert (second - want).abs().max() > 1e-3
    with reference(wrapped):
        same(logits(wrapped), logits(tiny_model("llama")))


@wrappers
def test_the_optimizers_groups(wrap):
    sizes = [
        [[parameter.shape for parameter in group["params"]] for group in LoRAPlusAdamW(each, lr=1e-3).param_groups]
        for each in (trained(), wrap(trained()))
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("wrap", [parts_compiled])
def test_the_decoder_is_fused(wrap):
    wrapped = wrap(tiny_model("llama"))
    assert fuse_decoder(wrapped) > 0
    same(logits(wrapped), logits(tiny_model("llama")))


@pytest.mark.parametrize("wrap", [parts_compiled])
def test_adalora_through_wrappers(wrap, tmp_path):
    config = AdaLoRAConfig(init_r=3, target_r=2, tinit=0, tfinal=1, target_modules=["q_proj", "down_proj"])
    model = inject(wrap(tiny_model("llama")), config)
    hook, optimizer = TrainingHook(model, 2), LoRAPlusAdamW(model, lr=1e-3)
    for step in (1, 2):
        (model(input_ids=tiny_batch()).logits.square().mean() + hook.extra_loss()).backward()
        optimizer.step()
        hook.after_step(optimizer, step)
        optimizer.zero_grad()
    want = logits(model)
    save_adapter(model, tmp_path)
    same(logits(load_adapter(tiny_model("llama"), tmp_path)), want)
    save_adapter(model, tmp_path / "lora", as_lora=True)
    same(logits(load_adapter(tiny_model("llama"), tmp_path / "lora")), want)


@pytest.mark.parametrize("wrap", [compiled, data_parallel])
@pytest.mark.parametrize("config", [PrefixConfig(num_virtual_tokens=3), PromptConfig(num_virtual_tokens=3)])
def test_virtual_tokens_through_wrappers(wrap, config, tmp_path):
    torch.manual_seed(0)
    want = logits(inject(tiny_model("llama"), config))
    torch.manual_seed(0)
    model = inject(wrap(tiny_model("llama")), config)
    save_adapter(model, tmp_path)
    same(logits(load_adapter(tiny_model("llama"), tmp_path)), want)
    save_adapter(load_adapter(wrap(tiny_model("llama")), tmp_path), tmp_path / "again")
    assert_same_files(tmp_path, tmp_path / "again")
    with adapters_disabled(model):
        same(logits(model), logits(tiny_model("llama")))


@pytest.mark.parametrize("wrap", [parts_compiled])
def test_full_fine_tuning_through_wrappers(wrap, tmp_path):
    model = inject(wrap(tiny_model("llama")), FullConfig(modules=["q_proj", "lm_head"]))
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 3
    perturb(model, 0.1)
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tiny_model("llama").state_dict())
    same(logits(load_adapter(wrap(tiny_model("llama")), tmp_path)), logits(model))


def test_distributed_data_parallel_would_not_know_new_parameters(tmp_path):
    save_adapter(trained(), tmp_path)
    save_adapter(inject(tiny_model("llama"), PromptConfig(num_virtual_tokens=2)), tmp_path / "prompt")
    wrapped = distributed(tiny_model("llama"))
    before = {name: parameter.clone() for name, parameter in wrapped.named_parameters()}
    configs = [CONFIG, FullConfig(), PrefixConfig(), PromptConfig(), AdaLoRAConfig()]
    calls = [lambda config=config: inject(wrapped, config) for config in configs]
    calls += [lambda: plan(wrapped, CONFIG), lambda: load_adapter(wrapped, tmp_path)]
    calls += [lambda: load_adapter(wrapped, tmp_path / "prompt")]
    calls += [lambda: add_adapter(distributed(trained()), "second", SECOND)]
    for call in calls:
        with pytest.raises(ValueError, match="is a DistributedDataParallel.*then wrap it"):
            call()
    after = dict(wrapped.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_of_ones_own_with_such_a_name_is_no_wrapper():
    class AveragedModel(nn.Sequential):
        pass

    model = inject(AveragedModel(nn.Linear(4, 4)), LoRAConfig(r=2))
    assert [name for name, _ in lora_modules(model)] == ["0"]


def peft_model():
    return peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))


def peft_layers():
    model = tiny_model("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    return model


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's, which is told by its name."""

    def __init__(self):
        super().__init__()
        self.module = trained()

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "module" else getattr(self.module, name)


def fully_sharded():
    return FullyShardedDataParallel(trained(), use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.parametrize(
    "make, named",
    [
        (peft_model, "PeftModel.*unload"),
        (lambda: nn.DataParallel(compiled(peft_model())), "contains a PeftModel.*unload"),
        (peft_layers, "contains a Linear.*unload"),
        (DeepSpeedEngine, "DeepSpeedEngine.*given to DeepSpeed"),
        (fully_sharded, "FullyShardedDataParallel.*fully_shard"),
    ],
)
def test_what_can_not_be_seen_through_is_refused_by_name(make, named, tmp_path):
    save_adapter(trained(), tmp_path / "adapter")
    model = make()
    calls = {
        "inject": lambda: inject(model, CONFIG),
        "plan": lambda: plan(model, CONFIG),
        "merge": lambda: merge(model),
        "adapters_disabled": lambda: adapters_disabled(model),
        "add_adapter": lambda: add_adapter(model, "second", SECOND),
        "use_adapter": lambda: use_adapter(model, "second").__enter__(),
        "save_adapter": lambda: save_adapter(model, tmp_path / "new"),
        "load_adapter": lambda: load_adapter(model, tmp_path / "adapter"),
        "save_nf4_model": lambda: save_nf4_model(model, tmp_path / "new"),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=named):
            call()
    assert not (tmp_path / "new").exists()
    # What only counts parameters takes any model.
    trainable_summary(model)
