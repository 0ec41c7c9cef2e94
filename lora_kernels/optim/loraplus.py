"""LoRA+ (Hayou, Ghosh & Yu 2024, 2402.12354): AdamW with a larger learning rate for lora_b, in one fused step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import backends, sharded
from lora_kernels.checks import check_number
from lora_kernels.ops.adamw import adamw_step
from lora_kernels.reference import widened
from lora_kernels.types import AdamWGroup

_LORA_B = ("lora_b", "lora_B")  # ours and PEFT's
_LORA_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_UNSUPPORTED = ("amsgrad", "maximize")


def _check_lr(name: str, value: Any) -> None:
    check_number(name, value, lambda v: 0 <= v < math.inf, "a finite number >= 0")


def loraplus_groups(
    model: nn.Module,
    lr: float,
    lr_ratio: float = 16.0,
    weight_decay: float = 0.0,
    lr_embedding: float | None = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups for LoRAPlusAdamW or any torch optimizer, of the parameters that require gradients.

    - lora_b matrices: lr · lr_ratio.
    - Embeddings and their adapters: lr_embedding, or lr where that is None. 1e-6 is the paper's code's.
    - Everything else, such as lora_a and a trained score head: lr.
    - Vectors (biases, norms, DoRA's magnitudes) among them: lr, and no weight decay.

    The names lora_b and PEFT's lora_B are known. lr_ratio 1 is plain AdamW. Empty groups are left out.

    Raises ValueError for an argument out of range, for a model without trainable parameters, and for lr_ratio > 1 on
    a model without trainable lora_b.
    """
    _check_lr("lr", lr)
    check_number("lr_ratio", lr_ratio, lambda v: 1 <= v < math.inf, "a finite number >= 1")
    if lr_embedding is not None:
        _check_lr("lr_embedding", lr_embedding)
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    embedding_parameters = {id(p) for name in embeddings for p in model.get_submodule(name).parameters()}

    groups: dict[str, dict[str, Any]] = {
        "base": {"lr": lr, "weight_decay": weight_decay},
        "lora_b": {"lr": lr * lr_ratio, "weight_decay": weight_decay},
        "embedding": {"lr": lr if lr_embedding is None else lr_embedding, "weight_decay": weight_decay},
        "vectors": {"lr": lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        if id(parameter) in embedding_parameters or any(part in _LORA_EMBEDDING for part in parts):
            kind = "embedding"
        elif any(part in _LORA_B for part in parts) and parameter.ndim >= 2:
            kind = "lora_b"
        else:
            kind = "base" if parameter.ndim >= 2 else "vectors"
        groups[kind].setdefault("params", []).append(parameter)
    chosen = [group for group in groups.values() if "params" in group]
    if not chosen:
        raise ValueError("the model has no trainable parameters; inject adapters first")
    if lr_ratio != 1 and "params" not in groups["lora_b"]:
        raise ValueError(f"lr_ratio is {lr_ratio} but the model has no trainable lora_b; allowed here: 1")
    return chosen


def _unfit(parameter: Tensor) -> str | None:
    """What is wrong with a parameter that no step can be taken on, None where one can."""
    if not parameter.is_floating_point():
        return f"{parameter.dtype}; allowed: a floating-point dtype"
    if sharded.is_sharded(parameter) and any(placement.is_partial() for placement in parameter.placements):
        return f"a DTensor placed as {parameter.placements}, a sum that is still to be made; allowed: Shard, Replicate"
    part = sharded.local(parameter)
    if part.is_meta or not backends.is_memory(part):
        kind = "on meta" if part.is_meta else backends.kind_of(part)
        return f"{kind}; allowed: dense tensors in memory, and DTensors of such"
    return None if part.is_contiguous() else f"not contiguous; its strides are {part.stride()}"


class LoRAPlusAdamW(torch.optim.AdamW):
    """AdamW in one fused step over all tensors, with LoRA+'s learning rates and clipping by the global norm inside.

    The formula is `lora_kernels.reference.adamw_step`, that of clip_grad_norm_ followed by torch.optim.AdamW, but the
    gradients themselves stay as they are. The state dict is torch.optim.AdamW's: each loads the other's.

    Args:
        model_or_groups: a model, grouped by `loraplus_groups`; or parameters or groups as for any torch optimizer,
            with learning rates of their own, and lr_ratio 1.
        lr: >= 0. A scheduler changes the lr of each group alike, so their ratio stays.
        lr_ratio: >= 1, of lora_b's learning rate to lr; the paper advises 16, with a smaller lr than LoRA's. 1 is plain
            AdamW.
        betas, eps, weight_decay: as in torch.optim.AdamW. Vectors of a model are never decayed.
        lr_embedding: of a model's embeddings; None: lr.
        max_grad_norm: > 0, clip the norm of all gradients together to this; math.inf only measures; None does neither.

    Attributes: grad_norm, the norm in the last step before clipping: a scalar tensor, None without max_grad_norm.
    A step whose norm is not finite leaves parameters and state as they were; look at grad_norm to notice.

    State is float32, also of float16 and bfloat16 parameters, which moreover get a float32 master copy (state
    "master"): in their own 8 or 11 bits most updates would be rounded away. A value that somebody writes to such a
    parameter between steps is noticed and used. Parameters without gradient are skipped. All parameters must be on one
    device.

    A DTensor (FSDP2, tensor parallelism) is stepped where its parts are, and its state is made of DTensors; the norm is
    that of all processes together.

    Raises ValueError naming the argument that is out of range, or the parameter that is complex, not contiguous or no
    dense tensor in memory (on meta, a subclass other than DTensor), and in `step` for a sparse gradient.
    """

    grad_norm: Tensor | None

    def __init__(
        self,
        model_or_groups: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        lr_ratio: float = 16.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_embedding: float | None = 1e-6,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_lr("lr", lr)
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, lambda v: v > 0, "a number > 0, or None")
        groups: Iterable[Any]
        if isinstance(model_or_groups, nn.Module):
            groups = loraplus_groups(model_or_groups, lr, lr_ratio, weight_decay, lr_embedding)
        elif lr_ratio != 1:
            raise ValueError(
                f"lr_ratio is {lr_ratio!r}, but parameters without names can't be told apart; allowed: 1, or pass the "
                "model instead, or what loraplus_groups makes of it"
            )
        else:
            groups = model_or_groups
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.max_grad_norm = max_grad_norm
        self.grad_norm = None
        self._cache: dict[str, Any] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            _check_lr(name, group[name])
        for beta in group["betas"]:
            check_number("betas", beta, lambda v: 0 <= v < 1, "two numbers in [0, 1)")
        self._refuse_options([group])
        for index, parameter in enumerate(group["params"]):
            if problem := _unfit(parameter):
                raise ValueError(f"{self._name(group, index)} is {problem}")

    def _name(self, group: dict[str, Any], index: int) -> str:
        where = next(i for i, other in enumerate(self.param_groups) if other is group)
        parameter = group["params"][index]
        # A nested tensor has none.
        shape = "" if parameter.is_nested else f", of shape {list(parameter.shape)},"
        return f"parameter {index} of group {where}{shape}"

    @staticmethod
    def _refuse_options(groups: Iterable[dict[str, Any]]) -> None:
        for option in _UNSUPPORTED:
            if any(group.get(option) for group in groups):
                raise ValueError(f"{option} is True; LoRAPlusAdamW does not have it, allowed: False")

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        for name in _MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=dtype)
        if parameter.dtype not in (torch.float32, torch.float64):
            state["master"] = parameter.detach().float()
        return state

    def _tensors(self, group: dict[str, Any]) -> AdamWGroup:
        """The group's tensors that have a gradient, of DTensors the parts in this process, and its settings."""
        # Column by column: with hundreds of small tensors, Python's time counts.
        pairs = [(parameter, grad) for parameter in group["params"] if (grad := parameter.grad) is not None]
        params, grads = map(list, zip(*pairs, strict=True)) if pairs else ([], [])
        for index, (parameter, grad) in enumerate(pairs):
            plain = type(grad) is Tensor and grad.layout is torch.strided and not grad.is_neg()
            if not plain or sharded.is_sharded(parameter):
                grads[index] = grad = self._local_grad(group, parameter, grad)
            if not grad.is_contiguous():
                grads[index] = grad.contiguous()
        states = [self.state[parameter] for parameter in params]
        for parameter, state in zip(params, states, strict=True):
            if not state:
                state.update(self._new_state(parameter))
        columns = [[state[name] for state in states] for name in (*_MOMENTS, "step")]
        masters = [state.get("master") for state in states]
        if any(map(sharded.is_sharded, params)):
            params, masters, *columns = (list(map(sharded.local, column)) for column in (params, masters, *columns))
        (exp_avgs, exp_avg_sqs, steps), (beta1, beta2) = columns, group["betas"]
        return AdamWGroup(params, grads, exp_avgs, exp_avg_sqs, steps, masters, group["lr"], beta1, beta2, group["eps"],
                          group["weight_decay"])  # fmt: skip

    def _local_grad(self, group: dict[str, Any], parameter: Tensor, grad: Tensor) -> Tensor:
        """The gradient as the backends read it, the part that belongs to the parameter's where that is a DTensor."""
        if sharded.is_sharded(parameter) and sharded.is_sharded(grad) and grad.device_mesh == parameter.device_mesh:
            grad = sharded.local(grad.redistribute(placements=parameter.placements))
        grad = grad.resolve_neg() if grad.layout is torch.strided else grad
        if not backends.is_memory(grad) or grad.shape != sharded.local(parameter).shape:
            where = next(i for i, other in enumerate(group["params"]) if other is parameter)
            raise ValueError(
                f"{self._name(group, where)} has a gradient that is {backends.kind_of(grad)}; allowed: a dense tensor "
                "in memory, for a DTensor a DTensor on the same mesh"
            )
        return grad

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, which computes the loss and its gradients again, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [self._tensors(group) for group in self.param_groups]
        if not any(group.params for group in groups):
            return loss
        owners = [
            parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None
        ]
        distributed = [parameter for parameter in owners if sharded.is_sharded(parameter)]
        max_grad_norm = self.max_grad_norm
        if distributed and max_grad_norm is not None:
            # A backend would measure the parts in this process alone.
            self.grad_norm = sharded.norm(owners, [grad for group in groups for grad in group.grads])
            if not torch.isfinite(self.grad_norm):
                return loss
            clip = (max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1)
            # In 16 bits the clipped gradients would be rounded.
            groups = [group._replace(grads=[clip * widened(grad) for grad in group.grads]) for group in groups]
            max_grad_norm = None
        norm = adamw_step(groups, max_grad_norm, self._cache)
        if not distributed:
            self.grad_norm = norm
        # Of the parameters themselves, whose parts the op was given.
        for parameter in distributed:
            torch.autograd.graph.increment_version(parameter)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a LoRAPlusAdamW or a torch.optim.AdamW over the same groups of parameters.

        Raises ValueError where the groups differ or the state was made with amsgrad or maximize.
        """
        self._refuse_options(state_dict["param_groups"])
        super().load_state_dict(state_dict)
        # torch has cast the state to the dtype of its parameter.
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        for index, parameter in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            if index in state_dict["state"]:
                source, state = state_dict["state"][index], self._new_state(parameter)
                for name, fresh in state.items():
                    if name in source:
                        sharded.fill(fresh, torch.as_tensor(source[name]))
                self.state[parameter] = state

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {"max_grad_norm": self.max_grad_norm, "grad_norm": self.grad_norm, "_cache": {}}
        return {**super().__getstate__(), **own}
