"""The kernels on a real GPU, against float64 and the reference on the CPU. `benchmarks/gpu_check.py` runs these.

Without a GPU, or with Triton's kernels interpreted, nothing here can run:
TRITON_INTERPRET=0 pytest tests/backends/test_gpu.py
"""

import math
from dataclasses import fields, replace

import pytest
import torch
from lora_cases import GROUP, RNG, SCALING, LoraCase, OneLayer, check_group, group_case

from lora_kernels import (
    LoRAPlusAdamW,
    backends,
    lora_linear,
    quantize_nf4,
    reference,
)
from lora_kernels.backends import choice as strategy
from lora_kernels.backends import triton
from lora_kernels.backends.cuda import backend as cuda
from lora_kernels.backends.triton import vendor
from lora_kernels.testing import assert_close_to_reference, lora_inputs
from lora_kernels.types import (
    NF4,
    AdapterGradients,
    AdapterNeeds,
    Dropout,
    Gradients,
    Layers,
    Needs,
    Outputs,
    Projection,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def _why_not(name):
    if name == "cuda":
        return cuda.unavailable
    if triton.unavailable is not None:
        return triton.unavailable
    if triton.INTERPRETED:
        return "Triton's kernels are interpreted; set TRITON_INTERPRET=0"
    return vendor.unsupported(BF16) if name == "vendor" else None


def _backends(*names):
    marks = {name: pytest.mark.skipif(_why_not(name) is not None, reason=f"{name}: {_why_not(name)}") for name in names}
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=marks[name]) for name in names])


def _module(name):
    return {"triton": triton, "cuda": cuda, "vendor": triton.by_vendor if name == "vendor" else None}[name]


def _move(value, device):
    if isinstance(value, (list, tuple)):
        return type(value)(_move(part, device) for part in value)
    if isinstance(value, Layers):
        return Layers(_move(value.projections, device))
    if isinstance(value, (NF4, Projection, Dropout, Outputs, Gradients, AdapterGradients)):
        return replace(value, **{f.name: _move(getattr(value, f.name), device) for f in fields(value)})
    return value.to(device) if isinstance(value, torch.Tensor) else value


class OnDevice:
    """A backend for CPU tensors that runs `name` on the device; `weight` takes the place of the dense one."""

    def __init__(self, name, device="cuda", weight=None):
        self.module, self.device, self.weight = _module(name), device, weight

    def _run(self, function, *args):
        return _move(getattr(self.module, function)(*_move(args, self.device)), "cpu")

    def _layers(self, layers):
        if self.weight is None:
            return layers
        return Layers([replace(layer, weight=self.weight) for layer in layers])

    def lora_linear_fwd(self, x, layers, dropout):
        return self._run("lora_linear_fwd", x, self._layers(layers), dropout)

    def lora_linear_bwd(self, dys, x, hs, layers, dropout, needs):
        return self._run("lora_linear_bwd", dys, x, hs, self._layers(layers), dropout, needs)

    def column_scale_bwd(self, *args):
        return self._run("column_scale_bwd", *args)


CASES = [
    dict(M=1, N=1, K=1, R=1),
    dict(M=63, N=65, K=129, R=17, dropout_p=0.3, bias=True, lora_e=True),
    dict(M=129, N=65, K=63, R=8, adapter_dtype=FP32, dropout_p=0.1),
    dict(M=1, N=576, K=576, R=16, adapter_dtype=FP32),
    dict(M=16, N=1024, K=2048, R=64, adapter_dtype=FP32, bias=True),
    dict(M=520, N=1536, K=576, R=16, adapter_dtype=FP32, dropout_p=0.1),
    dict(M=2048, N=2048, K=512, R=16, adapter_dtype=FP32, dropout_p=0.1),
    dict(M=2048, N=2304, K=1032, R=17, adapter_dtype=FP32, dropout_p=0.1, bias=True, lora_e=True),
    dict(M=512, N=4104, K=2304, R=16, adapter_dtype=FP32, column_scale=True, bias=True),
    dict(M=1100, N=4096, K=1032, R=33, dtype=FP16, dropout_p=0.1),
    dict(M=16, N=65, K=4104, R=16, adapter_dtype=FP32, dropout_p=0.1),
    dict(M=300, N=40, K=8200, R=17, dropout_p=0.1),
    dict(M=1100, N=4096, K=4104, R=17, adapter_dtype=FP32, dropout_p=0.1, bias=True, lora_e=True),
    dict(M=1030, N=72, K=200, R=16, dropout_p=0.1),
    dict(M=65, N=136, K=200, R=130, dtype=FP16, adapter_dtype=FP32, dropout_p=0.5, lora_e=True),
    dict(M=520, N=1536, K=576, R=16, adapter_dtype=FP32, dropout_p=0.1, bias=True, column_scale=True),
    dict(M=63, N=65, K=129, R=17, dtype=FP16, adapter_dtype=FP32, column_scale=True),
]


