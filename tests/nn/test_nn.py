import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

from lora_kernels import NF4Linear, lora_linear_group, use_backend
from lora_kernels.backends import cpu
from lora_kernels.nn import INITS, FusedLoRALinear
from lora_kernels.nn.lora_linear import open_group
from lora_kernels.testing import assert_close_to_reference


def make(in_features=24, out_features=40, r=4, lora_alpha=8, init="both_gaussian", seed=0, **kwargs):
    torch.manual_seed(seed)
    return FusedLoRALinear(in_features, out_features, r, lora_alpha, init=init, **kwargs)


def make_conv1d(K=24, N=40):
    torch.manual_seed(1)
    conv = Conv1D(N, K)
    nn.init.normal_(conv.bias)
    return conv


def formula(layer, x):
    """The defining equation in x's dtype, dropout off."""
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    weight, lora_a, lora_b = (t.detach().to(x.dtype) for t in (weight, layer.lora_a, layer.lora_b))
    y = x @ weight.T + layer.scaling * (x @ lora_a.T) @ lora_b.T
    return y if layer.bias is None else y + layer.bias.detach().to(x.dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_equation(bias, dtype):
    layer = make(bias=bias, dtype=dtype)
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
    x = torch.randn(2, 5, 24, dtype=dtype)
    assert_close_to_reference(layer(x), formula(layer, x), formula(layer, x.double()), "y")


def test_only_the_adapter_trains_and_its_gradients_are_autograds():
    layer = make(dtype=torch.float64)
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    layer(x).square().sum().backward()
    lora_a, lora_b = (t.detach().clone().requires_grad_() for t in (layer.lora_a, layer.lora_b))
    y = F.linear(x, layer.weight, layer.bias) + layer.scaling * F.linear(F.linear(x, lora_a), lora_b)
    want = torch.autograd.grad(y.square().sum(), (x, lora_a, lora_b))
    for got, expected in zip((x.grad, layer.lora_a.grad, layer.lora_b.grad), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("use_rslora, scaling", [(False, 8 / 4), (True, 8 / 2)])
def test_scaling(use_rslora, scaling):
    assert make(use_rslora=use_rslora).scaling == scaling


def test_dropout_acts_in_training_on_the_low_rank_branch_only():
    layer = make(lora_dropout=0.5)
    x = torch.randn(6, 24)
    layer.eval()
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.train()
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(0)
    assert torch.equal(first, layer(x))
    nn.init.zeros_(layer.lora_b)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_from_linear_shares_the_parameters():
    linear = nn.Linear(24, 40).eval()
    layer = FusedLoRALinear.from_linear(linear, r=4, lora_alpha=8)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not linear.weight.requires_grad and not layer.training
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), linear(x))


