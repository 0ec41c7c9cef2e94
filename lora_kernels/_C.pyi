"""What csrc/bindings.cpp defines: the CPU kernels, and launches of what Triton compiled."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

BFLOAT16: int
FEW_ROWS: int
FLOAT16: int
FLOAT32: int
MAX_LAYERS: int

def isa_supported() -> list[str]: ...
def get_isa() -> str: ...
def set_isa(name: str) -> None: ...
def spare_threads(enabled: bool) -> None: ...
def take_most_threads() -> int: ...
def take_large_results_from(new: Callable[..., Tensor], bytes: int) -> None: ...

class Places:
    def __init__(self, tensors: tuple[Tensor | None, ...], x: Tensor) -> None: ...
    def hold(self, tensors: tuple[Tensor | None, ...], x: Tensor | None) -> bool: ...

class TritonLaunches:
    def __init__(self, library: str) -> None: ...
    def launch(
        self,
        kernel: object,
        device: int,
        stream: int,
        grid: tuple[int, int, int],
        args: tuple[Any, ...],
        constants: dict[str, Any],
        /,
    ) -> bool: ...
    def keep(
        self,
        kernel: object,
        device: int,
        args: tuple[Any, ...],
        constants: dict[str, Any],
        compiled: object,
        function: int,
        num_warps: int,
        shared_bytes: int,
        overlaps: bool,
        nulls: int,
        arguments: list[Any],
    ) -> None: ...

class Weight:
    @staticmethod
    def nf4(
        packed: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        block_size: int,
        shape: Sequence[int],
        absmax_code: Tensor,
        /,
    ) -> Weight: ...
    @staticmethod
    def dense(weight: Tensor, /) -> Weight: ...

class Layer:
    def __init__(
        self,
        weight: Weight,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        bias: Tensor | None,
        lora_e: Tensor | None,
        column_scale: Tensor | None,
        /,
    ) -> None: ...

def layers_forward(
    layers: Sequence[Layer],
    x: Tensor,
    in_bfloat16: bool,
    rng: Tensor | None,
    threshold: int,
    num_threads: int,
    /,
) -> tuple[list[Tensor], list[Tensor]]: ...
def layers_backward(
    layers: Sequence[Layer],
    dy: Sequence[Tensor],
    h: Sequence[Tensor],
    x: Tensor,
    need_x: bool,
    needs: Sequence[Sequence[bool]],
    in_bfloat16: bool,
    rng: Tensor | None,
    threshold: int,
    num_threads: int,
    /,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None, Tensor | None]]]: ...
def product(
    *,
    terms: Sequence[tuple[Weight, Tensor, float]],
    transposed: bool,
    column_scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    num_threads: int,
) -> None: ...
def column_scale_bwd(
    *,
    dy: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    column_scale: Tensor,
    dz: Tensor,
    total: Tensor | None,
    num_threads: int,
) -> None: ...
def nf4_quantize(*, weight: Tensor, block_size: int, packed: Tensor, absmax: Tensor, num_threads: int) -> None: ...
def nf4_quantize_absmax(
    *,
    absmax: Tensor,
    absmax_offset: float,
    absmax_code: Tensor,
    codes: Tensor,
    absmax_scale: Tensor,
    num_threads: int,
) -> None: ...
def nf4_dequantize(
    *,
    weight: Weight,
    row_first: int,
    row_last: int,
    col_first: int,
    col_last: int,
    out: Tensor,
    num_threads: int,
) -> None: ...
def rms_norm_fwd(
    *, x: Tensor, weight: Tensor, eps: float, offset: float, y: Tensor, rstd: Tensor, num_threads: int
) -> None: ...
def rms_norm_bwd(
    *, dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float, dx: Tensor, num_threads: int
) -> None: ...
def swiglu_fwd(*, gate: Tensor, up: Tensor, y: Tensor, num_threads: int) -> None: ...
def swiglu_bwd(*, dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, num_threads: int) -> None: ...
def rotary(*, x: Tensor, cos: Tensor, sin: Tensor, transposed: bool, y: Tensor, num_threads: int) -> None: ...
def cross_entropy(
    *, logits: Tensor, target: Tensor, scale: float, with_gradient: bool, nll: Tensor, num_threads: int
) -> None: ...
def attention_fwd(
    *, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, num_threads: int
) -> None: ...
def attention_bwd(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    lse: Tensor,
    scale: float,
    num_threads: int,
) -> None: ...
def adamw_step(
    *,
    param: Sequence[int],
    grad: Sequence[Tensor],
    exp_avg: Sequence[int],
    exp_avg_sq: Sequence[int],
    step: Sequence[int],
    master: Sequence[int],
    numel: Sequence[int],
    param_dtype: Sequence[int],
    group: Sequence[int],
    settings: Sequence[Sequence[float]],
    max_grad_norm: float,
    grad_norm: Tensor | None,
    num_threads: int,
) -> None: ...
