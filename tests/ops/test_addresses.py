"""Every public function that takes tensors, with every kind of tensor that is not what lies at an address in memory.

Each gives what torch's own operations give, or an error of ours that says what is allowed. In a process of its own,
since what is tested against is a segmentation fault.
"""

import importlib
import inspect
import pkgutil
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from places import environment
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import lora_kernels
from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    LoRAPlusAdamW,
    NF4Linear,
    NF4Weight,
    inject,
    load_adapter,
    lora_linear,
    lora_linear_group,
    merge,
    ops,
    quantize_nf4,
    reference,
    save_adapter,
)
from lora_kernels.backends import cpu
from lora_kernels.ops.attention import causal_attention
from lora_kernels.ops.cross_entropy import chunked_cross_entropy, chunked_logprobs
from lora_kernels.ops.frozen_linear import frozen_linear
from lora_kernels.ops.rms_norm import rms_norm
from lora_kernels.ops.rotary import rotary
from lora_kernels.ops.swiglu import swiglu
from lora_kernels.types import NF4, Projection

K, N, R = 64, 32, 2
# Refused everywhere: torch's own products take some of them in some places only.
UNREADABLE = ("sparse", "sparse rows", "mkldnn", "nested", "jagged", "quantised", "freed")


def _spread(t):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    if not torch.distributed.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    return distribute_tensor(t, init_device_mesh("cpu", (1,)), [Replicate()])


def _freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _escaped(t):
    kept = []
    torch.func.vmap(lambda row: kept.append(row) or row)(t[None])
    return kept[0]


KINDS = {
    "DTensor": _spread,
    "wrapper subclass": lambda t: TwoTensor(t, t.clone()),
    "fake": FakeTensorMode(allow_non_fake_inputs=True).from_tensor,
    "meta": lambda t: t.to("meta"),
    "negated view": lambda t: torch._neg_view(-t),
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.reshape(-1, t.shape[-1]).to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "freed": _freed,
    "escaped from vmap": _escaped,
}


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _layer(t, **settings):
    torch.manual_seed(0)
    layer = FusedLoRALinear(K, N, R, 4, bias=False, **settings)
    for name in t.keys() - {"x"}:
        layer._parameters[name] = t[name]
    return layer(t["x"])


def _dora(t):
    torch.manual_seed(0)
    layer = FusedLoRALinear(K, N, R, 4, bias=False, use_dora=True)
    weight = layer.weight + 2 * t["lora_b"] @ t["lora_a"]
    return t["x"] @ (weight / weight.norm(dim=1, keepdim=True).detach() * layer.lora_magnitude.detach()[:, None]).T


def _parameter(t):
    try:
        return nn.Parameter(t)
    except RuntimeError as error:
        raise ValueError(f"{error}, says torch itself; allowed: what it takes") from error


def _model(t):
    """A model of one adapted layer, with the tensors that there are."""
    linear = nn.Linear(K, N, bias=False)
    if "weight" in t:
        linear.weight = _parameter(t["weight"])
    model = inject(nn.Sequential(linear), LoRAConfig(r=R, lora_alpha=4, target_modules=["0"]))
    for name in ("lora_a", "lora_b"):
        if name in t:
            setattr(model[0], name, _parameter(t[name]))
    return model


def _saved(t):
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(_model(t), directory)
        saved = load_file(Path(directory, "adapter_model.safetensors"))
    return saved["base_model.model.0.lora_B.weight"] @ saved["base_model.model.0.lora_A.weight"]


def _loaded(t):
    model = _model(t)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(_model({"lora_a": _ONES[:R, :K], "lora_b": _ONES[:N, :R]}), directory)
        load_adapter(model, directory)
    return model[0].lora_a.detach()


def _nf4_weight(t):
    return NF4Weight(NF4(t["packed"], t["absmax"], None, None, 64, (N, K)), torch.float32).dequantize()


def _changed_nf4(t):
    """The 4-bit layer after something has replaced its tensors, as parallelize_module's like do."""
    layer = NF4Linear(quantize_nf4(_draw(N, K)))
    if "lora_a" in t:
        layer = FusedLoRALinear.from_linear(layer, R, 4)
        layer._parameters |= {name: t[name] for name in ("lora_a", "lora_b")}
    layer.weight._buffers |= {name: t[name] for name in ("packed", "absmax")}
    return layer(t["x"])