def test_from_conv1d_shares_the_transposed_weight():
    conv = make_conv1d()
    layer = FusedLoRALinear.from_linear(conv, r=4, lora_alpha=8, init="both_gaussian")
    assert layer.weight is conv.weight and layer.weight.shape == (24, 40) and layer.fan_in_fan_out
    assert (layer.in_features, layer.out_features) == (24, 40)
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(layer(x), formula(layer, x))
    want = layer(x)
    layer.adapters_enabled = False
    assert torch.equal(layer(x), conv(x))
    assert layer(x[:0]).shape == (0, 3, 40)
    layer.adapters_enabled = True
    plain = layer.to_linear()
    assert type(plain) is Conv1D and plain.weight.shape == (24, 40)
    torch.testing.assert_close(plain(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv", [False, True])
def test_merge_rounds_once_and_unmerge_restores_the_bits(dtype, conv):
    base = (make_conv1d() if conv else nn.Linear(24, 40)).to(dtype)
    layer = FusedLoRALinear.from_linear(base, r=4, lora_alpha=8, init="both_gaussian")
    original, bits = layer.weight, layer.weight.detach().clone()
    update = layer.scaling * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
    exact = bits.double() + (update.T if conv else update)

    layer.merge()
    assert layer.merged
    assert torch.equal(original, bits)  # whoever shares the weight still has the frozen one
    # Once rounded from float32: within half a step of dtype plus the error of the float32 sum.
    step = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
    assert ((layer.weight.double() - exact).abs() <= step * 1.001).all()
    x = torch.randn(3, 24, dtype=dtype)
    eager = x @ (exact if conv else exact.T).to(dtype) + base.bias
    assert_close_to_reference(layer(x), eager.detach(), formula_merged(x, exact, conv, base.bias), "merged y")

    layer.adapters_enabled = False
    assert torch.equal(layer(x), base(x))
    layer.adapters_enabled = True
    layer.unmerge()
    assert layer.weight is original and torch.equal(layer.weight, bits) and not layer.merged


def formula_merged(x, exact, conv, bias):
    return (x.double() @ (exact if conv else exact.T) + bias.double()).detach()


def test_merge_states_are_checked():
    layer = make()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(make().state_dict())
    overflowing = make(dtype=torch.float16)
    nn.init.constant_(overflowing.lora_a, 1e5)
    with pytest.raises(ValueError, match="not finite"):
        overflowing.merge()
    assert not overflowing.merged


def test_state_dict_has_four_keys_and_the_frozen_weight_even_when_merged():
    layer = make()
    bits = layer.weight.detach().clone()
    assert set(layer.state_dict()) == {"weight", "bias", "lora_a", "lora_b"}
    assert set(make(bias=False).state_dict()) == {"weight", "lora_a", "lora_b"}
    layer.merge()
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", "lora_a", "lora_b"} and torch.equal(state["weight"], bits)
    other = make(seed=5)
    other.load_state_dict(state)
    x = torch.randn(3, 24)
    torch.testing.assert_close(other(x), layer(x))


def test_to_reaches_the_set_aside_weight_and_deepcopy_is_independent():
    layer = make()
    bits = layer.weight.detach().clone()
    layer.merge()
    copied = copy.deepcopy(layer)
    layer.to(torch.float64)
    layer.unmerge()
    assert all(p.dtype == torch.float64 for p in layer.parameters()) and torch.equal(layer.weight, bits.double())
    assert copied.merged
    copied.unmerge()
    assert torch.equal(copied.weight, bits) and copied.weight.data_ptr() != layer.weight.data_ptr()
    with torch.no_grad():
        copied.lora_a.zero_()
    assert layer.lora_a.any()


def test_initialisations():
    K, r = 400, 8
    layers = {init: make(K, 300, r=r, init=init) for init in INITS}
    zero_a = {init for init, layer in layers.items() if not layer.lora_a.any()}
    zero_b = {init for init, layer in layers.items() if not layer.lora_b.any()}
    assert zero_a == {"both_zero", "b_gaussian"} and zero_b == {"default", "gaussian", "both_zero"}
    default = layers["default"].lora_a.detach()
    assert default.abs().max() <= 1 / math.sqrt(K)
    assert default.std().item() == pytest.approx(1 / math.sqrt(3 * K), rel=0.05)  # of U(-1/√K, 1/√K)
    assert layers["gaussian"].lora_a.std().item() == pytest.approx(1 / r, rel=0.05)
    assert layers["b_gaussian"].lora_b.std().item() == pytest.approx(1 / math.sqrt(r), rel=0.05)
    assert layers["both_gaussian"].lora_b.std().item() == pytest.approx(1 / math.sqrt(r), rel=0.05)


@pytest.mark.parametrize(
    "init, trains", [("default", (False, True)), ("b_gaussian", (True, False)), ("both_zero", (False, False))]
)
def test_which_gradients_are_zero_at_the_start(init, trains):
    layer = make(init=init)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).square().sum().backward()
    assert (bool(layer.lora_a.grad.any()), bool(layer.lora_b.grad.any())) == trains


def test_under_autocast():
    layer = make()
    x = torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        layer.merge()
        merged = layer(x)
    assert y.dtype == merged.dtype == torch.bfloat16
    torch.testing.assert_close(y, merged, rtol=0.05, atol=0.05)


def test_repr_names_what_matters():
    text = repr(make(use_rslora=True, lora_dropout=0.1))
    for part in ("in_features=24", "out_features=40", "r=4", "lora_alpha=8", "scaling=4", "lora_dropout=0.1"):
        assert part in text


@pytest.mark.parametrize(
    "name, value",
    [
        ("in_features", 0),
        ("out_features", 1.5),
        ("r", 0),
        ("r", 2.0),
        ("r", True),
        ("lora_alpha", 0),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("init", "pissa"),
        ("adapter_dtype", torch.float16),
    ],
)
def test_bad_arguments_are_named(name, value):
    arguments = {"in_features": 8, "out_features": 8, "r": 2, "lora_alpha": 4} | {name: value}
    with pytest.raises(ValueError, match=name):
        FusedLoRALinear(**arguments)


def test_from_linear_refuses_other_layers():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for module in (nn.Embedding(3, 4), Scaled(3, 4)):
        with pytest.raises(TypeError, match="nn.Linear"):
            FusedLoRALinear.from_linear(module, r=2, lora_alpha=4)


@pytest.fixture
def few_rows():
    """x of so few rows that, without gradients, a layer is one call into C++, which a view of the layer is kept for."""
    if cpu.unavailable:
        pytest.skip(cpu.unavailable)
    torch.manual_seed(3)
    with torch.no_grad():
        yield torch.randn(2, 3, 24)


def set_data(parameter, data):
    parameter.data = data


def scaled_state(layer):
    return {key: 2 * value for key, value in layer.state_dict().items()}


CHANGES = {
    "scaling": lambda layer: setattr(layer, "scaling", 0.5),
    "values": lambda layer: layer.lora_b.mul_(2),
    "lora_a elsewhere": lambda layer: set_data(layer.lora_a, 2 * layer.lora_a),
    "fewer ranks at the same address": lambda layer: (
        set_data(layer.lora_a, layer.lora_a.data[:2]),
        set_data(layer.lora_b, layer.lora_b.data[:, :2].contiguous()),
    ),
    "transposed at the same address": lambda layer: set_data(layer.lora_b, layer.lora_b.data.view(4, 40).t()),
    "keep_ranks": lambda layer: layer.keep_ranks(torch.tensor([0, 3])),
    "no ranks": lambda layer: layer.keep_ranks(torch.tensor([], dtype=torch.long)),
    "load_state_dict": lambda layer: layer.load_state_dict(scaled_state(layer)),
    "assigned": lambda layer: layer.load_state_dict(scaled_state(layer), assign=True),
    "merged": lambda layer: layer.merge(),
    "merged and back": lambda layer: (layer.merge(), layer.unmerge()),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight, requires_grad=False)),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "lora_e": lambda layer: setattr(layer, "lora_e", nn.Parameter(torch.rand(layer.r))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_few_rows_follow_every_change_of_the_layer(few_rows, change):
    layer = make().eval()
    before = layer(few_rows)
    assert layer._kept is not None
    CHANGES[change](layer)
    merged = layer.merged
    got = layer(few_rows)
    if merged:
        layer.unmerge()
    lora_b = layer.lora_b
    if layer.lora_e is not None:
        layer.lora_b = nn.Parameter(lora_b * layer.lora_e)
    want, exact = (formula(layer, x) for x in (few_rows, few_rows.double()))
    assert_close_to_reference(got, want, exact, "y")
    assert torch.equal(got, before) == (change == "merged and back")


@pytest.mark.parametrize("change", CHANGES)
def test_training_follows_every_change_of_the_layer(change):
    layer, x = make(), torch.randn(20, 24)
    layer(x).sum().backward()
    layer.zero_grad()
    with torch.no_grad():
        CHANGES[change](layer)
    if layer.merged:
        layer.unmerge()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters() if p.requires_grad}
    lora_b = leaves.get("lora_b", layer.lora_b)
    lora_b = lora_b * leaves["lora_e"] if "lora_e" in leaves else lora_b
    update = layer.scaling * x @ leaves.get("lora_a", layer.lora_a).T @ lora_b.T
    expected = nn.functional.linear(x, layer.weight, layer.bias) + update
    dy = torch.randn(20, 40)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    if leaves:
        expected.backward(dy)
        y.backward(dy)
    for name, leaf in leaves.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, leaf.grad, msg=name)


