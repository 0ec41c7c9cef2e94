"""Layers that one with an adapter replaces: their hooks stay, and weights other than plain ones are refused."""

import threading

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from tiny_models import perturb, tiny_batch, tiny_model
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from lora_kernels.methods import adapters_disabled, inject, merge
from lora_kernels.methods.lora import LoRAConfig, is_injected
from lora_kernels.methods.named import add_adapter, use_adapter
from lora_kernels.nn.bypassed import bypassed_layers
from lora_kernels.nn.lora_linear import FusedLoRALinear
from lora_kernels.nn.nf4_linear import NF4Linear

X = torch.linspace(-1, 1, 12).view(2, 6)


class Net(nn.Sequential):
    """Calls its layers only, and none of the adapters that it may have beside them."""

    def forward(self, x):
        return self[2](self[1](self[0](x)))


def model():
    torch.manual_seed(3)
    return Net(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))


def watched(net, calls):
    """Every kind of hook on the first layer; their handles."""
    layer = net[0]

    def note(name, result=None):
        return lambda *args, **_: calls.append((name, args[0])) or result

    def scaled(module, args, kwargs):
        calls.append(("before with keywords", module))
        return (2 * args[0],), kwargs

    return [
        layer.register_forward_pre_hook(note("before")),
        layer.register_forward_pre_hook(scaled, with_kwargs=True, prepend=True),
        layer.register_forward_hook(note("after")),
        layer.register_forward_hook(lambda module, args, kwargs, y: 3 * y, with_kwargs=True),
        layer.register_forward_hook(note("always"), always_call=True),
        layer.register_full_backward_pre_hook(note("before backward")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_pre_hook(note("before saving")),
        layer.register_state_dict_post_hook(note("saved")),
        layer.register_load_state_dict_pre_hook(note("before loading")),
        layer.register_load_state_dict_post_hook(note("loaded")),
    ]


def every_event(net, calls):
    calls.clear()
    net(X.clone().requires_grad_()).sum().backward()
    net.load_state_dict(net.state_dict())
    return list(calls)


@pytest.mark.parametrize("use_dora", [False, True])
def test_every_hook_is_carried_over_and_back_in_its_order(use_dora):
    base, calls = model(), []
    handles = watched(base, calls)
    wanted, output = [name for name, _ in every_event(base, calls)], base(X)
    assert len(wanted) == 10 and wanted[0] == "before with keywords"
    net = inject(base, LoRAConfig(r=2, use_dora=use_dora))
    assert every_event(net, calls) == [(name, net[0]) for name in wanted] and isinstance(net[0], FusedLoRALinear)
    assert torch.allclose(net(X), output, atol=1e-6)
    perturb(net)
    changed = net(X)
    with adapters_disabled(net):
        assert torch.allclose(net(X), output, atol=1e-6)
    merge(net)
    assert type(net[0]) is nn.Linear and every_event(net, calls) == [(name, net[0]) for name in wanted]
    assert torch.allclose(net(X), changed, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert every_event(net, calls) == []


def test_a_handle_removes_its_hook_from_the_layer_with_the_adapter():
    base, calls = model(), []
    plain = base(X)
    handles = watched(base, calls)
    net = inject(base, LoRAConfig(r=2))
    for handle in handles:
        handle.remove()
    assert every_event(net, calls) == [] and torch.allclose(net(X), plain, atol=1e-6)


def test_a_hook_of_always_runs_when_the_layer_fails():
    base, calls = model(), []
    watched(base, calls)
    net = inject(base, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="features"):
        net(torch.randn(2, 5))
    assert [name for name, _ in calls][-1] == "always"


def test_hooks_follow_the_adapter_in_use_and_a_module_that_is_trained_in_full():
    base, calls = model(), []
    watched(base, calls)
    net = inject(base, LoRAConfig(r=2, target_modules=["0"]))
    add_adapter(net, "other", LoRAConfig(r=3, target_modules=["2"], modules_to_save=["0"]))
    with use_adapter(net, "other"):
        assert type(net[0]) is nn.Linear and {module for _, module in every_event(net, calls)} == {net[0]}
        with adapters_disabled(net):
            assert {module for _, module in every_event(net, calls)} == {net[0]}
    assert isinstance(net[0], FusedLoRALinear) and {module for _, module in every_event(net, calls)} == {net[0]}


@pytest.mark.parametrize("wrap", [lambda layer: torch.compile(layer, backend="eager"), nn.DataParallel])
@pytest.mark.parametrize("how", [{}, {"target_modules": ["2"], "modules_to_save": ["0"]}])
def test_hooks_of_a_wrapper_and_of_the_layer_in_it_stay(wrap, how):
    base, calls = model(), []
    inner = base[0].register_forward_pre_hook(lambda *_: calls.append("inner"))
    base[0] = wrap(base[0])
    handle = base[0].register_forward_hook(lambda *_: calls.append("wrapper"))
    base[0].register_forward_pre_hook(lambda *_: calls.append("both"))
    net = inject(base, LoRAConfig(r=2, **how))
    every = ["both", "inner", "wrapper"]
    for _ in range(2):
        net(X)
        assert sorted(calls) == every
        calls.clear()
        with adapters_disabled(net):
            net(X)
        assert sorted(calls) == every
        calls.clear()
    handle.remove()
    inner.remove()
    net(X)
    assert calls == ["both"]


def test_hooks_inside_a_module_that_is_trained_in_full_are_the_same():
    class Owner:
        def __init__(self):
            self.count, self.lock = 0, threading.Lock()

        def note(self, *_):
            self.count += 1

    class Block(nn.Module):
        """A hook of its own, which has to read the weights that are trained."""

        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(()))
            self.inner.register_forward_hook(self.scaled)

        def scaled(self, module, args, y):
            return self.scale * y

        def forward(self, x):
            return self.inner(x)

    owner, base = Owner(), Net(nn.Sequential(), nn.ReLU(), nn.Linear(6, 4))
    base[0].first, base[0].second = nn.Linear(6, 6), Block()
    handle = base[0].first.register_forward_hook(owner.note)
    net = inject(base, LoRAConfig(r=2, target_modules=["2"], modules_to_save=["0"]))
    net(X).sum().backward()
    assert owner.count == 1 and net[0].second.scale.grad is not None
    with adapters_disabled(net):
        net(X)
    assert owner.count == 2
    handle.remove()
    net(X)
    assert owner.count == 2


def test_dora_learns_of_a_weight_that_is_loaded():
    for quantised in (False, True):
        nets = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(64, 8))
            net[0] = NF4Linear.from_linear(net[0]) if quantised else net[0]
            nets.append(inject(net, LoRAConfig(r=2, use_dora=True, init="both_gaussian")))
        nets[0].load_state_dict(nets[1].state_dict())
        x = torch.randn(3, 64)
        assert torch.equal(nets[0](x), nets[1](x))
        assert torch.equal(nets[0][0]._weight_squares, nets[1][0]._weight_squares)


