"""LoRAPlusAdamW and adamw_step on every backend, against torch.optim.AdamW and float64."""

import copy
import math

import pytest
import torch
from cpu_isa import threads
from torch import nn
from torch.nn.utils import clip_grad_norm_

from lora_kernels import backends, reference
from lora_kernels.backends import cpu
from lora_kernels.backends import triton as triton_backend
from lora_kernels.methods.lora import LoRAConfig, inject
from lora_kernels.optim import LoRAPlusAdamW, loraplus_groups
from lora_kernels.testing import assert_close_to_reference

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Odd sizes, empty, a scalar, more than one chunk, exactly one chunk, and a matrix of every kind's length.
SHAPES = [(1,), (63,), (0, 4), (), (129, 65), (2, 4096), (16, 1100), (8, 64)]


def make_params(dtype=FP32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def two_groups(params, weight_decay=0.1):
    a, b = params[::2], params[1::2]
    return [{"params": a, "lr": 1e-2, "weight_decay": weight_decay}, {"params": b, "lr": 0.16, "weight_decay": 0.0}]


def gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    return [(scale * torch.randn(p.shape, generator=generator)).to(p.dtype) for p in params]


def set_gradients(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.dtype)


def flat(tensors):
    """All tensors as the one that the op makes of them: the rounding error of a single element says little."""
    return torch.cat([t.reshape(-1) for t in tensors])


def torch_step(optimizer, params, max_grad_norm):
    norm = None if max_grad_norm is None else clip_grad_norm_(params, max_grad_norm)
    optimizer.step()
    return norm


def ours_for(params, groups=None, **kwargs):
    return LoRAPlusAdamW(groups or two_groups(params), lr=1e-2, lr_ratio=1, **kwargs)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e6, math.inf])
def test_many_steps_equal_torch_adamw_with_two_groups(backend, max_grad_norm):
    """Ours, torch in float32 (the eager version) and torch in float64 (the oracle) see the same gradients."""
    ours, eager = make_params(), make_params()
    exact = [nn.Parameter(p.detach().double()) for p in ours]
    optimizer = ours_for(ours, max_grad_norm=max_grad_norm)
    eager_optimizer, exact_optimizer = (torch.optim.AdamW(two_groups(params)) for params in (eager, exact))
    for step in range({"triton": 4, "cuda-emulated": 20}.get(backend, 100)):
        grads = gradients(ours, step)
        for params in (ours, eager, exact):
            set_gradients(params, grads)
        optimizer.step()
        norms = [torch_step(o, p, max_grad_norm) for o, p in ((eager_optimizer, eager), (exact_optimizer, exact))]
        if max_grad_norm is None:
            assert optimizer.grad_norm is None
        else:
            assert_close_to_reference(optimizer.grad_norm, *norms, "grad_norm")
        # clip_grad_norm_ scales the gradients in place; ours must not.
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, grads, strict=True))
    everything = (ours, optimizer), (eager, eager_optimizer), (exact, exact_optimizer)
    assert_close_to_reference(*(flat(p.detach() for p in params) for params, _ in everything), "parameters")
    for name in ("exp_avg", "exp_avg_sq"):
        assert_close_to_reference(*(flat(o.state[p][name] for p in params) for params, o in everything), name)
    assert all(torch.equal(*(o.state[p]["step"] for p, (_, o) in zip(ps, everything[:2], strict=True)))
               for ps in zip(ours, eager, strict=True))  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_low_precision_parameters_follow_their_float32_master(backend, dtype):
    """30 updates of 1e-4, each below half a unit of the last place of 1.0, add up, as they do in float64."""
    start = torch.cat([torch.ones(100), torch.randn(60, generator=torch.Generator().manual_seed(0))]).to(dtype)
    params, plain, exact = (
        [nn.Parameter(start.to(d, copy=True)), nn.Parameter(start[:37, None].to(d, copy=True))]
        for d in (dtype, FP32, FP64)
    )
    optimizers = [LoRAPlusAdamW(params, lr=1e-4, lr_ratio=1, weight_decay=0.1, max_grad_norm=1.0)]
    optimizers += [torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1) for p in (plain, exact)]
    for step in range(3 if backend == "triton" else 30):
        for p in (params, plain, exact):
            set_gradients(p, [g.abs().to(dtype) for g in gradients(params, step)])
        optimizers[0].step()
        torch_step(optimizers[1], plain, 1.0)
        torch_step(optimizers[2], exact, 1.0)
    for p, e, x in zip(params, plain, exact, strict=True):
        state = optimizers[0].state[p]
        assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq", "master", "step")} == {FP32}
        assert_close_to_reference(state["master"], e.detach(), x.detach(), "master")
        assert torch.equal(p, state["master"].to(dtype))
    assert not torch.equal(params[0], start) or backend == "triton"