def _ids(case):
    return f"{case['M']}x{case['N']}x{case['K']}r{case['R']}-{str(case.get('dtype', BF16))[6:]}"


@_backends("triton", "cuda", "vendor")
@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_dense(backend, case):
    problem = LoraCase(**{"dtype": BF16, **case})
    problem.backend = OnDevice(backend)
    problem.check()


@_backends("triton", "vendor")
def test_a_transposed_weight(backend):
    """Conv1D's, as it lies in memory."""
    problem = LoraCase(2048, 2304, 776, 16, dtype=BF16, adapter_dtype=FP32, dropout_p=0.1, bias=True)
    problem.backend = OnDevice(backend, weight=problem.inputs["weight"].T.contiguous().cuda().T)
    problem.check()


@_backends("triton", "vendor")
def test_dense_float32(backend):
    problem = LoraCase(129, 320, 264, 16, dropout_p=0.1, bias=True, column_scale=True)
    problem.backend = OnDevice(backend)
    problem.check()


@_backends("triton", "cuda", "vendor")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        dict(M=1, N=576, K=576, R=16, adapter_dtype=FP32),
        dict(M=16, N=512, K=1024, R=8, adapter_dtype=FP32, bias=True, column_scale=True),
        dict(M=33, N=512, K=640, R=8, adapter_dtype=FP32, dropout_p=0.1),
        dict(M=65, N=63, K=129, R=17, dropout_p=0.3),
        dict(M=13, N=63, K=129, R=17, dropout_p=0.3),
        dict(M=300, N=1024, K=576, R=64, adapter_dtype=FP32, dropout_p=0.1),
    ],
    ids=_ids,
)
def test_nf4(backend, case, double_quant):
    problem = LoraCase(dtype=BF16, **case)
    weight = reference.quantize_nf4(problem.inputs["weight"], 64, double_quant)
    reference.dequantize_nf4(weight, problem.inputs["weight"])
    problem.backend = OnDevice(backend, weight=weight)
    problem.check()


@_backends("triton", "cuda", "vendor")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize(
    ("M", "K", "sizes"),
    [
        (3, 129, GROUP),
        (11, 4104, ((2048, 16), (520, 16))),
        (300, 576, ((576, 16), (192, 16), (192, 16))),
        (2048, 1032, ((2304, 16), (1032, 17), (264, 8))),
    ],
)
def test_group(backend, M, K, sizes, nf4, dropout_p):
    """Forward and backward of the module; the mask is the one that `one_by_one` draws."""
    x, layers, dys = group_case(M, BF16, FP32, nf4, K, sizes)
    torch.manual_seed(3)
    dropout = Dropout(dropout_p, torch.randint(2**62, (2,), dtype=torch.int64)) if dropout_p else None
    frozen = Layers([replace(layer, weight=layer.weight.tensors()) if nf4 else layer for layer in layers])
    run = OnDevice(backend)
    outputs = run.lora_linear_fwd(x, frozen, dropout)
    needs = Needs(True, tuple(AdapterNeeds(True, True, layer.lora_e is not None) for layer in layers))
    found = run.lora_linear_bwd(dys, x, outputs.hs, frozen, dropout, needs)
    adapters = [t for own in found.layers for t in (own.lora_a, own.lora_b, own.lora_e) if t is not None]
    actual = [*outputs.ys, found.x, *adapters]
    check_group(actual, x, layers, dys, dropout_p, BF16)


@_backends("triton", "cuda")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_codec_bit_for_bit(backend, dtype, double_quant):
    for shape, block_size in (((17, 129), 64), ((576, 576), 64), ((33, 70), 256)):
        weight = torch.randn(shape).to(dtype)
        expected = reference.quantize_nf4(weight, block_size, False)
        actual = _module(backend).quantize_nf4(weight.cuda(), block_size, double_quant)
        assert torch.equal(actual.packed.cpu(), expected.packed)
        if double_quant:
            # The mean of the scales is a sum in another order; the rest follows from it.
            assert torch.allclose(actual.absmax_offset.cpu(), expected.absmax.mean(), rtol=1e-6)
        else:
            assert torch.equal(actual.absmax.cpu(), expected.absmax)
        dense, dense_expected = torch.empty(2, *shape, dtype=dtype)
        on_gpu = dense.cuda()
        _module(backend).dequantize_nf4(actual, on_gpu)
        reference.dequantize_nf4(_move(actual, "cpu"), dense_expected)
        assert torch.equal(on_gpu.cpu(), dense_expected)


