"""NF4Linear: a frozen linear layer whose weight is stored in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_kernels.ops.frozen_linear import frozen_layers, frozen_linear
from lora_kernels.ops.lora_linear import project
from lora_kernels.ops.nf4 import NF4Weight, load_packed, quantize_nf4
from lora_kernels.types import Layers


class NF4Linear(nn.Module):
    """y = x Wᵀ + bias with W [N, K] in NF4 (Dettmers et al. 2023), decoded as in `lora_linear`; differentiable in x.

    weight: an NF4Weight, see `quantize_nf4`. bias: [N] or None, frozen. Input x [..., K], output y [..., N] in the
    dtype of x. The state dict is that of bitsandbytes' Linear4bit.
    """

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = None if bias is None else bias.requires_grad_(False)
        self._kept: Layers | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = False) -> NF4Linear:
        """An NF4 copy of `linear`, which shares its bias. Raises as `quantize_nf4`."""
        weight = quantize_nf4(linear.weight.detach(), block_size, double_quant)
        return cls(weight, linear.bias).train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear with the dequantised weight, new and frozen, and this layer's bias."""
        linear: Any = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.dequantize(), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # It would hold the tensors that are moved.
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # What is kept is of these tensors in this process.
        return {**self.__dict__, "_kept": None}

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        # Not self._kept: nn.Module's __setattr__ would take longer than the rest.
        layers = self.__dict__["_kept"] = frozen_layers(x, weight, bias, self._kept)
        return frozen_linear(x, weight, bias) if layers is None else project(x, layers, 0.0)[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_packed(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
