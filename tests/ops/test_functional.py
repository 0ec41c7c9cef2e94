"""torch.func's transforms, forward-mode and batched gradients, against the equation in float64 and torch's own ops."""

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn import functional as F

from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    NF4Linear,
    fuse_decoder,
    inject,
    lora_linear,
    lora_linear_group,
)
from lora_kernels.backends import cpu
from lora_kernels.ops.attention import causal_attention
from lora_kernels.ops.rms_norm import rms_norm
from lora_kernels.ops.rotary import rotary
from lora_kernels.ops.swiglu import swiglu
from lora_kernels.types import Projection

M, K, N, R = 3, 6, 5, 2
CHOICES = ("dense", "nf4", "dora", "dora of nf4")


def tensors(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,), "lora_e": (R,)}
    shapes["column_scale"] = (N,)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def ours(t):
    return lora_linear(**t, scaling=0.7)


def equation(t):
    h = t["x"] @ t["lora_a"].T * t["lora_e"]
    return t["column_scale"] * (t["x"] @ t["weight"].T + 0.7 * h @ t["lora_b"].T) + t["bias"]


def loss(function):
    return lambda t: function(t).square().sum()


def per_sample(function):
    return vmap(grad(loss(function)), ({**dict.fromkeys(tensors()), "x": 0},))