@_backends("triton", "cuda")
def test_mask_is_the_reference_mask(backend):
    """Read off h where lora_a selects columns, and off dx where only the masked term is left."""
    M, K, dropout_p = 150, 168, 0.3
    keep, scale = reference.keep_mask(RNG, dropout_p, M, K), reference.dropout_scale(dropout_p)
    run, ones, eye = OneLayer(OnDevice(backend)), torch.ones(M, K, dtype=BF16), torch.eye(M, dtype=BF16)
    zeros = torch.zeros(1, K, dtype=BF16)
    _, h = run.lora_linear_fwd(ones, zeros, torch.eye(K), torch.ones(1, K, dtype=BF16), 1.0, None, None, dropout_p, RNG)
    assert torch.equal(h, keep * torch.tensor(scale))
    dx, *_ = run.lora_linear_bwd(
        eye, ones, torch.zeros(M, M), torch.zeros(M, K, dtype=BF16), ones, eye, 1.0, None, dropout_p, RNG,
        (True, False, False, False),
    )  # fmt: skip
    assert torch.equal(dx != 0, keep)


@_backends("triton", "cuda", "vendor")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("M", [16, 512, 2048])
def test_small_update_survives_rounding(backend, M, bias):
    """⟨y - x Wᵀ - bias, Δ⟩ / ⟨Δ, Δ⟩ = 1 within 1 % and the noise of rounding, at ‖sBA‖ / ‖W‖ = 1e-3 in bfloat16."""
    inputs = lora_inputs(M, 4096, 2048, 8, BF16, FP32, bias=bias, device="cuda")
    update = SCALING * inputs["lora_b"].double() @ inputs["lora_a"].double()
    inputs["lora_b"] *= 1e-3 * inputs["weight"].double().norm() / update.norm()
    exact = {name: None if t is None else t.double() for name, t in inputs.items()}
    delta = SCALING * exact["x"] @ exact["lora_a"].T @ exact["lora_b"].T
    base = torch.nn.functional.linear(exact["x"], exact["weight"], exact["bias"])
    args = (SCALING, inputs["bias"], None, 0.0, None)
    parts = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
    y, _ = OneLayer(_module(backend)).lora_linear_fwd(*parts, *args)
    projection = (((y.double() - base) * delta).sum() / (delta * delta).sum()).item()
    noise = 3 * 0.3 * 2**-8 * y.double().norm().item() / math.sqrt(y.numel()) / delta.norm().item()
    assert abs(projection - 1) < 0.01 + noise, f"projection {projection:.4f}"