def _logprobs(t):
    logits = t["hidden"] @ t["lm_head_weight"].T + t["bias"]
    return logits.log_softmax(1).gather(1, t["labels"][:, None]).squeeze(1)


def _adapted(t):
    h = t["x"] @ t["lora_a"].T
    return t["x"] @ t["weight"].T + 2 * (h @ t["lora_b"].T)


def _quantised(t):
    return quantize_nf4(t["weight"]).dequantize()


def _nf4(t):
    return lora_linear(t["x"], _NF4, t["lora_a"], t["lora_b"], 2.0)


def _dense_nf4(t):
    return _adapted({**t, "weight": _NF4.dequantize()})


def _stepped(t):
    parameter = _parameter(t["parameter"])
    try:
        parameter.grad = t["grad"]
    except RuntimeError as error:
        raise ValueError(f"{error}, says torch itself; allowed: what it takes") from error
    LoRAPlusAdamW([parameter], lr=0.1, lr_ratio=1, max_grad_norm=1e9).step()
    return parameter.detach()


def _adamw(t):
    g = t["grad"]
    return t["parameter"] - 0.1 * g / (g.abs() + 1e-8)


_NF4 = quantize_nf4(_draw(N, K))
_PARTS = {"packed": _NF4.packed, "absmax": _NF4.absmax}
_ONES = torch.ones(K, K)
_HEAD = {"hidden": (3, K), "lm_head_weight": (N, K), "bias": (N,), "labels": torch.tensor([0, 5, N - 1])}
_ADAPTER = {"x": (3, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
# function, its formula, its tensors or their shapes
FUNCTIONS = {
    "lora_linear": (lambda t: lora_linear(**t, scaling=2.0), _adapted, _ADAPTER),
    "lora_linear of one row": (lambda t: lora_linear(**t, scaling=2.0), _adapted, {**_ADAPTER, "x": (1, K)}),
    "lora_linear of NF4": (_nf4, _dense_nf4, {name: s for name, s in _ADAPTER.items() if name != "weight"}),
    "lora_linear_group": (
        lambda t: lora_linear_group(t["x"], [Projection(t["weight"], t["lora_a"], t["lora_b"], 2.0)] * 2)[1],
        _adapted,
        _ADAPTER,
    ),
    "FusedLoRALinear": (_layer, _adapted, _ADAPTER),
    "FusedLoRALinear of DoRA": (
        lambda t: _layer(t, use_dora=True),
        _dora,
        {name: s for name, s in _ADAPTER.items() if name != "weight"},
    ),
    "inject": (lambda t: _model(t)(t["x"]), lambda t: t["x"] @ t["weight"].T, {"x": (3, K), "weight": (N, K)}),
    "merge": (
        lambda t: merge(_model(t))[0].weight,
        lambda t: t["weight"] + 2 * t["lora_b"] @ t["lora_a"],
        {name: s for name, s in _ADAPTER.items() if name != "x"},
    ),
    "save_adapter": (_saved, lambda t: t["lora_b"] @ t["lora_a"], {"lora_a": (R, K), "lora_b": (N, R)}),
    "load_adapter": (_loaded, lambda t: _ONES[:R, :K], {"lora_a": (R, K), "lora_b": (N, R)}),
    "NF4Weight": (_nf4_weight, lambda t: _nf4_weight(t).clone(), _PARTS),
    "frozen_linear": (
        lambda t: frozen_linear(**t),
        lambda t: t["x"] @ t["weight"].T + t["bias"],
        {"x": (3, K), "weight": (N, K), "bias": (N,)},
    ),
    "NF4Linear": (lambda t: NF4Linear(_NF4)(t["x"]), lambda t: t["x"] @ _NF4.dequantize().T, {"x": (3, K)}),
    "NF4Linear of other tensors": (_changed_nf4, lambda t: t["x"] @ _nf4_weight(t).T, {"x": (3, K), **_PARTS}),
    "FusedLoRALinear of other 4-bit tensors": (
        _changed_nf4,
        lambda t: _adapted({**t, "weight": _nf4_weight(t)}),
        {"x": (3, K), "lora_a": (R, K), "lora_b": (N, R), **_PARTS},
    ),
    "quantize_nf4": (_quantised, lambda t: quantize_nf4(t["weight"].clone()).dequantize(), {"weight": (N, K)}),
    "rms_norm": (
        lambda t: rms_norm(t["x"], t["weight"], 1e-6),
        lambda t: reference.rms_norm(t["x"], t["weight"], 1e-6),
        {"x": (3, K), "weight": (K,)},
    ),
    "swiglu": (lambda t: swiglu(**t), lambda t: reference.swiglu(**t), {"gate": (3, K), "up": (3, K)}),
    "rotary": (
        lambda t: rotary(**t),
        lambda t: reference.rotary(**t),
        {"x": (1, 4, 5, 8), "cos": (1, 5, 8), "sin": (1, 5, 8)},
    ),
    "causal_attention": (
        lambda t: causal_attention(**t),
        lambda t: nn.functional.scaled_dot_product_attention(*t.values(), is_causal=True, enable_gqa=True),
        {"q": (1, 4, 5, 8), "k": (1, 2, 5, 8), "v": (1, 2, 5, 8)},
    ),
    "chunked_cross_entropy": (lambda t: chunked_cross_entropy(**t)[0], lambda t: -_logprobs(t).sum(), _HEAD),
    "chunked_logprobs": (lambda t: chunked_logprobs(**t), _logprobs, _HEAD),
    "LoRAPlusAdamW": (_stepped, _adamw, {"parameter": (4, 4), "grad": (4, 4)}),
}
# Words of our errors.
OURS = (
    "allowed",
    "expected",
    "must",
    "no memory",
    "Adapters go on",
    "inject or load adapters first",
    "is distributed",
    "doesn't fit the model",
)
# Those that need the values, so that they refuse tensors that have none.
NEED_VALUES = ("merge", "load_adapter", "save_adapter", "quantize_nf4", "chunked_cross_entropy", "chunked_logprobs")
_LOSSES = "lora_kernels.ops.cross_entropy"
ASKS_ONLY = "looks at what a tensor is, not at its values"
INSIDE = "takes what lora_linear, which is tried, has looked at"
SETTINGS = "settings, without tensors"
# What is public and isn't tried, and why.
LEFT_OUT = {
    **dict.fromkeys(("AdaLoRAConfig", "FullConfig", "LoRAConfig", "PrefixConfig", "PromptConfig", "INITS"), SETTINGS),
    "FuseReport": "names of layers, and reasons",
    **dict.fromkeys(("fuse_peft", "unfuse_peft"), "change the classes of layers, which then call lora_linear"),
    **dict.fromkeys(("available", "use_backend"), "names of backends"),
    **dict.fromkeys(("is_fused", "takes_rotary", "version_of"), ASKS_ONLY),
    **dict.fromkeys(("adapters_disabled", "add_adapter", "use_adapter"), "put other modules into the model's places"),
    "Projection": "parts of a layer, which lora_linear_group takes",
    **dict.fromkeys(("autocast_dtype", "check_dense", "check_frozen", "check_layer", "prepare"), ASKS_ONLY),
    **dict.fromkeys(
        ("in_dtype_of_sums", "projection_in_memory", "tensors_of", "under_autocast", "vector", "weight_tensors"), INSIDE
    ),
    **dict.fromkeys(("backward", "column_scale_bwd", "drawn", "forward", "matrix", "most_layers"), INSIDE),
    **dict.fromkeys(("project", "refuse_second_derivative"), INSIDE),
    "trainable_summary": "counts elements",
    "loraplus_groups": "sorts parameters by their names",
    "fuse_decoder": "puts modules into a decoder that call rms_norm, swiglu, rotary, causal_attention and lora_linear",
    "recomputing": "a context without tensors",
    "remember": "keeps tensors, and reads none",
    "adamw_step": "what LoRAPlusAdamW, which is tried, calls",
    **dict.fromkeys(("check", "needs_no_graph", "frozen_layers"), ASKS_ONLY),
    "with_rows": "one operation of torch",
    "frozen_linear_dx": "takes what chunked_cross_entropy, which is tried, has checked and computed",
    **dict.fromkeys(("to_bitsandbytes", "from_bitsandbytes"), "rename tensors of files, in torch's operations"),
    "load_packed": "renames an entry of a state dict",
}


def _plain(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t.a if isinstance(t, TwoTensor) else t


def _made(tensors, kind, changed):
    """The tensors, those of the names `changed` of this kind; None where torch has no such tensors."""
    try:
        return {name: KINDS[kind](t.clone()) if name in changed else t.clone() for name, t in tensors.items()}
    except (RuntimeError, ValueError, NotImplementedError):
        return None


def _results(function, tensors):
    """What the function gives, and the gradients of its sum, where they are on."""
    if torch.is_grad_enabled():
        for t in tensors.values():
            if t.dtype == torch.float32 and t.layout == torch.strided:
                t.requires_grad_()
    found = function(tensors)
    if not found.requires_grad:
        return found.detach(), {}
    found.sum().backward()
    return found.detach(), {name: t.grad for name, t in tensors.items() if t.is_leaf and t.grad is not None}


def _problem(name, made, expected, gradients, kind):
    """What went wrong; None where nothing did."""
    try:
        found, found_gradients = _results(FUNCTIONS[name][0], made)
    except (TypeError, ValueError) as error:
        ours = any(word in str(error) for word in OURS)
        return None if ours else f"{type(error).__name__} of somebody else's: {error}"
    except Exception as error:
        # torch itself says so.
        escaped = kind == "escaped from vmap" and ("have escaped" in str(error) or "have storage" in str(error))
        return None if escaped else f"{type(error).__name__}: {error}"
    if kind in UNREADABLE or (kind in ("fake", "meta") and name in NEED_VALUES):
        return "was taken"
    pairs = [(found, expected), *((grad, gradients[key]) for key, grad in found_gradients.items() if key in gradients)]
    for one, other in pairs:
        if kind in ("fake", "meta"):
            if one.shape != other.shape:
                return f"shape {one.shape}"
        elif not torch.allclose(_plain(one), other, rtol=1e-4, atol=1e-4):
            return f"{one} instead of {other}"
    return None


def _sweep(name):
    _, formula, given = FUNCTIONS[name]
    tensors = {
        key: value.clone() if isinstance(value, torch.Tensor) else _draw(*value, seed=index)
        for index, (key, value) in enumerate(given.items())
    }
    failures, taken = [], 0
    for kind in KINDS:
        for changed in (*([key] for key in given), list(given)):
            zeros = changed if kind == "zero tensor" else ()
            for with_gradients in (False, True):
                if (made := _made(tensors, kind, changed)) is None:
                    continue
                case = f"{name}, {kind} {', '.join(changed)}, gradients {with_gradients}"
                print(case, flush=True)
                with torch.set_grad_enabled(with_gradients):
                    plain = {key: torch.zeros_like(t) if key in zeros else t.clone() for key, t in tensors.items()}
                    expected, gradients = _results(formula, plain)
                    problem = _problem(name, made, expected, gradients, kind)
                taken += 1
                if problem is not None:
                    failures.append(f"{case}: {problem}"[:400])
    assert taken > 2 * len(KINDS) - 8
    return failures


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    problems = [problem for name in sys.argv[1:] for problem in _sweep(name)]
    print("\n".join(["", *problems]))
    sys.exit(len(problems) > 0)


@pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")
def test_no_kernel_reads_an_address_that_is_none():
    command = [sys.executable, __file__, *FUNCTIONS]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)
    assert run.returncode == 0, f"{run.stdout[-6000:]}{run.stderr[-2000:]}"


def test_every_public_function_is_tried():
    public = {*lora_kernels.__all__, *lora_kernels.nn.__all__, *lora_kernels.optim.__all__}
    for place in (*(f"{ops.__name__}.{info.name}" for info in pkgutil.iter_modules(ops.__path__)), _LOSSES):
        for name, value in vars(importlib.import_module(place)).items():
            is_own = inspect.isroutine(value) or inspect.isclass(value)
            if is_own and value.__module__ == place and not name.startswith("_"):
                public.add(name)
    tried = {name.split(" of ")[0] for name in FUNCTIONS}
    assert public == tried | LEFT_OUT.keys()
    assert not tried & LEFT_OUT.keys()