class Doubling(ModelHook):
    """accelerate's kind of hook, which takes the place of the layer's forward."""

    def __init__(self):
        self.seen = []

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(module)
        return (2 * args[0],), kwargs

    def post_forward(self, module, output):
        return output + 1


@pytest.mark.parametrize("sequential", [False, True])
def test_a_hook_of_accelerate_is_carried_over_and_back(sequential):
    base, hook = model(), Doubling()
    add_hook_to_module(base[0], SequentialHook(hook, ModelHook()) if sequential else hook)
    output = base(X)
    assert bypassed_layers(base) == {} and len(hook.seen) == 1
    net = inject(base, LoRAConfig(r=2))
    assert torch.allclose(net(X), output, atol=1e-6) and hook.seen[-1] is net[0]
    perturb(net)
    changed = net(X)
    merge(net)
    assert torch.allclose(net(X), changed, atol=1e-5) and hook.seen[-1] is net[0] and type(net[0]) is nn.Linear
    hook.seen.clear()
    remove_hook_from_module(net[0])
    net(X)
    assert not hook.seen


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_weights_are_refused_and_others_are_not(how, tmp_path):
    base = tiny_model("llama")
    wanted = base(input_ids=tiny_batch(), use_cache=False).logits
    part = base.model.layers[0].mlp
    if how == "cpu":
        cpu_offload(part, execution_device="cpu")
    else:
        disk_offload(part, tmp_path, execution_device="cpu")
    for config in (LoRAConfig(r=2), LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.0.mlp"])):
        with pytest.raises(ValueError, match=r"offloaded .*'model\.layers\.0\.mlp.*load_model\(quantize=\"nf4\"\)"):
            inject(base, config)
    assert not is_injected(base) and all(p.requires_grad for p in base.parameters())
    net = inject(base, LoRAConfig(r=2, target_modules=["q_proj"]))
    assert torch.allclose(net(input_ids=tiny_batch(), use_cache=False).logits, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
        weight_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
    ],
    ids=["pruned", "pruned bias", "old weight norm", "weight norm", "orthogonal"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_layer_whose_weight_is_made_from_others_is_refused_by_name(make):
    net = model()
    make(net[0])
    before = net(X)
    with pytest.raises(ValueError, match=r"'0', where an adapter can't work: .*(orig|weight_g|parametrizations)"):
        inject(net, LoRAConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="^0: no LoRA adapter"):
        inject(net, LoRAConfig(r=2))
    assert isinstance(net[2], FusedLoRALinear) and torch.allclose(net(X), before, atol=1e-6)


def test_a_forward_that_was_replaced_is_taken_where_it_computes_the_same():
    net = model()
    net[0].forward = (lambda self, x: nn.functional.linear(x, self.weight, self.bias)).__get__(net[0])
    net[2].forward = lambda x: nn.functional.linear(x, net[2].weight) + 7
    with pytest.warns(UserWarning, match="^2: no LoRA adapter, since the forward of this Linear computes something"):
        inject(net, LoRAConfig(r=2))
    assert isinstance(net[0], FusedLoRALinear)


class Wrapped(torch.Tensor):
    """A wrapper subclass, as the packages have that quantise a model's weights in place."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values)
        return func(*(a.values if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))


class Packed(nn.Module):
    """A layer of another package: no nn.Linear, its weight in 4 bits."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", torch.zeros(layer.out_features, layer.in_features // 2, dtype=torch.int32))


class Bits(nn.Linear):
    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def with_weight(tensor):
    def change(layer):
        layer.weight = nn.Parameter(tensor(layer.weight.detach()), requires_grad=False)
        return layer

    return change


def compressed(layer):
    del layer.weight
    layer.register_parameter("weight_packed", nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False))
    return layer


def dynamic(layer):
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})[0]


