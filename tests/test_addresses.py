"""The functions that hand tensors to kernels, with every kind of tensor that is not what lies at an address in memory.

Each gives what torch's own operations give, or an error of ours that says what is allowed. In a process of its own,
since what is tested against is a segmentation fault.
"""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import lora_kernels
from lora_kernels import (
    FusedLoRALinear,
    LoRAPlusAdamW,
    NF4Linear,
    cpu,
    lora_linear,
    lora_linear_group,
    quantize_nf4,
    reference,
)
from lora_kernels.ops.decoder import rms_norm, rotary, swiglu
from lora_kernels.reference import Projection

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


def _layer(t):
    layer = FusedLoRALinear(K, N, R, 4, bias=False)
    for name in ("weight", "lora_a", "lora_b"):
        layer._parameters[name] = t[name]
    return layer(t["x"])


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
    try:
        parameter = nn.Parameter(t["parameter"])
        parameter.grad = t["grad"]
    except RuntimeError as error:
        raise ValueError(f"{error}, says torch itself; allowed: what it takes") from error
    LoRAPlusAdamW([parameter], lr=0.1, lr_ratio=1, max_grad_norm=1e9).step()
    return parameter.detach()


def _adamw(t):
    g = t["grad"]
    return t["parameter"] - 0.1 * g / (g.abs() + 1e-8)


_NF4 = quantize_nf4(_draw(N, K))
_ADAPTER = {"x": (3, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
# function, its formula, the shapes of its tensors
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
    "NF4Linear": (lambda t: NF4Linear(_NF4)(t["x"]), lambda t: t["x"] @ _NF4.dequantize().T, {"x": (3, K)}),
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
    "LoRAPlusAdamW": (_stepped, _adamw, {"parameter": (4, 4), "grad": (4, 4)}),
}


def _plain(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t.a if isinstance(t, TwoTensor) else t


def _made(tensors, kind, changed):
    """The tensors, those of the names `changed` of this kind; None where torch has no such tensors."""
    try:
        return {name: KINDS[kind](t.clone()) if name in changed else t.clone() for name, t in tensors.items()}
    except (RuntimeError, ValueError, NotImplementedError):
        return None


def _problem(function, made, expected, kind):
    """What went wrong; None where nothing did."""
    try:
        found = function(made)
    except (TypeError, ValueError) as error:
        ours = any(word in str(error) for word in ("allowed", "expected", "must be", "no memory"))
        return None if ours else f"{type(error).__name__} of somebody else's: {error}"
    except Exception as error:
        # torch itself says so.
        escaped = kind == "escaped from vmap" and "may have escaped" in str(error)
        return None if escaped else f"{type(error).__name__}: {error}"
    if kind in UNREADABLE:
        return "was taken"
    if kind in ("fake", "meta"):
        return None if found.shape == expected.shape else f"shape {found.shape}"
    found = _plain(found)
    return None if torch.allclose(found, expected, rtol=1e-4, atol=1e-4) else f"{found} instead of {expected}"


def _sweep(name):
    function, formula, shapes = FUNCTIONS[name]
    tensors = {key: _draw(*shape, seed=index) for index, (key, shape) in enumerate(shapes.items())}
    failures, taken = [], 0
    for kind in KINDS:
        for changed in (*([key] for key in shapes), list(shapes)):
            zeros = changed if kind == "zero tensor" else ()
            expected = formula({key: torch.zeros_like(t) if key in zeros else t for key, t in tensors.items()})
            for gradients in (False, True):
                if (made := _made(tensors, kind, changed)) is None:
                    continue
                case = f"{name}, {kind} {', '.join(changed)}, gradients {gradients}"
                print(case, flush=True)
                with torch.set_grad_enabled(gradients):
                    problem = _problem(function, made, expected, kind)
                taken += 1
                if problem is not None:
                    failures.append(f"{case}: {problem}"[:400])
    assert taken > 2 * len(KINDS) - 8
    return failures


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    problems = _sweep(sys.argv[1])
    print("\n".join(["", *problems]))
    sys.exit(len(problems) > 0)


@pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_kernel_reads_an_address_that_is_none(name):
    root = Path(lora_kernels.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, __file__, name]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, f"{run.stdout[-3000:]}{run.stderr[-2000:]}"