TRANSFORMS = {
    "grad": lambda f: grad(loss(f))(tensors()),
    "vjp": lambda f: vjp(f, tensors())[1](torch.ones(M, N, dtype=torch.float64)),
    "jvp": lambda f: jvp(f, (tensors(),), (tensors(1),)),
    "vmap": lambda f: vmap(f, ({**dict.fromkeys(tensors()), "x": 0},))(tensors()),
    "gradients per sample": lambda f: per_sample(f)(tensors()),
    "jacrev": lambda f: jacrev(f)(tensors()),
    "jacfwd": lambda f: jacfwd(f)(tensors()),
    "hessian": lambda f: hessian(loss(f))(tensors()),
    "vmap of all": lambda f: vmap(f)({name: torch.stack([t, 2 * t]) for name, t in tensors().items()}),
    "vmap in grad": lambda f: grad(lambda t: vmap(f)({n: torch.stack([v, v]) for n, v in t.items()}).sum())(tensors()),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_op_in_transforms(name):
    torch.testing.assert_close(TRANSFORMS[name](ours), TRANSFORMS[name](equation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_of_other_dtypes_in_transforms(dtype):
    """Within two units of the last place of what the op itself gives, by autograd."""
    t = {name: value.requires_grad_() for name, value in tensors(dtype=dtype).items()}
    loss(ours)(t).backward()
    found = grad(loss(ours))({name: value.detach() for name, value in t.items()})
    for name, value in t.items():
        error = (found[name] - value.grad).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * value.grad.abs().max(), name


def test_a_group_in_transforms():
    layers = [tensors(seed) for seed in range(3)]
    x = tensors(7)["x"]

    def of(function):
        return grad(lambda x, layers: sum(y.square().sum() for y in function(x, layers)), (0, 1))(x, layers)

    def group(x, layers):
        return lora_linear_group(
            x, [Projection(**{k: v for k, v in t.items() if k != "x"}, scaling=0.7) for t in layers]
        )

    torch.testing.assert_close(of(group), of(lambda x, layers: [equation({**t, "x": x}) for t in layers]))


def layer_of(choice, dropout=0.0):
    torch.manual_seed(0)
    how = {"quantize": "nf4" if "nf4" in choice else None, "use_dora": "dora" in choice}
    layer = FusedLoRALinear.from_linear(nn.Linear(K, N), R, 4, dropout, init="both_gaussian", **how)
    if "dora" in choice:
        nn.init.uniform_(layer.lora_magnitude, 0.5, 2)
    return layer.double()


def norms_of(layer):
    base = layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.dequantize(torch.float64)
    return torch.linalg.vector_norm(base + layer.scaling * layer.lora_b @ layer.lora_a, dim=1).detach()


def layer_equation(layer, parameters, x):
    """Its own equation, with DoRA's norms constants."""
    weight = parameters.get("weight")
    weight = layer.weight.dequantize(torch.float64) if weight is None else weight
    y = x @ weight.T + layer.scaling * x @ parameters["lora_a"].T @ parameters["lora_b"].T
    if "lora_magnitude" in parameters:
        y = y * parameters["lora_magnitude"] / norms_of(layer)
    return y + parameters["bias"]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians_of_layers(choice, transform):
    layer, x = layer_of(choice), tensors()["x"]
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    found = transform(lambda p, x: functional_call(layer, p, (x,)), (0, 1))(parameters, x)
    expected = transform(lambda p, x: layer_equation(layer, p, x), (0, 1))(parameters, x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_stack_of_layers(choice, gradients):
    layers, x = [layer_of(choice) for _ in range(3)], tensors()["x"]
    for seed, layer in enumerate(layers):
        torch.manual_seed(seed)
        nn.init.normal_(layer.lora_b)
        nn.init.normal_(layer.bias)
        if "nf4" not in choice:
            nn.init.normal_(layer.weight)
            layer._apply(lambda t: t)
    with torch.set_grad_enabled(gradients):
        parameters, buffers = stack_module_state(layers)
        found = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_of_gradients(choice, dtype):
    """autograd.grad(is_grads_batched=True), which jacobian(vectorize=True) makes, against one at a time."""
    layer = layer_of(choice).to(dtype)
    inputs = [tensors(dtype=dtype)["x"].requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
    y, eye = layer(inputs[0]), torch.eye(M * N, dtype=dtype).view(-1, M, N)
    found = torch.autograd.grad(y, inputs, eye, is_grads_batched=True, retain_graph=True)
    single = zip(*(torch.autograd.grad(y, inputs, row, retain_graph=True) for row in eye), strict=True)
    for batch, rows in zip(found, single, strict=True):
        torch.testing.assert_close(batch, torch.stack(rows))


@pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")
@pytest.mark.parametrize(
    ("op", "shapes", "trained"),
    [
        (lambda x, weight: rms_norm(x, weight, 1e-6, 1.0), [(M, K), (K,)], 2),
        (swiglu, [(M, K), (M, K)], 2),
        (rotary, [(2, 3, 4, K), (2, 4, K), (1, 4, K)], 1),
        (causal_attention, [(1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)], 3),
    ],
    ids=["rms_norm", "swiglu", "rotary", "causal_attention"],
)
def test_batches_of_gradients_of_a_decoders_ops(op, shapes, trained):
    """Against one at a time, which the kernels compute."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    leaves = [t.requires_grad_() for t in inputs[:trained]]
    y = op(*inputs)
    douts = torch.randn(5, *y.shape, generator=generator)
    found = torch.autograd.grad(y, leaves, douts, is_grads_batched=True, retain_graph=True)
    single = zip(*(torch.autograd.grad(y, leaves, dout, retain_graph=True) for dout in douts), strict=True)
    for batch, rows in zip(found, single, strict=True):
        torch.testing.assert_close(batch, torch.stack(rows))


def test_a_frozen_layer_in_4_bits():
    layer = NF4Linear.from_linear(nn.Linear(K, N))
    dense, x = layer.to_linear(), tensors(dtype=torch.float32)["x"]
    for transform in (jacrev, jacfwd, vmap):
        torch.testing.assert_close(transform(layer)(x), transform(dense)(x))
    x.requires_grad_()
    eye = torch.eye(M * N).view(-1, M, N)
    found, expected = (torch.autograd.grad(f(x), x, eye, is_grads_batched=True)[0] for f in (layer, dense))
    torch.testing.assert_close(found, expected)


def test_dropout_in_transforms():
    layer, x = layer_of("dense", dropout=0.5), torch.ones(1, K, dtype=torch.float64).expand(4000, -1)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)
    y = vmap(layer, randomness="different")(x)
    assert len(y.unique(dim=0)) > 10 and len(vmap(layer, randomness="same")(x).unique(dim=0)) == 1
    torch.testing.assert_close(y.mean(0), layer.eval()(x[0]), rtol=0, atol=0.2)
    with pytest.raises(ValueError, match="dropout_p is 1.5"):
        grad(lambda t: lora_linear(**t, scaling=1.0, dropout_p=1.5).sum())(tensors())


@pytest.mark.parametrize("function", [lambda f, x: vmap(f)(x), lambda f, x: vmap(grad(lambda x: f(x).sum()))(x)])
def test_transforms_in_a_compiled_function(function):
    layer, x = layer_of("dense"), tensors()["x"]
    compiled = torch.compile(lambda x: function(layer, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), function(layer, x))


def test_autocast_in_transforms():
    layer, x = layer_of("dense").float(), tensors(dtype=torch.float32)["x"]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = vmap(layer)(x), layer(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_gradients_per_sample_of_a_fused_model():
    model = inject(tiny_model("llama").double(), LoRAConfig(r=2, init="both_gaussian"))
    plain = inject(tiny_model("llama").double(), LoRAConfig(r=2, init="both_zero"))
    plain.load_state_dict(model.state_dict())
    fuse_decoder(model)
    ids = tiny_batch()
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def of(model, row):
        logits = model(input_ids=row[None], use_cache=False).logits
        return F.cross_entropy(logits[0, :-1], row[1:])

    def total(parameters, row):
        logits = functional_call(model, parameters, kwargs={"input_ids": row[None], "use_cache": False}).logits
        return F.cross_entropy(logits[0, :-1], row[1:])

    found = vmap(grad(total), (None, 0))({name: model.get_parameter(name).detach() for name in names}, ids)
    for index, row in enumerate(ids):
        expected = torch.autograd.grad(of(plain, row), [plain.get_parameter(name) for name in names])
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][index], value)