FOREIGN = {
    "Wrapped": with_weight(Wrapped),
    "torch.int8": with_weight(lambda weight: weight.to(torch.int8)),
    "torch.float8_e4m3fn": with_weight(lambda weight: weight.to(torch.float8_e4m3fn)),
    "torch.sparse_csr": with_weight(lambda weight: weight.to_sparse_csr()),
    "qweight": Packed,
    "Bits is a Parameter of torch.uint8": Bits,
    "weight_packed": compressed,
    "keeps its weight as something else": dynamic,
}


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("targets", ["all-linear", ["2"], r"\d"])
def test_a_weight_that_another_package_made_is_refused_by_name_with_the_way_out(what, targets):
    net = model()
    net[2] = FOREIGN[what](net[2])
    with pytest.raises(
        ValueError, match=rf"'2', where an adapter can't work: .*{what}.*load_model\(quantize=\"nf4\"\)"
    ):
        inject(net, LoRAConfig(r=2, target_modules=targets))
    assert not is_injected(net) and net[0].weight.requires_grad
    with pytest.raises(TypeError, match=what if isinstance(net[2], nn.Linear) else "no linear layer"):
        FusedLoRALinear.from_linear(net[2], 2, 4)
    inject(net, LoRAConfig(r=2, exclude_modules=["2"]))
    assert isinstance(net[0], FusedLoRALinear)


class Own(nn.Parameter):
    """Holds the values of its base."""


def test_a_parameter_of_a_class_of_its_own_with_plain_values_is_taken():
    net = model()
    net[0].weight = Own(net[0].weight.detach())
    before = net(X)
    assert torch.allclose(inject(net, LoRAConfig(r=2))(X), before, atol=1e-6) and isinstance(net[0], FusedLoRALinear)


class Diagonal(nn.Module):
    """Has the sizes of a linear layer, and one number a row."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 6
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.weight * x


class Spline(Diagonal):
    """Has no weight, and the places of its knots as int64."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(self.weight.detach())
        del self.weight
        self.register_buffer("knots", torch.arange(6))

    def forward(self, x):
        return self.scale * x[..., self.knots]


class Spectral(Diagonal):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight).real


@pytest.mark.parametrize("kind", [Diagonal, Spline, Spectral])
def test_a_layer_of_another_kind_with_the_sizes_of_a_linear_one_is_skipped_and_named(kind):
    net = model()
    net[1] = kind()
    before = net(X)
    with pytest.raises(ValueError, match=rf"'1', where an adapter can't work: a {kind.__name__} is no linear layer"):
        inject(net, LoRAConfig(r=2, target_modules=["1"]))
    with pytest.warns(UserWarning, match=f"^1: no LoRA adapter, since a {kind.__name__} is no linear layer"):
        inject(net, LoRAConfig(r=2))
    assert isinstance(net[0], FusedLoRALinear) and isinstance(net[2], FusedLoRALinear)
    assert torch.allclose(net(X), before, atol=1e-6)


def test_only_the_modules_around_a_layer_are_searched_for_offloading(monkeypatch):
    net, around = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(20))), []
    monkeypatch.setattr("lora_kernels.methods.lora.is_offloaded", lambda layer, outer: around.append(outer))
    inject(net, LoRAConfig(r=1))
    assert len(around) == 20 and max(map(len, around)) == 3
    assert all(outer[0] is net for outer in around) and len({outer[1] for outer in around}) == 20
