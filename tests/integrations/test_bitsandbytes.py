"""PEFT's layers over bitsandbytes' 4-bit ones after `fuse_peft`."""

import copy
import warnings

import pytest

bnb = pytest.importorskip("bitsandbytes")

import peft  # noqa: E402
import torch  # noqa: E402
from bitsandbytes.functional import (  # noqa: E402
    _convert_weight_packed_for_cpu,
    dequantize_4bit,
)
from torch import nn  # noqa: E402

from lora_kernels import fuse_peft, unfuse_peft  # noqa: E402
from lora_kernels.integrations import peft as ours  # noqa: E402

K, N = 128, 64
HOW = {
    "plain": {},
    "double": {"compress_statistics": True},
    "stored as bfloat16": {"quant_storage": torch.bfloat16},
    "computed in bfloat16": {"compute_dtype": torch.bfloat16},
}


class Net(nn.Module):
    is_loaded_in_4bit = True

    def __init__(self, dtype=torch.float32, quant_type="nf4", **how):
        super().__init__()
        how = {"compress_statistics": False, "quant_type": quant_type, **how}
        self.a, self.b = bnb.nn.Linear4bit(K, N, **how), bnb.nn.Linear4bit(N, K, bias=False, **how)
        self.to(dtype).to("cpu")

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def made(dtype=torch.float32, config=None, **how):
    torch.manual_seed(1)
    config = config or peft.LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights=False)
    model = peft.get_peft_model(Net(dtype, **how), config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # AdaLoRA's diagonal begins as 0.
            if "lora_E" in name:
                parameter.normal_()
    return model


def pair(**how):
    plain = made(**how)
    fused = copy.deepcopy(plain)
    assert len(fuse_peft(fused, strict=True).fused) == 2
    return plain, fused


def dense(linear):
    weight = linear.weight
    return dequantize_4bit(weight.data, copy.copy(weight.quant_state)).float()


def exact(model):
    """The same in float64, of the dequantised weights."""
    layers = [model.base_model.model.a, model.base_model.model.b]
    twin = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, K, bias=False)).double()
    for mine, layer in zip((twin[0], twin[2]), layers, strict=True):
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        mine.weight.data.copy_(layer._nf4.dequantize(torch.float32) + delta)
        if mine.bias is not None:
            mine.bias.data.copy_(layer.base_layer.bias)
    return twin


def results(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)


