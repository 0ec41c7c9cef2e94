"""AdaLoRA (Zhang et al. 2023, 2303.10512): LoRA whose ranks move, while it trains, to the matrices that need them.

The update is scaling · P Λ Q with P = lora_b [N, R], Λ = diag(lora_e) [R], Q = lora_a [R, K]. Training starts with more
ranks than wanted; a RankAllocator scores them and zeroes the lora_e of the least important ones, and at the end of its
schedule the tensors are really cut. A training loop does it with a TrainingHook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.checks import check_integer, check_number
from lora_kernels.methods import lora
from lora_kernels.methods.lora import ALL_LINEAR, LoRAConfig, lora_modules
from lora_kernels.nn.lora_linear import RANK_DIMENSION, FusedLoRALinear
from lora_kernels.nn.wrappers import bare
from lora_kernels.sharded import is_sharded

_STD = 0.02


@dataclass
class AdaLoRAConfig:
    """What `inject` does, and how the ranks are then allocated.

    Args:
        init_r: rank of each matrix at the start, >= 1. The paper takes 1.5 · target_r.
        target_r: average rank at the end, 1 <= target_r <= init_r.
        tinit: steps at the start in which no rank is taken away.
        tfinal: steps at the end in which the ranks no longer change and the tensors are cut.
        delta_t: steps between two allocations, >= 1.
        beta1, beta2: of the moving averages of importance and of its uncertainty, in (0, 1).
        orth_reg_weight: of the term that keeps lora_a and lora_b near orthogonal, >= 0; see `orthogonality`.
        lora_alpha: > 0; scaling = lora_alpha / (init_r + 1e-5), as in the paper's code and in PEFT. It stays when
            ranks go.
        lora_dropout, target_modules, modules_to_save, exclude_modules: as in LoRAConfig.
        total_step: steps of the whole training. None leaves it to the trainer, which knows.

    Raises ValueError naming the argument that is out of range.
    """

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    modules_to_save: Sequence[str] | None = None
    exclude_modules: str | Sequence[str] = ()
    total_step: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("init_r", 1), ("target_r", 1), ("tinit", 0), ("tfinal", 0), ("delta_t", 1)):
            check_integer(name, getattr(self, name), least)
        if self.target_r > self.init_r:
            raise ValueError(f"target_r is {self.target_r}; allowed: at most init_r, which is {self.init_r}")
        for name in ("beta1", "beta2"):
            check_number(name, getattr(self, name), lambda beta: 0 < beta < 1, "0 < beta < 1")
        check_number("orth_reg_weight", self.orth_reg_weight, lambda w: 0 <= w < math.inf, "a finite number >= 0")
        if self.total_step is not None:
            check_schedule(self, self.total_step)
        checked = self.lora_config()
        for name in ("target_modules", "modules_to_save", "exclude_modules"):
            setattr(self, name, getattr(checked, name))

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.init_r + 1e-5)

    def lora_config(self) -> LoRAConfig:
        """The LoRA adapters that AdaLoRA's start as, but for lora_e and the values."""
        names = ("lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "exclude_modules")
        return LoRAConfig(r=self.init_r, init="both_zero", **{name: getattr(self, name) for name in names})


def check_schedule(config: AdaLoRAConfig, total_step: int) -> None:
    """ValueError unless there is a step between tinit and the last tfinal ones."""
    check_integer("total_step", total_step, 1)
    if config.tinit >= total_step - config.tfinal:
        raise ValueError(
            f"tinit is {config.tinit} and tfinal {config.tfinal}, which leaves no step of the {total_step} to take "
            f"ranks away; allowed: tinit + tfinal < {total_step}"
        )


def inject(model: nn.Module, config: AdaLoRAConfig, tokenizer: Any = None, from_file: bool = False) -> nn.Module:
    """Puts AdaLoRA adapters into `model`, in place, and freezes everything else but the modules_to_save.

    As `lora.inject`, with lora_e [init_r] zero and lora_a and lora_b normal with standard deviation 0.02: training
    starts at the base model. Returns the model. Raises ValueError, with the model unchanged, as `lora.inject`.
    """
    lora.inject(model, config.lora_config(), from_file=from_file)
    for _, layer in lora_modules(model):
        layer.lora_e = nn.Parameter(layer.lora_a.new_zeros(config.init_r))
        layer.scaling = config.scaling
        nn.init.normal_(layer.lora_a, std=_STD)
        nn.init.normal_(layer.lora_b, std=_STD)
    bare(model).adapter_config = config
    return model


merge = lora.merge
adapters_disabled = lora.adapters_disabled


def orthogonality(model: nn.Module) -> Tensor:
    """Mean over all lora_a and lora_b of ‖lora_a lora_aᵀ - I‖ and ‖lora_bᵀ lora_b - I‖, Frobenius; differentiable.

    The paper's R(P, Q) (equation 4) as its code has it: not squared, averaged over the matrices. A matrix without
    ranks does not count. ValueError for a model that fully_shard or tensor parallelism has distributed.
    """
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    layers = dict(lora_modules(model))
    _check_whole(layers)
    for layer in layers.values():
        if layer.r:
            by_shape.setdefault(tuple(layer.lora_a.shape), []).append(layer.lora_a)
            by_shape.setdefault(tuple(layer.lora_b.shape[::-1]), []).append(layer.lora_b.t())
    norms = []
    for (r, _), matrices in by_shape.items():
        rows = torch.stack(matrices)
        eye = torch.eye(r, dtype=rows.dtype, device=rows.device)
        norms.append(torch.linalg.matrix_norm(rows @ rows.mT - eye))
    return torch.cat(norms).mean() if norms else torch.zeros(())


class Triplets(NamedTuple):
    """The tensors of one adapter, or what belongs to them element by element."""

    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    lora_e: Tensor  # [R]


class RankAllocator:
    """Which ranks stay: the paper's budget schedule and scores (section 3.2 and 3.3), apart from any model.

    With I = |w · dL/dw| of each element of lora_a, lora_b and lora_e, moving averages from zero
    Ī = beta1 · Ī + (1 - beta1) · I and U = beta2 · U + (1 - beta2) · |I - Ī|, and s = Ī · U, rank i of a matrix scores

        S_i = s(lora_e_i) + mean_k s(lora_a_ik) + mean_n s(lora_b_ni)

    The budget b(t) of ranks over all matrices is b0 = Σ init_r up to step tinit, bT = target_r · matrices from step
    T - tfinal, and ⌊bT + (b0 - bT) · (1 - (t - tinit) / (T - tfinal - tinit))³⌋ between. In each delta_t-th of the
    steps between, the b(t) best ranks are kept and lora_e of the others is set to zero; they go on training and may
    come back. From step T - tfinal the choice is final.

    Args:
        config: AdaLoRAConfig.
        ranks: {name: rank at the start} of the matrices.
        total_step: T.

    Attributes: `kept`, the number of ranks that the last allocation left, and `masks`, {name: bool [R]} of that
    allocation, empty before the first one.

    Raises ValueError if tinit and tfinal leave no step between them.
    """

    def __init__(self, config: AdaLoRAConfig, ranks: Mapping[str, int], total_step: int) -> None:
        check_schedule(config, total_step)
        self.config, self.ranks, self.total_step = config, dict(ranks), total_step
        self.initial = self.kept = sum(ranks.values())
        self.target = config.target_r * len(ranks)
        self.last_step = total_step - config.tfinal
        self.masks: dict[str, Tensor] = {}
        self.importance: list[Tensor] = []
        self.uncertainty: list[Tensor] = []

    def budget(self, step: int) -> int:
        """b(step), steps counted from 1."""
        if step <= self.config.tinit:
            return self.initial
        if step >= self.last_step:
            return self.target
        left = 1 - (step - self.config.tinit) / (self.last_step - self.config.tinit)
        return int(self.target + (self.initial - self.target) * left**3)

    @torch.no_grad()
    def allocate(self, step: int, weights: Mapping[str, Triplets], grads: Mapping[str, Triplets]) -> None:
        """What step `step`, counted from 1, changes: the scores, `masks`, and the values of lora_e in `weights`.

        To be called after each optimizer step with the new weights and the gradients that the step used.
        """
        # The second part: a schedule of one step, which has to choose by what that step tells.
        if step < self.last_step or not (self.importance or self.masks):
            self._update_scores(weights, grads)
        between = self.config.tinit < step < self.last_step and step % self.config.delta_t == 0
        if between or step == self.last_step:
            self._choose(self.budget(step))
        if step == self.last_step:
            self.importance, self.uncertainty = [], []
        if between or step >= self.last_step:
            for name in self.ranks:
                weights[name].lora_e.masked_fill_(~self.masks[name], 0)

    def _update_scores(self, weights: Mapping[str, Triplets], grads: Mapping[str, Triplets]) -> None:
        elements = [weight for name in self.ranks for weight in weights[name]]
        slopes = [grad for name in self.ranks for grad in grads[name]]
        if not self.importance:
            self.importance = [torch.zeros_like(weight) for weight in elements]
            self.uncertainty = [torch.zeros_like(weight) for weight in elements]
        sensitivity = torch._foreach_mul(elements, slopes)
        torch._foreach_abs_(sensitivity)
        torch._foreach_lerp_(self.importance, sensitivity, 1 - self.config.beta1)
        torch._foreach_sub_(sensitivity, self.importance)
        torch._foreach_abs_(sensitivity)
        torch._foreach_lerp_(self.uncertainty, sensitivity, 1 - self.config.beta2)

    def scores(self) -> dict[str, Tensor]:
        """{name: S [R]}. Empty before the first step and after the last allocation."""
        elements = iter(torch._foreach_mul(self.importance, self.uncertainty) if self.importance else ())
        # zip takes three tensors at a time from the one iterator.
        triplets = zip(elements, elements, elements, strict=True)
        return {
            name: e + a.mean(1) + b.mean(0)
            for name, (a, b, e) in zip(self.ranks, triplets, strict=bool(self.importance))
        }

    def _choose(self, budget: int) -> None:
        scores = torch.cat(list(self.scores().values()))
        # Of equal scores the earlier ranks win, so that exactly the budget is kept.
        best = scores.argsort(descending=True, stable=True)[:budget]
        mask = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)
        self.masks = dict(zip(self.ranks, mask.split(list(self.ranks.values())), strict=True))
        self.kept = budget

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, as tensors by name."""
        state = {"kept": torch.tensor(self.kept)}
        fields = [f"{name}/{field}" for name in self.ranks for field in Triplets._fields]
        for kind, tensors in (("importance", self.importance), ("uncertainty", self.uncertainty)):
            state |= {f"{kind}/{field}": tensor for field, tensor in zip(fields, tensors, strict=bool(tensors))}
        # Masks are parts of one tensor, which safetensors would not write.
        return state | {f"mask/{name}": mask.clone() for name, mask in self.masks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to what `state_dict` returned. ValueError if that belongs to other matrices."""
        fields = [f"{name}/{field}" for name in self.ranks for field in Triplets._fields]
        known = {"kept", *(f"mask/{name}" for name in self.ranks)}
        known |= {f"{kind}/{field}" for kind in ("importance", "uncertainty") for field in fields}
        if "kept" not in state or not state.keys() <= known:
            raise ValueError(f"state belongs to other matrices than {', '.join(self.ranks)}")
        self.kept = int(state["kept"])
        scored = f"importance/{fields[0]}" in state
        self.importance = [state[f"importance/{field}"] for field in fields] if scored else []
        self.uncertainty = [state[f"uncertainty/{field}"] for field in fields] if scored else []
        self.masks = {name: state[f"mask/{name}"] for name in self.ranks if f"mask/{name}" in state}


