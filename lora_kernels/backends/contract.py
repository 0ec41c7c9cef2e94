"""What a backend is: a module, or an object, with these names. `lora_kernels.reference` is one, and says what is meant.

Tensors of a call are on one device and `unwatched` (see `lora_kernels.backends`). Rows of x and dy have unit stride and
don't overlap, as have those of h, which may be another backend's; vectors are contiguous; a dense weight has unit
stride along either dimension. No size is 0 but a rank, that of a layer without an adapter. A backend raises for dtypes
and devices that it can't take; nothing falls back to another backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from lora_kernels.types import NF4, AdamWGroup, Dropout, Gradients, Layers, Needs, Outputs


class Backend(Protocol):
    """See above."""

    name: str
    # None, or why it can't run on this machine.
    unavailable: str | None
    # The most layers of one call of lora_linear.
    MAX_LAYERS: int

    def takes(self, x: Tensor) -> bool:
        """Whether lora_linear takes x of this dtype on this device."""

    def beats_torch(self, x: Tensor, weight: Tensor) -> bool:
        """Whether its product of x [M, K] with a dense frozen weight, by lora_linear of rank 0, is the faster one."""

    def lora_linear_fwd(self, x: Tensor, layers: Layers, dropout: Dropout | None) -> Outputs:
        """y and h of each layer, for x [M, K]. What is worth making once for these layers goes to `layers.prepared`."""

    def lora_linear_bwd(
        self,
        dys: Sequence[Tensor],
        x: Tensor,
        hs: Sequence[Tensor],
        layers: Layers,
        dropout: Dropout | None,
        needs: Needs,
    ) -> Gradients:
        """The gradients that `needs` asks for; `dys` are those of what column_scale multiplies. The values of x are
        only read for lora_a's."""

    def column_scale_bwd(
        self, dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of what column_scale multiplies and, where y is given, of column_scale."""

    def quantize_nf4(self, weight: Tensor, block_size: int, double_quant: bool) -> NF4: ...

    def dequantize_nf4(self, weight: NF4, out: Tensor) -> None: ...

    def adamw_step(
        self, groups: Sequence[AdamWGroup], max_grad_norm: float | None, cache: dict[str, Any]
    ) -> Tensor | None:
        """One step in place; the norm of all gradients where there is a largest one allowed."""
