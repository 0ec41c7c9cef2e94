"""FSDP2 and tensor parallelism: two processes against one, for training, files and the optimizer's state."""

import copy
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tiny_models import tiny_batch, tiny_model
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from lora_kernels import (
    AdaLoRAConfig,
    FullConfig,
    LoRAConfig,
    LoRAPlusAdamW,
    NF4Linear,
    PrefixConfig,
    PromptConfig,
    adapters_disabled,
    inject,
    load_adapter,
    lora_linear,
    merge,
    save_adapter,
)
from lora_kernels.io.nf4 import save_nf4_model
from lora_kernels.io.peft import CONFIG_NAME, WEIGHTS_NAME
from lora_kernels.methods import training_hook

CONFIGS = {
    "lora": LoRAConfig(r=3, init="both_gaussian"),
    "saved": LoRAConfig(r=2, init="both_gaussian", modules_to_save=["lm_head"]),
    "dora": LoRAConfig(r=2, init="both_gaussian", use_dora=True),
    "adalora": AdaLoRAConfig(init_r=4, target_r=2, tinit=1, tfinal=1),
    "qlora": LoRAConfig(r=3, init="both_gaussian"),
    "qdora": LoRAConfig(r=2, init="both_gaussian", use_dora=True),
    "prompt": PromptConfig(num_virtual_tokens=3),
    "prefix": PrefixConfig(num_virtual_tokens=3),
    "full": FullConfig(),
}


def base_of(kind, dtype=torch.float64):
    model = tiny_model("llama")
    if kind.startswith("q"):
        for path, layer in list(model.model.named_modules()):
            if isinstance(layer, nn.Linear):
                model.model.set_submodule(path, NF4Linear.from_linear(layer))
    return model.to(dtype)


def made(kind, dtype=torch.float64):
    torch.manual_seed(1)
    return inject(base_of(kind, dtype), CONFIGS[kind])


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def loss_of(model):
    ids = tiny_batch()
    return model(input_ids=ids, labels=ids).loss


def trained(model, steps=3, optimizer=None, **settings):
    optimizer = optimizer or LoRAPlusAdamW(model, **{"lr": 1e-2, "lr_ratio": 1, "max_grad_norm": 0.05, **settings})
    measured = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        measured.append((loss.item(), None if optimizer.grad_norm is None else optimizer.grad_norm.item()))
    return optimizer, measured


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same_parameters(found, expected):
    theirs = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(whole(parameter.detach()), theirs[name].detach())


def check_training(kind, rank, tmp):
    one, two = made(kind), shard(made(kind))
    _, expected = trained(one)
    _, found = trained(two)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    assert_same_parameters(two, one)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(two.eval()), loss_of(one.eval()))


def check_optimizer(dtype, rank, tmp):
    """Against torch's AdamW, and its state by way of torch's functions for distributed checkpoints."""
    model, other = (shard(made("lora", dtype)) for _ in range(2))
    # After the first step, float32's rounding would have grown.
    steps = 3 if dtype == torch.float64 else 1
    optimizer, _ = trained(model, steps, max_grad_norm=None, weight_decay=0.1, lr_embedding=None)
    if dtype != torch.bfloat16:
        parameters = [p for p in other.parameters() if p.requires_grad]
        trained(other, steps, _TorchAdamW(parameters, lr=1e-2, weight_decay=0.1))
        assert_same_parameters(model, _gathered(other))
    state = get_optimizer_state_dict(model, optimizer)
    for name, values in state["state"].items():
        assert isinstance(values["exp_avg"], DTensor) and values["exp_avg"].dtype == torch.promote_types(
            dtype, torch.float32
        ), name
    again = shard(made("lora", dtype))
    resumed = LoRAPlusAdamW(again, lr=1e-2, lr_ratio=1, weight_decay=0.1, lr_embedding=None)
    with torch.no_grad():
        for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    set_optimizer_state_dict(again, resumed, copy.deepcopy(state))
    assert trained(again, 2, resumed)[1] == trained(model, 2, optimizer)[1]
    assert_same_parameters(again, _gathered(model))


class _TorchAdamW(torch.optim.AdamW):
    grad_norm = None


def _gathered(model):
    plain = nn.Module()
    plain.named_parameters = lambda: [(name, whole(p.detach())) for name, p in model.named_parameters()]
    return plain