def same_bits(a, b):
    """Codes that are stored as bfloat16 may be NaN."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def relative_error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HOW)
def test_results_are_those_of_bitsandbytes(name, dtype):
    plain, fused = pair(dtype=dtype, **HOW[name])
    x = torch.randn(20, K).to(dtype)
    in_float32 = dtype == torch.float32 and name != "computed in bfloat16"
    for _ in range(2):
        for found, wanted in zip(results(fused, x), results(plain, x), strict=True):
            assert found.dtype == wanted.dtype
            assert relative_error(found, wanted) < (1e-6 if in_float32 else 1e-2)
    if in_float32:
        assert relative_error(fused(x), exact(fused)(x.double())) < 1e-6


@pytest.mark.parametrize("name", HOW)
def test_weights_are_read_where_they_lie(name):
    plain, fused = pair(**HOW[name])
    # bitsandbytes casts biases in its first call.
    plain(x := torch.randn(3, K)), fused(x)
    state = plain.state_dict()
    for layer, other in ((fused.base_model.model.a, plain.base_model.model.a), (fused.base_model.model.b, None)):
        weight, nf4 = layer.base_layer.weight, layer._nf4
        assert nf4.packed.data_ptr() == weight.data_ptr() and nf4.absmax is weight.quant_state.absmax
        assert other is None or torch.equal(nf4.dequantize(torch.float32), dense(other.base_layer))
        assert nf4.absmax_scale is (weight.quant_state.state2.absmax if name == "double" else None)
    assert fused.state_dict().keys() == state.keys()
    assert all(same_bits(tensor, state[key]) for key, tensor in fused.state_dict().items())


@pytest.mark.parametrize("name", HOW)
def test_what_was_packed_for_the_cpu_is_laid_out_again(name):
    plain, fused = pair(**HOW[name])
    x = torch.randn(20, K)
    wanted = results(fused, x)
    for layer in (fused.base_model.model.a.base_layer, fused.base_model.model.b.base_layer):
        codes = layer.weight.data.clone()
        # In evaluation bitsandbytes does this where the processor has AVX512-BF16.
        layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        assert codes.shape != layer.weight.shape
    found = results(fused, x)
    for layer, before in ((fused.base_model.model.a, plain.base_model.model.a),):
        weight, as_it_was = layer.base_layer.weight, before.base_layer.weight
        assert same_bits(weight.data, as_it_was.data) and weight.shape == as_it_was.shape
        assert not weight.quant_state.packing_format_for_cpu and weight.quant_state.dtype == as_it_was.quant_state.dtype
    # Packing rounds the scales to bfloat16.
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(found, wanted, strict=True))
    assert relative_error(fused(x), exact(fused)(x.double())) < (1e-2 if name == "computed in bfloat16" else 1e-6)
    # And bitsandbytes can go on with it, gradients and all.
    unfuse_peft(fused)
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(results(fused, x), found, strict=True))


def test_evaluation_packs_nothing():
    _, fused = pair()
    fused.eval()
    with torch.no_grad():
        fused(torch.randn(3, K))
        with fused.disable_adapter():
            y = fused(x := torch.randn(3, K))
    for layer in (fused.base_model.model.a, fused.base_model.model.b):
        assert not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
    a, b = (dense(layer.base_layer) for layer in (fused.base_model.model.a, fused.base_model.model.b))
    bias = fused.base_model.model.a.base_layer.bias
    torch.testing.assert_close(y, torch.tanh(x @ a.T + bias) @ b.T, rtol=1e-4, atol=1e-5)


CONFIGS = {
    "dora": peft.LoraConfig(r=4, target_modules=["a", "b"], use_dora=True, init_lora_weights=False),
    "bias": peft.LoraConfig(r=4, target_modules=["a"], lora_bias=True, init_lora_weights=False),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["a", "b"]),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("double", [False, True])
def test_other_adapters(name, double):
    plain = made(config=CONFIGS[name], compress_statistics=double)
    fused = copy.deepcopy(plain)
    fuse_peft(fused, strict=True)
    assert isinstance(fused.base_model.model.a, (ours.Linear4bit, ours.SVDLinear4bit))
    x = torch.randn(20, K)
    for found, wanted in zip(results(fused, x), results(plain, x), strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_merging_is_pefts():
    plain, fused = pair()
    x = torch.randn(20, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (plain, fused):
            model.merge_adapter()
        assert relative_error(fused(x), plain(x)) < 1e-6
        for model in (plain, fused):
            model.unmerge_adapter()
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(results(fused, x), results(plain, x), strict=True))


def test_other_formats_are_left_to_peft():
    plain = made(quant_type="fp4")
    fused = copy.deepcopy(plain)
    report = fuse_peft(fused)
    assert not report.fused and set(report.left.values()) == {"its weight is in FP4"}
    x = torch.randn(20, K)
    assert torch.equal(fused(x), plain(x))
    with pytest.raises(ValueError, match="FP4"):
        fuse_peft(fused, strict=True)


def test_prepared_for_kbit_training():
    torch.manual_seed(1)
    net = peft.prepare_model_for_kbit_training(Net(torch.bfloat16), use_gradient_checkpointing=False)
    plain = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights=False))
    fused, x = copy.deepcopy(plain), torch.randn(20, K)
    fuse_peft(fused, strict=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = zip(results(fused, x), results(plain, x), strict=True)
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype and relative_error(found, wanted) < 1e-2


class Attention(nn.Module):
    is_loaded_in_4bit = True

    def __init__(self):
        super().__init__()
        how = {"quant_type": "nf4", "compute_dtype": torch.bfloat16}
        self.q_proj, self.k_proj, self.v_proj = (bnb.nn.Linear4bit(K, N, **how) for _ in range(3))
        self.to("cpu")

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x) * self.v_proj(x)


def test_a_group_of_layers_with_biases_of_another_dtype():
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    plain = peft.get_peft_model(Attention(), config)
    fused = copy.deepcopy(plain)
    assert fuse_peft(fused, decoder=True).decoder == 1
    x = torch.randn(6, K)
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x), atol=0.05, rtol=0.05)


def test_a_layer_that_moves_leaves_nothing_behind():
    layer = pair()[1].base_model.model.a
    layer(torch.randn(6, K))
    layer._apply(lambda t: t)
    assert layer._nf4 is None and layer._kept is None and layer._plan is None
