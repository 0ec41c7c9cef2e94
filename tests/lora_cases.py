"""Problems for lora_linear that several backends' tests share, with what they are compared with."""

from dataclasses import replace

import torch

from lora_kernels import NF4Weight, Projection, quantize_nf4, reference
from lora_kernels.testing import assert_close_to_reference, lora_inputs
from lora_kernels.types import AdapterNeeds, Dropout, Layers, Needs

FP32 = torch.float32
GRADIENTS = ("dx", "dlora_a", "dlora_b", "dlora_e", "dcolumn_scale")
ALL = (True, True, True, True)
SCALING = 1.5
# A negative seed and an offset beyond 32 bits use all the bits of the key and of the counter.
RNG = torch.tensor([-1234567890123, (7 << 33) + 5])
# A NaN, so that a stray read spoils the result, with bits of its own, so that a stray write shows.
CANARY = 0x7FC0BEEF


class OneLayer:
    """The functions of a backend for one layer, whose parts come one by one; `module` is the backend."""

    def __init__(self, module):
        self.module = module
        self.column_scale_bwd = module.column_scale_bwd

    def lora_linear_fwd(
        self, x, weight, lora_a, lora_b, scaling, bias=None, lora_e=None, dropout_p=0.0, rng=None, column_scale=None
    ):
        layers = Layers([Projection(weight, lora_a, lora_b, scaling, bias, lora_e, column_scale)])
        outputs = self.module.lora_linear_fwd(x, layers, dropout_of(dropout_p, rng))
        (y,), (h,) = outputs.ys, outputs.hs
        return y, h

    def lora_linear_bwd(self, dy, x, h, weight, lora_a, lora_b, scaling, lora_e, dropout_p, rng, needs):
        layers = Layers([Projection(weight, lora_a, lora_b, scaling, None, lora_e)])
        need_x, *own = needs
        needs = Needs(need_x, (AdapterNeeds(own[0], own[1], own[2] and lora_e is not None),))
        found = self.module.lora_linear_bwd([dy], x, [h], layers, dropout_of(dropout_p, rng), needs)
        (own,) = found.layers
        return found.x, own.lora_a, own.lora_b, own.lora_e


def dropout_of(dropout_p, rng):
    return Dropout(dropout_p, rng) if dropout_p else None


def check_low_rank_beside_a_full_weight(one):
    """At ‖scaling B A‖ = 1e-3 ‖W‖ an allclose on y sees nothing of the term; its projection does."""
    inputs = lora_inputs(512, 128, 128, 8, torch.bfloat16)
    update = SCALING * inputs["lora_b"].double() @ inputs["lora_a"].double()
    inputs["lora_b"] *= 1e-3 * inputs["weight"].double().norm() / update.norm()
    given = [inputs[name] for name in ("x", "weight", "lora_a", "lora_b")]
    x, weight, lora_a, lora_b = (t.double() for t in given)
    delta = SCALING * x @ lora_a.T @ lora_b.T
    y, _ = one.lora_linear_fwd(*given, SCALING)
    projection = ((y.double() - x @ weight.T) * delta).sum() / (delta * delta).sum()
    assert abs(projection - 1) < 0.01, f"projection {projection:.4f}"


class LoraCase:
    """Inputs, results and expectations of one problem, all by name.

    A subclass sets `backend`, the one that is under test.
    """

    backend = None

    def __init__(
        self, M, N, K, R, dtype=FP32, adapter_dtype=None, dropout_p=0.0, bias=False, lora_e=False, needs=ALL,
        column_scale=False,
    ):  # fmt: skip
        self.inputs = lora_inputs(M, N, K, R, dtype, adapter_dtype, bias, lora_e, column_scale=column_scale)
        self.dtype, self.dropout_p, self.needs = dtype, dropout_p, needs
        self.rng = RNG if dropout_p else None
        self.dy = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(self, fwd, bwd, place=lambda name, t: t, dtype=None, scale_bwd=reference.column_scale_bwd):
        """y, h and the gradients from a backend's functions; `place` may move each input elsewhere."""
        t = {name: None if t is None else place(name, t.to(dtype or t.dtype)) for name, t in self.inputs.items()}
        rest = (t["lora_e"], self.dropout_p, self.rng)
        y, h = fwd(t["x"], t["weight"], t["lora_a"], t["lora_b"], SCALING, t["bias"], *rest, t["column_scale"])
        dz, dscale = place("dy", self.dy.to(dtype or self.dtype)), None
        if t["column_scale"] is not None:
            dz, dscale = scale_bwd(dz, y, t["bias"], t["column_scale"])
        h = place("h", h)
        gradients = bwd(dz, t["x"], h, t["weight"], t["lora_a"], t["lora_b"], SCALING, *rest, self.needs)
        return {"y": y, "h": h, **dict(zip(GRADIENTS, (*gradients, dscale), strict=True))}

    def eager(self):
        # Adapters are converted to the dtype of x for the tensor cores, so the eager version has one dtype throughout.
        leaves = {name: None if t is None else t.to(self.dtype).requires_grad_() for name, t in self.inputs.items()}
        y = reference.lora_linear_ref(**leaves, scaling=SCALING, dropout_p=self.dropout_p, rng=self.rng)
        y.backward(self.dy)
        gradients = {f"d{name}": None if t is None else t.grad for name, t in leaves.items()}
        return {"y": y.detach(), **gradients}

    def check(self, place=lambda name, t: t):
        backend, exactly = OneLayer(self.backend), OneLayer(reference)
        functions = backend.lora_linear_fwd, backend.lora_linear_bwd
        actual = self.run(*functions, place, scale_bwd=backend.column_scale_bwd)
        exact = self.run(exactly.lora_linear_fwd, exactly.lora_linear_bwd, dtype=torch.float64)
        eager = self.eager()
        assert actual["h"].dtype == FP32
        torch.testing.assert_close(actual["h"].double(), exact["h"], atol=0.03 if self.dtype != FP32 else 1e-5, rtol=0)
        for name in ("y", *GRADIENTS):
            if exact[name] is None:
                assert actual[name] is None, f"{name} was not asked for"
                continue
            source = self.inputs["x" if name == "y" else name[1:]]
            assert actual[name].dtype == source.dtype, name
            assert_close_to_reference(actual[name].to(self.dtype), eager[name], exact[name], name)
        return actual