def test_gradients_are_made_of_what_hooks_have_stored_elsewhere():
    layer, x, dy = make(), torch.randn(20, 24, requires_grad=True), torch.randn(20, 40)
    nn.init.normal_(layer.lora_b)
    wanted = [x, layer.lora_a, layer.lora_b]
    expected = torch.autograd.grad(layer(x), wanted, dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        y = layer(x)
    x.data.fill_(torch.nan)
    for parameter in layer.parameters():
        before, parameter.data = parameter.data, parameter.data.clone()
        before.fill_(torch.nan)
    for gradient, plain in zip(torch.autograd.grad(y, wanted, dy), expected, strict=True):
        torch.testing.assert_close(gradient, plain)


def test_what_a_gradient_does_not_read_may_change_before_backward():
    layer, x, dy = make(), torch.randn(20, 24), torch.randn(20, 40)
    for parameter in (layer.lora_a, layer.lora_b):
        parameter.requires_grad_(parameter is layer.lora_b)
    y = layer(x)
    (expected,) = torch.autograd.grad(y, [layer.lora_b], dy, retain_graph=True)
    with torch.no_grad():
        layer.lora_b.add_(1)
        layer.weight.add_(1)
    (gradient,) = torch.autograd.grad(y, [layer.lora_b], dy)
    assert torch.equal(gradient, expected)


def test_a_layer_in_a_cycle_is_freed():
    layer = make()
    layer.lora_a.register_hook(lambda grad, layer=layer: None)
    layer(torch.randn(20, 24)).sum().backward()
    dead = weakref.ref(layer)
    del layer
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "lora_e"])
def test_a_weight_that_was_changed_in_place_before_backward(name):
    layer, x = make(), torch.randn(20, 24, requires_grad=True)
    layer.lora_e = nn.Parameter(torch.rand(layer.r))
    y = layer(x)
    with torch.no_grad():
        layer.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match=rf"^{name} .*modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_few_rows_follow_a_change_of_dtype(few_rows, dtype):
    layer = make().eval()
    layer(few_rows)
    layer.to(dtype)
    x = few_rows.to(dtype)
    assert_close_to_reference(layer(x), formula(layer, x), formula(layer, x.double()), "y")