def _optimizers(steps, backend, capture=False):
    """Parameters and norm after `steps` steps on the GPU, and those of torch in float32 and float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 576), (576, 16), (3,), (129, 65)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    results = []
    for dtype in (FP32, torch.float64):
        params = [torch.nn.Parameter(t.to(dtype)) for t in start]
        optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
        for _ in range(steps):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(dtype)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        results.append(torch.cat([param.detach().view(-1) for param in params]))
    params = [torch.nn.Parameter(t.cuda()) for t in start]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.cuda()
    with backends.use_backend(backend):
        optimizer = LoRAPlusAdamW(params, lr=1e-2, weight_decay=0.1, lr_ratio=1, max_grad_norm=1.0)
        if not capture:
            for _ in range(steps):
                optimizer.step()
        else:
            optimizer.step()
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
            for _ in range(steps - 1):
                graph.replay()
    return torch.cat([param.detach().view(-1) for param in params]).cpu(), *results


@_backends("triton", "cuda")
def test_adamw(backend):
    assert_close_to_reference(*_optimizers(3, backend), "params")


def test_a_decoder_as_graphs():
    """Losses and gradients of batches of several lengths, with and without graphs; the dropout of a graph is random."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lora_kernels import LoRAConfig, inject
    from lora_kernels.train.causal_lm import AnswerLoss
    from lora_kernels.train.graphs import DecoderGraphs

    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=64))
    model = inject(model.bfloat16().cuda(), LoRAConfig(r=4, lora_dropout=0.0, init="b_gaussian")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss_of = AnswerLoss(model)
    graphs = DecoderGraphs(loss_of.parts[0], 40)

    def results(ids, with_graphs):
        loss_of.graphs = graphs if with_graphs else None
        loss = loss_of(ids, ids)["loss"]
        loss.backward()
        grads = [p.grad.clone() for p in trained]
        model.zero_grad()
        return [loss.detach(), *grads]

    for length in (40, 7, 33, 40, 8, 5, 38, 6, 40):
        ids = torch.randint(64, (3, length), device="cuda")
        for found, expected in zip(results(ids, True), results(ids, False), strict=True):
            error = (found - expected).norm() / expected.norm().clamp(min=1e-9)
            assert error < 0.02, f"{error:.4f} off at {length} tokens"
    assert len(graphs._graphed) == 2

    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout = 0.5
            # It was zero: with more than this, gradients of attention in bfloat16 would be noise.
            module.lora_a.data.normal_(std=0.1)
    graphs = DecoderGraphs(loss_of.parts[0], 40)
    first, second = ([float(results(ids, True)[0]) for _ in range(6)] for _ in range(2))
    assert len(set(first + second)) == 12


@_backends("cuda")
def test_adamw_in_a_graph(backend):
    assert_close_to_reference(*_optimizers(4, backend, capture=True), "params")


def _layer(device="cuda"):
    inputs = lora_inputs(96, 320, 256, 16, BF16, FP32, bias=True, device=device)
    return [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")], {"scaling": SCALING, "bias": inputs["bias"]}


@_backends("triton", "cuda")
def test_lora_linear_in_a_graph(backend):
    """A replay reads what x is then, and draws another mask."""
    args, options = _layer()
    args[2].requires_grad_()

    def step(dropout_p):
        y = lora_linear(*args, **options, dropout_p=dropout_p)
        return y, torch.autograd.grad(y.sum(), args[2])[0]

    for dropout_p in (0.0, 0.5):
        with backends.use_backend(backend):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step(dropout_p)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y, gradient = step(dropout_p)
            args[0].copy_(torch.randn_like(args[0]))
            graph.replay()
            first = y.clone(), gradient.clone()
            graph.replay()
            if dropout_p:
                assert not torch.equal(first[0], y), "both replays drew the same mask"
            else:
                for captured, eager in zip(first, step(dropout_p), strict=True):
                    assert torch.equal(captured, eager)


@_backends("triton", "cuda")
def test_on_another_stream(backend):
    """The kernels wait for what is queued before them on the current stream, and for nothing else."""
    args, options = _layer()
    with backends.use_backend(backend):
        expected = lora_linear(*args, **options)
        x, late = args[0], torch.zeros_like(args[0])
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(200_000_000)
            late.copy_(x)
            y = lora_linear(late, *args[1:], **options)
            assert not torch.cuda.current_stream().query(), "something synchronised"
        torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@_backends("triton", "cuda")
def test_on_the_second_device(backend):
    args, options = _layer("cuda:1")
    here, here_options = _layer("cuda:0")
    with backends.use_backend(backend):
        y = lora_linear(*args, **options)
        expected = lora_linear(*here, **here_options)
    assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    torch.testing.assert_close(y.cpu(), expected.cpu())


@_backends("triton")
@pytest.mark.parametrize("nf4", [False, True])
def test_auto_measures_and_keeps_its_choice(backend, nf4, monkeypatch, tmp_path):
    choices = strategy.Choices(tmp_path / "strategy.json")
    monkeypatch.setattr(strategy, "_choices", lambda: choices)
    monkeypatch.delenv(strategy.ENVIRONMENT_VARIABLE, raising=False)
    inputs = lora_inputs(96, 320, 256, 16, BF16, FP32, device="cuda")
    if nf4:
        inputs["weight"] = quantize_nf4(inputs["weight"])
    results = []
    for name in ("auto", "auto", backend):
        leaves = {n: inputs[n].clone().requires_grad_() for n in ("x", "lora_a", "lora_b")}
        with backends.use_backend(name):
            y = lora_linear(weight=inputs["weight"], scaling=SCALING, **leaves)
            y.sum().backward()
        results.append([y.float(), *(leaf.grad.float() for leaf in leaves.values())])
    for measured, kept, named in zip(*results, strict=True):
        assert torch.equal(measured, kept)
        assert (measured - named).norm() < 0.01 * named.norm()
    found = strategy.Choices(choices.path)._known.values()
    assert len(found) == 2 and all(len(choice["ms"]) >= 2 for choice in found)