def check_low_precision_masters(kind, rank, tmp):
    """A parameter of 16 bits has its float32 master in the parts of the processes."""
    weight, grad = (torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    mesh = init_device_mesh("cpu", (2,))
    one = nn.Parameter(weight.clone())
    for placement in (Shard(0), Shard(1), Replicate()):
        one = nn.Parameter(weight.clone())
        two = nn.Parameter(distribute_tensor(weight.clone(), mesh, [placement]))
        optimizers = [LoRAPlusAdamW([p], lr=1e-3, lr_ratio=1, max_grad_norm=0.5) for p in (one, two)]
        for laid_out in ([placement], [Replicate()], [Shard(0)]):
            one.grad, two.grad = grad.clone(), distribute_tensor(grad.clone(), mesh, laid_out)
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(optimizers[1].grad_norm, optimizers[0].grad_norm)
        assert torch.equal(whole(two.detach()), one.detach())
        for name, state in optimizers[1].state[two].items():
            torch.testing.assert_close(whole(state), optimizers[0].state[one][name])
        # A state dict of whole tensors is taken part by part.
        fresh = LoRAPlusAdamW([two], lr=1e-3, lr_ratio=1)
        fresh.load_state_dict(optimizers[0].state_dict())
        for name, state in fresh.state[two].items():
            torch.testing.assert_close(whole(state), optimizers[0].state[one][name])


def check_what_is_no_number(kind, rank, tmp):
    """One process alone has it; none steps."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    grad = torch.tensor([1.0, 1.0, 1.0, float("inf")])
    parameter.grad = distribute_tensor(grad, mesh, [Shard(0)])
    optimizer = LoRAPlusAdamW([parameter], lr=0.1, lr_ratio=1, max_grad_norm=1.0)
    optimizer.step()
    assert torch.isinf(optimizer.grad_norm) and torch.equal(whole(parameter.detach()), torch.ones(4))
    with pytest.raises(ValueError, match="parameter 0 of group 0.* still to be made"):
        LoRAPlusAdamW([nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))], lr=0.1, lr_ratio=1)
    plain = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = LoRAPlusAdamW([plain], lr=0.1, lr_ratio=1)
    plain.grad = torch.ones(4)
    with pytest.raises(ValueError, match="a gradient that is a Tensor; allowed: .* a DTensor on the same mesh"):
        optimizer.step()


def check_files(kind, rank, tmp):
    """Every process writes the same whole file, into one directory or its own, and reads it again. Of a whole model
    transformers has the first one alone write."""
    one, two = made(kind), shard(made(kind))
    save_adapter(one, f"{tmp}/{kind}-one{rank}")
    save_adapter(two, f"{tmp}/{kind}-two{rank}")
    save_adapter(two, f"{tmp}/{kind}-both")
    dist.barrier()
    if rank == 0 or kind != "full":
        names = ("model.safetensors", "config.json") if kind == "full" else (WEIGHTS_NAME, CONFIG_NAME)
        directories = [f"{tmp}/{kind}-{which}" for which in (f"one{rank}", f"two{rank}", "both")]
        expected, *found = (load_file(f"{directory}/{names[0]}") for directory in directories)
        for tensors in found:
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[key], expected[key]) for key in expected)
        texts = [Path(f"{tmp}/{kind}-{which}{rank}/{names[1]}").read_text() for which in ("one", "two")]
        assert texts[0] == texts[1]
    trained(two, 1)
    before = loss_of(two).item()
    load_adapter(two, f"{tmp}/{kind}-both")
    assert before != pytest.approx(loss_of(one).item(), rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(two), loss_of(one))
    assert_same_parameters(two, one)


def check_changed_embeddings(dora, rank, tmp):
    """A file's embeddings go into a distributed base model, and out of it again."""
    directory, config = f"{tmp}/changed{dora}{rank}", LoRAConfig(target_modules=["q_proj", "lm_head"], use_dora=dora)
    one, two = (inject(tiny_model("llama").double(), config) for _ in range(2))
    save_adapter(one, directory)
    tensors = load_file(f"{directory}/{WEIGHTS_NAME}")
    for key, weight in (
        ("lm_head.base_layer", one.lm_head.weight),
        ("model.embed_tokens", one.model.embed_tokens.weight),
    ):
        tensors[f"base_model.model.{key}.weight"] = weight.detach() + torch.arange(32) / 10
    save_file(tensors, f"{directory}/{WEIGHTS_NAME}")
    shard(two)
    for model in (one, two):
        with torch.no_grad():
            before = loss_of(model).item()
        with pytest.warns(UserWarning, match="other embeddings"):
            load_adapter(model, directory)
        with torch.no_grad():
            assert loss_of(model).item() != pytest.approx(before, rel=1e-3)
    torch.testing.assert_close(loss_of(two), loss_of(one))
    save_adapter(two, f"{directory}-again")
    again = load_adapter(tiny_model("llama").double(), f"{directory}-again")
    torch.testing.assert_close(loss_of(again), loss_of(one))


def check_refusals(kind, rank, tmp):
    base = shard(tiny_model("llama"))
    for put in (lambda: inject(base, CONFIGS["lora"]), lambda: load_adapter(base, f"{tmp}/refused{rank}")):
        save_adapter(made("lora"), f"{tmp}/refused{rank}")
        with pytest.raises(ValueError, match=r"parameter model\S+ of model is a DTensor.* adapters first"):
            put()
    model = shard(made("lora"))
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match=r"layers\.0.*the layer is distributed .*merge a model that has loaded it"):
        merge(model)
    with pytest.raises(ValueError, match="the layer is distributed"):
        layer.merge()
    assert not layer.merged
    with adapters_disabled(model), torch.no_grad():
        torch.testing.assert_close(loss_of(model), loss_of(tiny_model("llama").double()))