def test_few_rows_of_a_layer_with_dropout(few_rows):
    layer = make(lora_dropout=0.5)
    evaluated = layer.eval()(few_rows)
    assert not torch.equal(layer.train()(few_rows), evaluated)
    torch.testing.assert_close(evaluated, formula(layer, few_rows))


def test_few_rows_take_the_usual_way_where_the_kernel_does_not_apply(few_rows):
    layer = make().eval()
    with use_backend("reference"):
        layer(few_rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(few_rows).dtype == torch.bfloat16
    layer(few_rows.transpose(0, 1))
    layer(torch.randn(9, 24))
    with torch.enable_grad():
        assert layer(few_rows).requires_grad
    assert make(use_dora=True).eval()(few_rows).shape == (2, 3, 40)
    conv = FusedLoRALinear.from_linear(make_conv1d(), 4, 8).eval()
    assert conv(few_rows).shape == (2, 3, 40)


@pytest.mark.parametrize("shape", [(), (3, 23), (0,)])
def test_few_rows_of_a_wrong_width_are_refused(few_rows, shape):
    with pytest.raises(ValueError, match="x"):
        make().eval()(torch.randn(shape))


def test_a_layer_that_ran_on_few_rows_is_copied_and_pickled(few_rows):
    layer = make().eval()
    y = layer(few_rows)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.lora_b.zero_()
        assert not torch.equal(other(few_rows), y)
    assert torch.equal(layer(few_rows), y)


def test_few_rows_under_vmap_and_tracing(few_rows):
    layer = make().eval()
    y = layer(few_rows)
    traced = torch.jit.trace(layer, few_rows, check_trace=False)
    assert torch.equal(traced(2 * few_rows), layer(2 * few_rows))
    torch.testing.assert_close(torch.vmap(layer)(few_rows), y)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_few_rows_of_every_plain_layer_go_past_the_op(few_rows, bias, quantize):
    linear = nn.Linear(24, 40, bias=bias)
    layer = FusedLoRALinear.from_linear(linear, 4, 8, quantize=quantize).eval()
    layer(few_rows)
    assert layer._kept is not None


class Twice(nn.Module):
    def forward(self, t):
        return 2 * t


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "bias", "weight"])
def test_few_rows_of_a_layer_whose_tensors_are_made_anew(few_rows, name):
    """The address of a tensor that lives for one call must not be kept."""
    for change in ("parametrize", "prune"):
        layer = make().eval()
        if change == "parametrize":
            parametrize.register_parametrization(layer, name, Twice())
        else:
            prune.l1_unstructured(layer, name, 0.5)
        for factor in (1, 3):
            if change == "prune":
                getattr(layer, f"{name}_orig").data.mul_(factor)
            torch.testing.assert_close(layer(few_rows), formula(layer, few_rows))


def test_a_default_device_changes_nothing(few_rows):
    layer, x = make(lora_dropout=0.1), torch.randn(20, 24)
    expected = layer.eval()(x), layer(few_rows)
    with torch.device("meta"):
        actual = layer(x), layer(few_rows)
        with torch.enable_grad():
            layer.train()(x.requires_grad_()).sum().backward()
    assert all(map(torch.equal, actual, expected)) and x.grad.device.type == "cpu"