def test_a_value_written_to_a_low_precision_parameter_replaces_the_master(backend):
    param, other = (nn.Parameter(torch.ones(70, dtype=BF16)) for _ in range(2))
    for p in (param, other):
        optimizer = LoRAPlusAdamW([p], lr=1e-3, lr_ratio=1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        if p is param:
            kept = optimizer.state[p]["master"][:35].clone()
            with torch.no_grad():
                p[35:] = 5.0
            optimizer.step()
            master = optimizer.state[p]["master"]
            assert (master[35:] > 4.9).all() and (master[35:] < 5.0).all()
            assert torch.allclose(master[:35], kept - 1e-3, rtol=0, atol=2e-6)


def unaligned(t):
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("place", [lambda t: t, unaligned], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("grad_dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_every_dtype_of_parameter_and_gradient(backend, dtype, grad_dtype, place):
    """Through adamw_step itself: torch ties a gradient's dtype to its parameter's."""

    def group(params_dtype, state_dtype):
        params = [place(p.detach().to(params_dtype)) for p in make_params(dtype)]
        masters = [place(p.to(state_dtype)) if params_dtype in (BF16, FP16) else None for p in params]
        zeros = [[place(torch.zeros(p.shape, dtype=state_dtype)) for p in params] for _ in range(2)]
        steps = [torch.tensor(4.0) for _ in params]
        grads = [place(grad.to(grad_dtype)) for grad in gradients(make_params(), 0)]
        return reference.AdamWGroup(params, grads, *zeros, steps, masters, 1e-2, 0.9, 0.99, 1e-8, 0.1)

    ours, eager, exact = group(dtype, FP32), group(dtype, FP32), group(FP64, FP64)
    module = backends._load(backend)
    norm = module.adamw_step([ours], 1.0, {})
    eager_norm, exact_norm = (reference.adamw_step([g], 1.0, {}) for g in (eager, exact))
    assert_close_to_reference(norm, eager_norm, exact_norm.double(), "grad_norm")
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert_close_to_reference(*(flat(getattr(g, name)) for g in (ours, eager, exact)), name)
    assert ours.steps == [5.0] * len(SHAPES)
    for param, master in zip(ours.params, ours.masters, strict=True):
        assert master is None or torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_changes_nothing(backend, poison):
    params = make_params()
    optimizer = ours_for(params, max_grad_norm=1.0)
    set_gradients(params, gradients(params, 0))
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    params[4].grad[100, 3] = poison
    optimizer.step()
    assert not torch.isfinite(optimizer.grad_norm)
    after = params, optimizer.state_dict()["state"]
    assert all(torch.equal(p, q) for p, q in zip(before[0], after[0], strict=True))
    for index, state in before[1].items():
        assert all(torch.equal(value, after[1][index][name]) for name, value in state.items())


def test_missing_gradients_are_skipped_and_take_no_step(backend):
    ours, theirs = make_params(), make_params()
    optimizer, other = ours_for(ours, max_grad_norm=1.0), torch.optim.AdamW(two_groups(theirs))
    for step in range(6):
        grads = [g if (step + i) % 3 else None for i, g in enumerate(gradients(ours, step))]
        set_gradients(ours, grads)
        set_gradients(theirs, grads)
        optimizer.step()
        torch_step(other, theirs, 1.0)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
        assert optimizer.state[p]["step"] == other.state[q]["step"] == 4
    optimizer.zero_grad()
    before = copy.deepcopy(ours)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16])
@pytest.mark.parametrize("fused", [False, True])
def test_state_dict_is_torchs_both_ways(dtype, fused):
    """3 steps with the one, 3 more with the other, equal 6 steps with torch alone."""

    def run(first, second):
        params = make_params(dtype)
        optimizers = [first(params), second(params)]
        for step in range(6):
            if step == 3:
                optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            set_gradients(params, gradients(params, step))
            optimizers[step // 3].step()
        return params, optimizers[1].state_dict()

    def theirs(params):
        return torch.optim.AdamW(two_groups(params), lr=1e-2, fused=fused)

    expected, state = run(theirs, theirs)
    for first, second in ((ours_for, theirs), (theirs, ours_for)):
        params, saved = run(first, second)
        assert saved["state"][0]["step"] == 6
        assert set(state["state"][0]) <= set(saved["state"][0]) <= {*state["state"][0], "master"}
        assert set(saved["param_groups"][0]) == set(state["param_groups"][0])
        if dtype != BF16:
            for p, q in zip(params, expected, strict=True):
                torch.testing.assert_close(p, q)


def test_reload_of_low_precision_state_is_exact():
    params = make_params(BF16)
    optimizer = ours_for(params, max_grad_norm=1.0)
    for step in range(2):
        set_gradients(params, gradients(params, step))
        optimizer.step()
    other_params = [nn.Parameter(p.detach().clone()) for p in params]
    other = ours_for(other_params, max_grad_norm=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, o in ((params, optimizer), (other_params, other)):
        set_gradients(p, gradients(p, 2))
        o.step()
    for p, q in zip(params, other_params, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert value.dtype == FP32 and torch.equal(value, other.state[q][name]), name


def test_the_number_of_threads_changes_no_bit():
    def run(count):
        params = make_params(shapes=[(300, 257), (64, 4096), (3,)])
        optimizer = LoRAPlusAdamW(params, lr=1e-2, lr_ratio=1, max_grad_norm=1.0)
        with threads(count):
            for step in range(3):
                set_gradients(params, gradients(params, step))
                optimizer.step()
        return [*params, optimizer.grad_norm]

    assert all(torch.equal(p, q) for p, q in zip(run(1), run(3), strict=True))


def test_parameters_that_move_or_are_replaced_between_steps():
    ours, theirs = make_params(), make_params()
    optimizer, other = ours_for(ours), torch.optim.AdamW(two_groups(theirs))

    def step(number):
        set_gradients(ours, gradients(ours, number))
        set_gradients(theirs, gradients(theirs, number))
        optimizer.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)

    step(0)
    for p in ours:
        p.data = p.data.clone()
    step(1)
    for o in (optimizer, other):
        state = next(iter(o.state.values()))
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])
    step(2)
    optimizer.state.clear()
    other.state.clear()
    step(3)
    for params, o in ((ours, optimizer), (theirs, other)):
        params.append(nn.Parameter(torch.ones(5)))
        o.add_param_group({"params": params[-1:], "lr": 0.5, "weight_decay": 0.1})
    step(4)


@pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")
def test_tensors_that_stopped_fitting_are_refused_not_read():
    """After steps that went well, so that the cached addresses are the ones in use."""

    def stepped():
        param = nn.Parameter(torch.ones(6, 4))
        optimizer = LoRAPlusAdamW([param], lr=1e-3, lr_ratio=1)
        param.grad = torch.ones_like(param)
        optimizer.step()
        return param, optimizer, optimizer.state[param]

    param, optimizer, _ = stepped()
    param.grad = None
    param.data = param.data.to(BF16)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="master of parameter 0: exactly bfloat16 .* not torch.bfloat16"):
        optimizer.step()
    param, optimizer, _ = stepped()
    param.data = param.data.T.contiguous().T
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="parameter 0 is torch.float32 with strides"):
        optimizer.step()
    for name, wrong in (("exp_avg", torch.zeros(3)), ("exp_avg_sq", torch.zeros(6, 4, dtype=BF16))):
        param, optimizer, state = stepped()
        state[name] = wrong
        with pytest.raises(ValueError, match=f"{name}s of parameter 0 is .*; allowed: contiguous float32 .6, 4."):
            optimizer.step()