class TrainingHook:
    """AdaLoRA's part in each step of a training loop:

        (loss + hook.extra_loss()).backward()
        optimizer.step()
        hook.after_step(optimizer, step)      # step counts from 1
        optimizer.zero_grad()

    Args:
        model: what `inject` was applied to.
        total_step: steps of the whole training; config.total_step, if given, has to be the same.

    Raises ValueError if the config's tinit and tfinal don't fit total_step, if the ranks have been cut already, or, in
    the other functions too, if fully_shard or tensor parallelism has distributed the model.
    """

    def __init__(self, model: nn.Module, total_step: int) -> None:
        model = bare(model)
        config = model.adapter_config
        if config.total_step not in (None, total_step):
            raise ValueError(f"total_step is {config.total_step} in the config; this training has {total_step} steps")
        self.layers: dict[str, FusedLoRALinear] = dict(lora_modules(model))
        _check_whole(self.layers)
        cut = next((name for name, layer in self.layers.items() if layer.r != config.init_r), None)
        if cut is not None:
            raise ValueError(
                f"{cut} has rank {self.layers[cut].r} and init_r is {config.init_r}: its ranks have been allocated; "
                "to train such an adapter on, save it as LoRA"
            )
        self.allocator = RankAllocator(config, {name: layer.r for name, layer in self.layers.items()}, total_step)
        model.adapter_config = replace(config, total_step=total_step)
        self.model, self.step = model, 0
        self.orth_reg_weight = config.orth_reg_weight

    def extra_loss(self) -> Tensor:
        """orth_reg_weight · orthogonality(model), to be added once to the loss of each step."""
        return self.orth_reg_weight * orthogonality(self.model) if self.orth_reg_weight else torch.zeros(())

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> bool:
        """Allocates the ranks after the optimizer step `step`, and cuts them in step total_step - tfinal.

        Returns whether it has cut. Then the adapters are new, smaller parameters, in `optimizer` too with their part of
        its state, and a wrapper such as DistributedDataParallel has to be made anew.
        """
        _check_whole(self.layers)
        self.step = step
        if step > self.allocator.last_step:
            return False
        weights = {name: triplets(layer) for name, layer in self.layers.items()}
        factor = _clip_factor(optimizer)
        grads = {
            name: Triplets(*(torch.zeros_like(p) if p.grad is None or not factor else p.grad * factor for p in each))
            for name, each in weights.items()
        }
        self.allocator.allocate(step, weights, grads)
        if step == self.allocator.last_step:
            self._cut(optimizer)
            return True
        return False

    def _cut(self, optimizer: torch.optim.Optimizer) -> None:
        for name, layer in self.layers.items():
            index = self.allocator.masks[name].nonzero().flatten().to(layer.lora_a.device)
            old = triplets(layer)
            layer.keep_ranks(index)
            for before, after, dimension in zip(old, triplets(layer), RANK_DIMENSION.values(), strict=True):
                _replace_parameter(optimizer, before, after, dimension, index)

    def metrics(self) -> dict[str, float]:
        """What a record of the last step tells: the budget, and the average rank that the last allocation left."""
        average = self.allocator.kept / len(self.layers)
        return {"budget": self.allocator.budget(self.step), "average_rank": round(average, 4)}

    def ranks(self) -> dict[str, int]:
        """{path: rank} of the adapters as they are."""
        return {name: layer.r for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The allocator's state, for a checkpoint."""
        return self.allocator.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> bool:
        """Goes back to the state after `step`; returns, as after_step, whether that meant to cut the ranks."""
        _check_whole(self.layers)
        device = next(iter(self.layers.values())).lora_a.device
        self.allocator.load_state_dict({name: tensor.to(device) for name, tensor in state.items()})
        self.step = step
        if step < self.allocator.last_step:
            return False
        self._cut(optimizer)
        return True


def _clip_factor(optimizer: torch.optim.Optimizer) -> float:
    """What the last step multiplied the gradients by: LoRAPlusAdamW clips, and leaves `grad` as it was. 0 where their
    norm was not finite, since that step changed nothing."""
    norm, largest = getattr(optimizer, "grad_norm", None), getattr(optimizer, "max_grad_norm", None)
    if norm is None or largest is None:
        return 1.0
    norm = float(norm)
    return min(1.0, largest / (norm + 1e-6)) if math.isfinite(norm) else 0.0


def _check_whole(layers: Mapping[str, FusedLoRALinear]) -> None:
    for name, layer in layers.items():
        for field, tensor in zip(Triplets._fields, triplets(layer), strict=True):
            if is_sharded(tensor):
                raise ValueError(
                    f"{field} of {name} is a DTensor, as fully_shard and tensor parallelism make them; AdaLoRA cuts "
                    "ranks away while it trains, and what distributed the model would not know the smaller parameters; "
                    "allowed: a model that is whole in each process (DistributedDataParallel), or LoRA in its place"
                )


def triplets(layer: FusedLoRALinear) -> Triplets:
    """The adapter of a layer. ValueError for one that is not AdaLoRA's."""
    if layer.lora_e is None:
        raise ValueError(f"{layer} has no lora_e; allowed: the layers that AdaLoRA's inject makes")
    return Triplets(layer.lora_a, layer.lora_b, layer.lora_e)


def _replace_parameter(
    optimizer: torch.optim.Optimizer, before: Tensor, after: Tensor, dimension: int, index: Tensor
) -> None:
    """Puts `after`, the part `index` of `before`, in its place with that part of its state; leaves it out if empty."""
    state = optimizer.state.pop(before, None)
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter is before:
                group["params"][place : place + 1] = [after] if after.numel() else []
                break
    if state and after.numel():
        optimizer.state[after] = {
            key: value.index_select(dimension, index)
            if isinstance(value, Tensor) and value.shape == before.shape
            else value
            for key, value in state.items()
        }


def training_hook(model: nn.Module, total_step: int) -> TrainingHook:
    """What a training of `total_step` steps has to call; see TrainingHook."""
    return TrainingHook(model, total_step)