def test_forward_mode():
    layer, x, t = make(dtype=torch.float64), *torch.randn(2, 3, 24, dtype=torch.float64)
    expected = formula(layer, t) - layer.bias.detach()
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (t,))[1], expected)
    with torch.no_grad(), forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))).tangent, expected)


def test_views_with_a_pending_negation():
    z = torch.randn(20, 24, dtype=torch.complex64)
    x = torch._neg_view(z.real.contiguous())
    assert x.is_neg() and x.is_contiguous()
    for rows in (x, x[:2]):
        with torch.no_grad():
            torch.testing.assert_close(make()(rows), formula(make(), rows.resolve_neg()))


def test_norms_of_dora_follow_lora_e():
    layer, x = make(use_dora=True), torch.randn(12, 24)
    with torch.no_grad():
        before = layer(x)
        layer.lora_e = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 3.0]))
        after = layer(x)
        layer._eval_norms = None
        torch.testing.assert_close(layer(x), after)
    assert not torch.equal(before, after)


def test_shapes_without_memory():
    layer = FusedLoRALinear(16, 8, r=2, lora_alpha=4, device="meta")
    assert layer(torch.empty(3, 16, device="meta")).shape == (3, 8)
    layer = FusedLoRALinear(16, 8, r=2, lora_alpha=4)
    layer.merge()
    layer.to("meta")
    layer.unmerge()
    assert layer.weight.is_meta


@pytest.mark.parametrize("own, other", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_autocast_to_another_half_precision(own, other):
    layer = FusedLoRALinear(16, 8, r=2, lora_alpha=4, dtype=own, adapter_dtype=own, init="both_gaussian")
    with torch.autocast("cpu", dtype=other):
        assert layer(torch.randn(3, 16, dtype=own)).dtype == other


@pytest.mark.parametrize("dropout", [1.0, 1.5, -0.5])
def test_a_dropout_that_was_set_later_is_checked(dropout):
    layer = make()
    layer.lora_dropout = dropout
    with pytest.raises(ValueError, match=r"dropout_p is .*allowed: 0 <= dropout_p < 1"):
        layer(torch.randn(3, 24))


def test_a_pruned_magnitude_is_used():
    layer, x = make(use_dora=True), torch.randn(3, 24)
    with torch.no_grad():
        layer.lora_magnitude.mul_(1.5)
    expected = layer(x)
    prune.identity(layer, "lora_magnitude")
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_evaluation_in_inference_mode_and_training_in_turn(quantize):
    linear = nn.Linear(64, 40)
    frozen = NF4Linear.from_linear(linear) if quantize else FusedLoRALinear.from_linear(linear, 4, 8)
    x = torch.randn(20, 64, requires_grad=True)
    for _ in range(2):
        with torch.inference_mode():
            frozen(x.detach())
        frozen(x).sum().backward()
    assert x.grad is not None


def test_a_conv1d_keeps_what_was_prepared():
    layer, x = FusedLoRALinear.from_linear(make_conv1d(), 4, 8), torch.randn(20, 24)
    kept = layer.kept_layers(x)
    assert kept is not None and layer.kept_layers(x) is kept
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)
    assert layer.kept_layers(x) is not kept
    torch.testing.assert_close(layer(x), formula(layer, x))


def test_what_a_group_keeps_is_no_cycle():
    layers, x = [make() for _ in range(3)], torch.randn(20, 24)
    group = open_group(layers)
    for layer in layers:
        layer(x)
    group.close()
    weights = [weakref.ref(layer.weight) for layer in layers]
    gc.collect()
    gc.disable()
    try:
        del layer, layers, group
        assert all(weight() is None for weight in weights)
    finally:
        gc.enable()


def test_backward_on_another_backend_than_forward():
    pytest.importorskip("triton")
    layers, x = [make(seed=seed) for seed in range(2)], torch.randn(20, 24)
    projections = [layer.projection() for layer in layers]
    dys = [torch.randn(20, 40) for _ in layers]
    gradients = []
    for name in ("cpu", "triton"):
        with use_backend(name):
            ys = lora_linear_group(x, projections)
        with use_backend("cpu"):
            gradients.append(torch.autograd.grad(ys, [layer.lora_b for layer in layers], dys))
    torch.testing.assert_close(*gradients)