def test_non_contiguous_gradient(backend):
    ours, theirs = (nn.Parameter(torch.ones(65, 33)) for _ in range(2))
    grad = torch.randn(33, 65).T
    ours.grad, theirs.grad = grad, grad.clone()
    LoRAPlusAdamW([ours], lr=1e-2, lr_ratio=1, max_grad_norm=1.0).step()
    torch_step(torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0), [theirs], 1.0)
    torch.testing.assert_close(ours, theirs)


class Model(nn.Module):
    """Adapters, trained embeddings, norm, biases and a score head."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.score = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.norm(self.embed_tokens(ids))
        return self.score(self.v_proj(x) + self.q_proj(x))


def adapted_model():
    saved = ("embed_tokens", "norm", "score")
    config = LoRAConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    model = inject(Model(), config)
    model.q_proj.bias.requires_grad_(True)
    return model


def placed(model, groups):
    """{name: (lr, weight_decay)}."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (round(g["lr"], 12), g["weight_decay"]) for g in groups for p in g["params"]}


def test_groups_of_a_model_with_everything():
    model = adapted_model()
    expected = {
        "q_proj.lora_a": (1e-3, 0.1),
        "v_proj.lora_a": (1e-3, 0.1),
        "q_proj.lora_b": (16e-3, 0.1),
        "v_proj.lora_b": (16e-3, 0.1),
        "embed_tokens.weight": (1e-5, 0.1),
        "score.weight": (1e-3, 0.1),
        "score.bias": (1e-3, 0.0),
        "norm.weight": (1e-3, 0.0),
        "norm.bias": (1e-3, 0.0),
        "q_proj.bias": (1e-3, 0.0),
    }
    assert placed(model, loraplus_groups(model, 1e-3, 16, 0.1, lr_embedding=1e-5)) == expected
    optimizer = LoRAPlusAdamW(model, 1e-3, weight_decay=0.1, lr_embedding=1e-5)
    assert placed(model, optimizer.param_groups) == expected
    plain = placed(model, LoRAPlusAdamW(model, 1e-3, lr_ratio=1, lr_embedding=None).param_groups)
    assert set(plain.values()) == {(1e-3, 0.0)}