def check_ranks_are_refused(kind, rank, tmp):
    """Before the training or where the model is distributed in its course, with nothing changed."""
    expected = r"lora_a of model\.layers\.0\S+ is a DTensor.* allowed: a model that is whole in each process"
    with pytest.raises(ValueError, match=expected):
        training_hook(shard(made("adalora")), 4)
    model = made("adalora")
    hook = training_hook(model, 4)
    state = hook.state_dict()
    optimizer, _ = trained(shard(model), 1)
    before = loss_of(model).item()
    for step in range(1, 6):
        with pytest.raises(ValueError, match=expected):
            hook.after_step(optimizer, step)
    with pytest.raises(ValueError, match=expected):
        hook.extra_loss()
    with pytest.raises(ValueError, match=expected):
        hook.load_state_dict(state, optimizer, 3)
    assert hook.step == 0 and set(hook.ranks().values()) == {4} and loss_of(model).item() == before


def check_a_4_bit_base_stays_whole(kind, rank, tmp):
    model = shard(made("qlora"))
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert not any(isinstance(buffer, DTensor) for buffer in model.buffers())
    with pytest.raises(ValueError, match=r"layers\.0.*the layer is distributed"):
        merge(model, "nf4")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight of model is a DTensor"):
        save_nf4_model(shard(base_of("qlora")), f"{tmp}/nf4-{rank}")
    assert not Path(f"{tmp}/nf4-{rank}").exists()
    # FSDP2 leaves buffers alone; something else may spread them.
    mesh = init_device_mesh("cpu", (2,))
    weight.absmax = distribute_tensor(weight.absmax, mesh, [Shard(0)])
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 32, dtype=torch.float64)
    expected = "absmax is a DTensor; allowed: tensors that lie in one process"
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            for call in (lambda: loss_of(model), lambda: NF4Linear(weight)(x.float()), weight.dequantize):
                with pytest.raises(TypeError, match=expected):
                    call()
    with pytest.raises(TypeError, match=expected), adapters_disabled(model):
        layer(x)


def check_the_op(kind, rank, tmp):
    """DTensors are torch's own to multiply, as in tensor parallelism."""
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    shapes = {"x": (4, 6), "weight": (8, 6), "lora_a": (2, 6), "lora_b": (8, 2), "bias": (8,)}
    plain = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }
    how = {"weight": Shard(0), "lora_b": Shard(0), "bias": Shard(0)}
    spread = {
        name: distribute_tensor(t.detach().clone(), mesh, [how.get(name, Replicate())]).requires_grad_()
        for name, t in plain.items()
    }
    y, expected = (lora_linear(**t, scaling=2.0) for t in (spread, plain))
    torch.testing.assert_close(whole(y), expected)
    expected.square().sum().backward()
    y.square().sum().backward()
    for name, t in plain.items():
        torch.testing.assert_close(whole(spread[name].grad), t.grad)
    with pytest.raises(TypeError, match="weight is a DTensor and x a Tensor; allowed: all DTensors, or none"):
        lora_linear(**{**spread, "x": plain["x"]}, scaling=2.0)


CASES = {
    **{f"train {kind}": (check_training, kind) for kind in CONFIGS if kind not in ("prompt", "prefix")},
    **{f"files of {kind}": (check_files, kind) for kind in CONFIGS},
    **{f"optimizer {dtype}": (check_optimizer, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)},
    **{f"embeddings, dora {dora}": (check_changed_embeddings, dora) for dora in (False, True)},
    "masters": (check_low_precision_masters, None),
    "not finite": (check_what_is_no_number, None),
    "refusals": (check_refusals, None),
    "ranks": (check_ranks_are_refused, None),
    "4 bits": (check_a_4_bit_base_stays_whole, None),
    "op": (check_the_op, None),
}


def _process(rank, port, tmp):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, (check, kind) in CASES.items():
        try:
            check(kind, rank, tmp)
        except BaseException as error:
            raise AssertionError(f"{name}, rank {rank}: {error}") from error
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """All cases by one pair of processes, which take longer to start than the cases to run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (port, str(tmp_path)), nprocs=2)