def strided(name, t):
    """x and dy as rows of a wider tensor, weight as a Conv1D's transposed view."""
    if name in ("x", "dy"):
        wide = torch.full((t.shape[0], t.shape[1] + 5), float("nan"), dtype=t.dtype)
        wide[:, 2:-3] = t
        return wide[:, 2:-3]
    return t.T.contiguous().T if name == "weight" else t


class GuardedBuffers:
    """Called as torch.empty is: tensors full of NaN amid canaries, whose survival `check` asserts."""

    PAD = 256  # 32-bit words on either side

    def __init__(self):
        self.arenas = []

    def __call__(self, shape, dtype, device="cpu"):
        size = torch.Size(shape).numel()
        words = -(-size * dtype.itemsize // 4)
        arena = torch.full((words + 2 * self.PAD,), CANARY, dtype=torch.int32)
        self.arenas.append(arena)
        return arena[self.PAD : self.PAD + words].view(dtype)[:size].view(shape)

    def check(self):
        for arena in self.arenas:
            assert (arena[: self.PAD] == CANARY).all() and (arena[-self.PAD :] == CANARY).all()


GROUP = ((130, 4), (33, 7), (64, 16))  # N and R of its layers


def group_case(M, dtype, adapter_dtype, nf4, K=129, sizes=GROUP):
    """x, layers and the dy of each."""
    layers, dys = [], []
    for index, (N, R) in enumerate(sizes):
        t = lora_inputs(M, N, K, R, dtype, adapter_dtype, bias=index != 1, lora_e=index == 1, seed=index)
        weight = quantize_nf4(t["weight"]) if nf4 else t["weight"]
        layers.append(Projection(weight, t["lora_a"], t["lora_b"], 0.7 + index, t["bias"], t["lora_e"]))
        dys.append(torch.randn(M, N, generator=torch.Generator().manual_seed(index)).to(dtype))
    return lora_inputs(M, 1, K, 1, dtype, seed=9)["x"], layers, dys


def group_results(function, x, layers, dys, dropout_p, dtype=None):
    """y of each layer, dx and the gradients of the adapters, in the dtypes given or in one for all."""
    x, dys = x.to(dtype or x.dtype).requires_grad_(), [dy.to(dtype or dy.dtype) for dy in dys]
    layers = [
        replace(layer, **{
            name: getattr(layer, name).to(dtype or getattr(layer, name).dtype).requires_grad_(name != "bias")
            for name in ("lora_a", "lora_b", "bias", "lora_e")
            if getattr(layer, name) is not None
        })
        for layer in layers
    ]  # fmt: skip
    adapters = [t for layer in layers for t in (layer.lora_a, layer.lora_b, layer.lora_e) if t is not None]
    torch.manual_seed(3)
    ys = function(x, layers, dropout_p)
    return [*ys, *torch.autograd.grad(ys, [x, *adapters], dys)]


def check_group(actual, x, layers, dys, dropout_p, dtype=None):
    """What `group_results` gave, against float64, and torch's version in the dtypes given or in one for all."""
    plain = group_results(one_by_one, x, layers, dys, dropout_p, dtype)
    exact = group_results(one_by_one, x, layers, dys, dropout_p, torch.float64)
    for index, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_close_to_reference(a.cpu(), p.to(a.dtype) if dtype else p, e, f"result {index}")


def one_by_one(x, layers, dropout_p):
    """reference.lora_linear_ref of each layer, all with the mask that a group draws."""
    rng = torch.randint(2**62, (2,), dtype=torch.int64) if dropout_p else None
    ys = []
    for layer in layers:
        weight = layer.weight
        dense = weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight
        args = (dense.to(x.dtype), layer.lora_a, layer.lora_b, layer.scaling, layer.bias, layer.lora_e)
        ys.append(reference.lora_linear_ref(x, *args, dropout_p, rng))
    return tuple(ys)