def test_groups_of_peft_are_those_of_its_helper():
    """On adapters alone, with the paper's embedding learning rate: lr, ratio and weight decay of each parameter."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj", "v_proj"])
    model = peft.get_peft_model(Model(), config)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.01
    )
    expected = placed(model, theirs.param_groups)
    assert {lr for lr, _ in expected.values()} == {2e-4, 32e-4, 1e-6}
    # Its helper knows the parameters of an nn.Embedding only by the module two levels up, which PEFT's layer is not.
    assert placed(model, loraplus_groups(model, 2e-4, 16, 0.01)) == expected


def test_the_oracle_files_learning_rates():
    """What PEFT 0.21.2's helper gives for lr 2e-4, ratio 16, weight decay 0.01 on two layers."""
    model = inject(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), LoRAConfig(r=2))
    lr_a, lr_b = (0.0002, 0.01), (0.0032, 0.01)
    expected = {"a.lora_a": lr_a, "b.lora_a": lr_a, "a.lora_b": lr_b, "b.lora_b": lr_b}
    assert placed(model, loraplus_groups(model, 2e-4, 16.0, 0.01)) == expected


@pytest.mark.parametrize("make_scheduler", [
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
])  # fmt: skip
def test_schedulers_keep_the_ratio(make_scheduler):
    model = adapted_model()
    optimizer = LoRAPlusAdamW(model, 1e-3, lr_ratio=16, lr_embedding=1e-5)
    scheduler = make_scheduler(optimizer)
    seen = set()
    for _ in range(6):
        model(torch.arange(11)).square().sum().backward()
        before = [p.detach().clone() for p in optimizer.param_groups[1]["params"]]
        optimizer.step()
        rates = placed(model, optimizer.param_groups)
        assert rates["q_proj.lora_b"][0] == pytest.approx(16 * rates["q_proj.lora_a"][0])
        if not seen:
            # Adam's first step is lr wherever there is a gradient.
            moved = (optimizer.param_groups[1]["params"][0] - before[0]).abs().max().item()
            assert moved == pytest.approx(rates["q_proj.lora_b"][0], rel=1e-3)
        seen.add(rates["q_proj.lora_b"][0])
        optimizer.zero_grad()
        scheduler.step()
    assert len(seen) == 6 or isinstance(scheduler, torch.optim.lr_scheduler.LinearLR)


def test_loraplus_is_adamw_with_two_groups_over_100_training_steps():
    """A model trained by gradients of its own, against clip_grad_norm_ and torch's AdamW over loraplus_groups."""
    ours = adapted_model()
    theirs = copy.deepcopy(ours)
    optimizer = LoRAPlusAdamW(ours, 1e-4, lr_ratio=16, weight_decay=0.1, max_grad_norm=1.0)
    other = torch.optim.AdamW(loraplus_groups(theirs, 1e-4, 16, 0.1))
    losses = []
    for _ in range(100):
        for model in (ours, theirs):
            loss = (model(torch.arange(11)) - 1).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        torch_step(other, [p for p in theirs.parameters() if p.requires_grad], 1.0)
        optimizer.zero_grad()
        other.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-4)


def test_closure_and_copies():
    model = adapted_model()
    optimizer = LoRAPlusAdamW(model, 1e-2, max_grad_norm=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.arange(11)) - 1).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    copied = copy.deepcopy(optimizer)
    assert copied.max_grad_norm == 0.5 and torch.equal(copied.grad_norm, optimizer.grad_norm)
    copied.step()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"lr_ratio": 0.5}, "lr_ratio is 0.5; allowed: a finite number >= 1"),
    ({"lr_ratio": math.inf}, "lr_ratio is inf"),
    ({"lr_ratio": math.nan}, "lr_ratio is nan"),
    ({"lr": -1.0}, "lr is -1.0; allowed: a finite number >= 0"),
    ({"lr": math.inf}, "lr is inf"),
    ({"lr": torch.tensor(0.1)}, "lr is tensor"),
    ({"lr_embedding": math.nan}, "lr_embedding is nan"),
    ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; allowed: a number > 0, or None"),
    ({"eps": math.inf}, "eps is inf"),
    ({"weight_decay": math.inf}, "weight_decay is inf"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRAPlusAdamW(adapted_model(), **{"lr": 1e-3, **arguments})


def test_what_it_refuses():
    with pytest.raises(ValueError, match="lr_ratio is 16.0 but the model has no trainable lora_b"):
        LoRAPlusAdamW(nn.Linear(2, 2), 1e-3)
    with pytest.raises(ValueError, match="no trainable parameters"):
        LoRAPlusAdamW(nn.Linear(2, 2).requires_grad_(False), 1e-3, lr_ratio=1)
    with pytest.raises(ValueError, match="parameters without names"):
        LoRAPlusAdamW(nn.Linear(2, 2).parameters(), 1e-3)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0, of shape \[3\], is torch.complex64"):
        LoRAPlusAdamW([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, dtype=torch.complex64))], 1e-3, 1)
    with pytest.raises(ValueError, match="is not contiguous"):
        LoRAPlusAdamW([nn.Parameter(torch.ones(3, 2).T)], 1e-3, 1)
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0, .* gradient that is a tensor of layout torch.sparse_coo"
    ):
        LoRAPlusAdamW(embedding, 1e-3, lr_ratio=1).step()
    params = make_params()
    state = torch.optim.AdamW(two_groups(params), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad is True"):
        ours_for(params).load_state_dict(state)
    param = nn.Parameter(torch.ones(3, dtype=FP64))
    param.grad = torch.ones_like(param)
    if cpu.unavailable is None:
        with pytest.raises(ValueError, match="torch.float64"), backends.use_backend("cpu"):
            LoRAPlusAdamW([param], 1e-3, 1).step()


@pytest.mark.skipif(triton_backend.unavailable is not None, reason=f"triton backend: {triton_backend.unavailable}")
def test_triton_needs_no_operator_of_torch_per_tensor(monkeypatch):
    from triton.runtime import interpreter

    launches = []
    original = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    params = make_params()
    set_gradients(params, gradients(params, 0))
    with backends.use_backend("triton"):
        ours_for(params).step()
        assert launches == ["_prepare_kernel", "_step_kernel"]
        launches.clear()
        ours_for(params, max_grad_norm=1.0).step()
    assert launches == ["_norm_kernel", "_prepare_kernel", "_step_kernel"]


@pytest.mark.parametrize("move", ["data", "shared"])
def test_state_that_has_moved(move):
    """Offloading gives a tensor other memory and leaves it the same object."""
    ours, theirs = (nn.Parameter(torch.ones(300, 30)) for _ in range(2))
    optimizer, other = ours_for([ours], [{"params": [ours]}]), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for step in range(4):
        ours.grad = torch.randn(300, 30, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        other.step()
        if step == 1:
            for t in optimizer.state[ours].values():
                if move == "data":
                    old, t.data = t.data, t.data.clone()
                    old.fill_(float("nan"))
                else:
                    t.share_memory_()
    torch.testing.assert_close(ours, theirs)
    square = nn.Parameter(torch.randn(4, 4))
    optimizer = ours_for([square], [{"params": [square]}])
    square.grad = torch.ones(4, 4)
    optimizer.step()
    square.data = square.data.t()
    with pytest.raises(ValueError, match="parameter 0 is torch.float32 with strides"):
        optimizer.step()
