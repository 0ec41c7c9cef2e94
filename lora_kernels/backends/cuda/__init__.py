"""The CUDA C++ backend: NVIDIA GPUs from compute capability 8.0, without torch's or Triton's compilers.

The same kernels, compiled as host code, run on CPU tensors in `lora_kernels.backends.cuda.emulated`. Nothing is
synchronised: kernels are queued on the current stream of the tensors' device. Shapes, dtypes and semantics are those of
`lora_kernels.reference`; activations are bfloat16 or float16, which is what tensor cores multiply.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends.addresses import addresses
from lora_kernels.backends.contract import Backend
from lora_kernels.backends.parts import ceil_div, in_parts
from lora_kernels.reference import (
    ABSMAX_BLOCK,
    dropout_scale,
    dropout_threshold,
    dynamic_code,
)
from lora_kernels.types import (
    NF4,
    AdamWGroup,
    AdapterGradients,
    AdapterNeeds,
    Dropout,
    Gradients,
    Layers,
    Needs,
    Outputs,
    Projection,
)

# What a kernel takes as memory: a tensor, or a part of one, as (tensor, first byte, bytes).
Memory = Tensor | tuple[Tensor, int, int] | None
# The name of a kernel, and its arguments by name: numbers and memory.
_Launch = tuple[str, dict[str, Any]]


class _RankParts(NamedTuple):
    """h, or dh, as a product takes it: `parts` [splits, M, R] float32, which it adds up and keeps in `kept` [M, R]
    unless that is None; just_queued: lora_h makes them just before."""

    parts: Memory
    splits: int = 1
    kept: Tensor | None = None
    just_queued: bool = False

    def arguments(self) -> dict[str, Any]:
        return {"u_parts": self.parts, "splits": self.splits, "u": self.kept, "just_queued": self.just_queued}


ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)


# From how many columns of x on h is made in parts.
_COLUMNS_WORTH_PARTS = 2048


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    return dynamic_code().to(device)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


class Kernels:
    """The backend's functions over one extension module: `_cuda`, or `_simt` for the emulator.

    `unavailable` is None when the kernels can run on this machine, else the reason why not; `built_where` is its hint
    where the extension is missing.
    """

    name = "cuda"
    MAX_LAYERS = sys.maxsize
    if TYPE_CHECKING:
        from lora_kernels import _cuda as _extension

    def __init__(self, extension: str, device_type: str, built_where: str) -> None:
        self.device_type = device_type
        self.unavailable: str | None = None
        try:
            self._extension = importlib.import_module(f"lora_kernels.{extension}")
        except ImportError as error:
            self.unavailable = f"the extension lora_kernels.{extension} can't be imported ({error}); {built_where}"
            return
        self._dtypes = {
            torch.float32: self._extension.FLOAT32,
            torch.bfloat16: self._extension.BFLOAT16,
            torch.float16: self._extension.FLOAT16,
        }
        if device_type == "cuda":
            self.unavailable = self._unusable_gpu()

    def _unusable_gpu(self) -> str | None:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            return f"torch sees no CUDA GPU ({self._extension.device_error() or 'no device is visible'})"
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            if gpu.major < 8:
                return f"GPU {index} is a {gpu.name} (sm_{gpu.major}{gpu.minor}); sm_80 and newer are supported"
        return None

    def _check_device(self, name: str, t: Tensor) -> None:
        if self.unavailable is not None:
            raise RuntimeError(f"the CUDA C++ kernels can't run here: {self.unavailable}")
        if t.device.type != self.device_type:
            raise ValueError(f"{name} is on {t.device}: this backend takes tensors on {self.device_type} only")

    def _check(self, x: Tensor, **adapters: Tensor | None) -> None:
        self._check_device("x", x)
        if x.dtype not in ACTIVATION_DTYPES:
            raise ValueError(
                f"x is {x.dtype}: the CUDA C++ kernels take bfloat16 and float16; for float32 use the triton backend"
            )
        for name, adapter in adapters.items():
            if adapter is not None and adapter.dtype not in (torch.float32, x.dtype):
                raise ValueError(f"{name} is {adapter.dtype}; allowed: torch.float32 and x's {x.dtype}")

    def _queue(self, on: Tensor, *launches: _Launch, through: Sequence[Tensor] = ()) -> None:
        """Queue kernels, one after the other, on the current stream of the device of `on`; `through` is what they reach
        by way of a table.

        The launches keep their tensors alive until they are queued, after which torch's allocator gives their memory
        away in stream order only.
        """
        device, stream = 0, 0
        if on.is_cuda:
            device = on.get_device()
            # torch.cuda.current_stream takes longer than a launch.
            stream = torch._C._cuda_getCurrentRawStream(device)
        self._extension.queue(launches, device, stream)

    def _workspace(self, device: torch.device, **lengths: int) -> dict[str, Memory]:
        """By name, memory for so many float32 as a kernel takes it, None for none; from one allocation."""
        memory = torch.empty((sum(lengths.values()),), dtype=torch.float32, device=device)
        parts: dict[str, Memory] = {}
        first = 0
        for name, length in lengths.items():
            parts[name] = (memory, 4 * first, 4 * length) if length else None
            first += length
        return parts

    def _block_target(self, x: Tensor) -> int:
        """How many blocks keep the device busy."""
        return 2 * _multiprocessors(x.get_device()) if x.is_cuda else 4

    def _parts_of_h(self, x: Tensor, R: int) -> tuple[int, int]:
        """How many parts to cut h's sum over the columns of x into, and the columns of one."""
        M, K = x.shape
        step = self._extension.H_COLUMNS
        blocks = ceil_div(M, self._extension.H_ROWS) * ceil_div(R, self._extension.H_RANKS)
        # The more parts, the longer each block of the product takes to add them up.
        return in_parts(K, step, blocks, self._block_target(x), worth=_COLUMNS_WORTH_PARTS, least=2 * step)

    def _gemm(
        self, x: Tensor, weight: Tensor | NF4, transposed: bool, column_scale: Tensor | None, bias: Tensor | None,
        u: _RankParts, lora_e: Tensor | None, v: Tensor, out: Tensor, dropout: dict[str, Any],
    ) -> list[_Launch]:  # fmt: skip
        """out = column_scale ∘ (x weightᵀ + dropout(scale (u ∘ lora_e) v)) + bias; v [R, N] and a dense weight have any
        strides. dropout: its scale, threshold and rng.

        The weight is [N, K], or [K, N] where `transposed`; an NF4 one is dequantised as a whole first.
        """
        launches: list[_Launch] = []
        if isinstance(weight, NF4):
            dense = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
            launches.append(self._dequantize(weight, dense))
            weight = dense
            u = u._replace(just_queued=False)
        arguments = dict(
            x=x, weight=weight, transposed=transposed, column_scale=column_scale, bias=bias, lora_e=lora_e, v=v,
            out=out, **u.arguments(), **dropout,
        )  # fmt: skip
        return [*launches, ("lora_gemm", arguments)]

    def takes(self, x: Tensor) -> bool:
        return x.device.type == self.device_type and x.dtype in ACTIVATION_DTYPES

    def beats_torch(self, x: Tensor, weight: Tensor) -> bool:
        """The vendor's product, which torch takes, is never slower."""
        return False

    def lora_linear_fwd(self, x: Tensor, layers: Layers, dropout: Dropout | None) -> Outputs:
        """Of each layer y [M, N] in the dtype of x and h = dropout(x) lora_aᵀ [M, R] in float32, all queued at once.
        Two launches a layer, and one more where an NF4 weight meets more rows
        than it is decoded for inside the product, and is dequantised first.

        x in float32 is taken for R = 0 and an NF4 weight only, which torch then multiplies dequantised: DoRA's norms
        need that. Raises ValueError for other x that is not bfloat16 or float16, for adapters that are neither float32
        nor of x's dtype, and for tensors on another type of device; RuntimeError with CUDA's message where a launch
        fails.
        """
        first = layers.projections[0]
        is_frozen = len(layers) == 1 and first.lora_b.shape[1] == 0 and first.column_scale is None
        if x.dtype == torch.float32 and is_frozen and isinstance(first.weight, NF4):
            self._check_device("x", x)
            dense = torch.empty(first.weight.shape, dtype=x.dtype, device=x.device)
            self.dequantize_nf4(first.weight, dense)
            return Outputs([torch.nn.functional.linear(x, dense, first.bias)], [x.new_empty(len(x), 0)])
        outputs = Outputs([], [])
        launches: list[_Launch] = []
        for layer in layers:
            y, h, own = self._forward(x, layer, dropout)
            outputs.ys.append(y)
            outputs.hs.append(h)
            launches += own
        self._queue(x, *launches)
        return outputs

    def _forward(self, x: Tensor, layer: Projection, dropout: Dropout | None) -> tuple[Tensor, Tensor, list[_Launch]]:
        """y and h, and the launches that make them."""
        weight, lora_a, lora_b, lora_e = layer.weight, layer.lora_a, layer.lora_b, layer.lora_e
        bias, column_scale, scaling = layer.bias, layer.column_scale, layer.scaling
        self._check(x, lora_a=lora_a, lora_b=lora_b, lora_e=lora_e)
        M, (N, R) = x.shape[0], lora_b.shape
        splits, columns_per_split = self._parts_of_h(x, R)
        h = torch.empty((M, R), dtype=torch.float32, device=x.device)
        h_parts = torch.empty((splits, M, R), dtype=torch.float32, device=x.device) if splits > 1 else h
        u = _RankParts(h_parts, splits, h if splits > 1 else None, just_queued=R > 0)
        y = torch.empty((M, N), dtype=x.dtype, device=x.device)
        launches: list[_Launch] = []
        if R:
            parts = dict(h_parts=h_parts, columns_per_split=columns_per_split)
            launches.append(("lora_h", dict(x=x, lora_a=lora_a, **parts, **_drawn(dropout))))
        # The weight of a Conv1D is [K, N] in memory.
        if self._extension.FEW_ROWS >= M and (isinstance(weight, NF4) or weight.stride(1) == 1):
            arguments = u.arguments() | {"x": x, "column_scale": column_scale, "bias": bias}
            arguments |= {"lora_b": lora_b, "lora_e": lora_e, "y": y, "scaling": scaling}
            if isinstance(weight, NF4):
                launches.append(("nf4_few_rows", self._nf4(weight) | arguments))
            else:
                launches.append(("lora_few_rows", {"weight": weight} | arguments))
        else:
            scaled = _drawn(None) | {"scale": scaling}
            launches += self._gemm(x, weight, False, column_scale, bias, u, lora_e, lora_b.T, y, scaled)
        return y, h, launches

    def column_scale_bwd(
        self, dy: Tensor, y: Tensor | None, bias: Tensor | None, column_scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """dz = dy ∘ c and, with y, dc in float32: one pass, and an ordered sum of its [splits, N] parts.

        Arguments are those of `lora_kernels.reference.column_scale_bwd`; errors as in `lora_linear_fwd`.
        """
        self._check(dy)
        M, N = dy.shape
        column_blocks = ceil_div(N, self._extension.SCALE_COLUMNS)
        splits, rows_per_split = in_parts(M, self._extension.SCALE_ROWS, column_blocks, self._block_target(dy))
        dz = torch.empty((M, N), dtype=dy.dtype, device=dy.device)
        parts = None if y is None else torch.empty((splits, N), dtype=torch.float32, device=dy.device)
        arguments = dict(
            dy=dy, y=y, bias=bias, column_scale=column_scale, dz=dz, dscale_parts=parts, rows_per_split=rows_per_split
        )  # fmt: skip
        self._queue(dy, ("column_scale_bwd", arguments))
        return dz, None if parts is None else parts.sum(0)

    def lora_linear_bwd(
        self,
        dys: Sequence[Tensor],
        x: Tensor,
        hs: Sequence[Tensor],
        layers: Layers,
        dropout: Dropout | None,
        needs: Needs,
    ) -> Gradients:
        """See `lora_kernels.reference.lora_linear_bwd`, and `lora_linear_fwd` for the errors. At most four launches a
        layer, all queued at once; dx is the sum of what each layer's would be, rounded.

        Sums are taken in a fixed order: the result depends on the number of multiprocessors but not on timing.
        """
        dxs: list[Tensor] = []
        gradients: list[AdapterGradients] = []
        launches: list[_Launch] = []
        for dy, h, layer, need in zip(dys, hs, layers, needs.layers, strict=True):
            dx, own_gradients, own = self._backward(dy, x, h, layer, dropout, needs.x, need)
            dxs += () if dx is None else (dx,)
            gradients.append(own_gradients)
            launches += own
        if launches:
            self._queue(x, *launches)
        for other in dxs[1:]:
            dxs[0] += other
        return Gradients(dxs[0] if dxs else None, gradients)

    def _backward(
        self, dy: Tensor, x: Tensor, h: Tensor, layer: Projection, dropout: Dropout | None, need_dx: bool,
        need: AdapterNeeds,
    ) -> tuple[Tensor | None, AdapterGradients, list[_Launch]]:  # fmt: skip
        """dx and the gradients of one layer's adapter, and the launches that make them."""
        weight, lora_a, lora_b, lora_e = layer.weight, layer.lora_a, layer.lora_b, layer.lora_e
        self._check(x, lora_a=lora_a, lora_b=lora_b, lora_e=lora_e)
        need_da, need_db, need_de = need.lora_a, need.lora_b, need.lora_e
        if not (need_dx or need_da or need_db or need_de):
            return None, AdapterGradients(), []
        M, (N, R) = x.shape[0], lora_b.shape
        need_dh = (need_dx or need_da) and R > 0

        column_blocks = ceil_div(N, self._extension.dh_columns(R))
        splits, rows_per_split = in_parts(M, self._extension.DH_ROWS, column_blocks, self._block_target(x))
        work = self._workspace(
            x.device,
            dh=M * R if need_dh else 0,
            dh_parts=column_blocks * M * R if need_dh else 0,
            db_parts=splits * N * R if need_db else 0,
            de_parts=splits * column_blocks * R if need_de else 0,
        )
        dh = work.pop("dh")

        def empty_like(t: Tensor | None, when: bool) -> Tensor | None:
            return torch.empty(t.shape, dtype=t.dtype, device=t.device) if when and t is not None else None

        dx, dlora_a, dlora_b = empty_like(x, need_dx), empty_like(lora_a, need_da), empty_like(lora_b, need_db)
        dlora_e = empty_like(lora_e, need_de)
        launches: list[_Launch] = []
        if need_dh or need_db or need_de:
            arguments = dict(dy=dy, h=h.contiguous(), lora_b=lora_b, rows_per_split=rows_per_split)
            launches.append(("lora_dh_dlora_b", {**work, **arguments}))
            arguments = dict(
                dh=dh, dlora_b=dlora_b, dlora_e=dlora_e, lora_e=lora_e, column_blocks=column_blocks, splits=splits,
                M=M, N=N, R=R, scaling=layer.scaling, dtype=self._dtypes[x.dtype],
            )  # fmt: skip
            launches.append(("lora_reduce", {**work, **arguments}))
        if need_da:
            launches.append(("lora_dlora_a", dict(x=x, dh=dh, dlora_a=dlora_a, **_drawn(dropout))))
        if dx is not None:
            launches += self._gemm(dy, weight, True, None, None, _RankParts(dh), None, lora_a, dx, _drawn(dropout))
        return dx, AdapterGradients(dlora_a, dlora_b, dlora_e), launches

    def _nf4(self, weight: NF4) -> dict[str, Any]:
        """The arguments that describe an NF4 weight to a kernel."""
        N, K = weight.shape
        return {
            "packed": weight.packed,
            "absmax": weight.absmax,
            "absmax_scale": weight.absmax_scale,
            "absmax_code": None if weight.absmax_scale is None else _dynamic_code(weight.packed.device),
            "absmax_offset": weight.absmax_offset,
            "block_shift": weight.block_size.bit_length() - 1,
            "N": N,
            "K": K,
        }

    def quantize_nf4(self, weight: Tensor, block_size: int, double_quant: bool) -> NF4:
        """NF4 of a contiguous weight [N, K] of float32, bfloat16 or float16; see reference.quantize_nf4.

        A block with an element that is not finite gets an absmax that is not finite.
        """
        self._check_device("weight", weight)
        size, device = weight.numel(), weight.device
        blocks = ceil_div(size, block_size)
        packed = torch.empty(((size + 1) // 2,), dtype=torch.uint8, device=device)
        absmax = torch.empty((blocks,), dtype=torch.float32, device=device)
        arguments = dict(
            weight=weight,
            block_shift=block_size.bit_length() - 1,
            packed=packed,
            absmax=absmax,
        )
        self._queue(weight, ("nf4_quantize", arguments))
        if not double_quant:
            return NF4(packed, absmax, None, None, block_size, tuple(weight.shape))
        offset = absmax.mean()
        codes = torch.empty((blocks,), dtype=torch.uint8, device=device)
        absmax_scale = torch.empty((ceil_div(blocks, ABSMAX_BLOCK),), dtype=torch.float32, device=device)
        arguments = dict(
            absmax=absmax,
            absmax_offset=offset,
            absmax_code=_dynamic_code(device),
            codes=codes,
            absmax_scale=absmax_scale,
        )
        self._queue(weight, ("nf4_quantize_absmax", arguments))
        return NF4(packed, codes, absmax_scale, offset, block_size, tuple(weight.shape))

    def dequantize_nf4(self, weight: NF4, out: Tensor) -> None:
        """Writes the dense weight to out, a contiguous [N, K], in one launch; see reference.dequantize_nf4."""
        self._check_device("weight", weight.packed)
        self._queue(out, self._dequantize(weight, out))

    def _dequantize(self, weight: NF4, out: Tensor) -> _Launch:
        return "nf4_dequantize", self._nf4(weight) | {"out": out}

    def adamw_step(
        self, groups: Sequence[AdamWGroup], max_grad_norm: float | None, cache: dict[str, Any]
    ) -> Tensor | None:
        """One AdamW step over all tensors, in place, in two launches; see reference.adamw_step.

        Parameters and gradients are float32, bfloat16 or float16, on one device. Nothing synchronises. The tables of
        addresses and settings are kept in `cache` and written anew when they change; a CUDA graph can hold a step that
        changes none of them, which is any but the first while gradients stay where they are. Raises ValueError for
        another dtype or device, RuntimeError where a graph is being captured and a table has to be written.
        """
        params = [param for group in groups for param in group.params]
        grads = [grad for group in groups for grad in group.grads]
        for name, tensors in (("a parameter", params), ("a gradient", grads)):
            for tensor in tensors:
                self._check_device(name, tensor)
                if tensor.device != params[0].device or tensor.dtype not in self._dtypes:
                    raise ValueError(
                        f"{name} is {tensor.dtype} on {tensor.device}; the CUDA C++ kernels take float32, bfloat16 and "
                        f"float16, all on one device (the first parameter is on {params[0].device})"
                    )
        device, chunk = params[0].device, self._extension.ADAMW_CHUNK
        columns = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "masters")
        state = [[t for group in groups for t in getattr(group, column)] for column in columns]
        group_of = [index for index, group in enumerate(groups) for _ in group.params]
        rows = []
        places = (addresses(f"{name} of parameter", column) for name, column in zip(columns, state, strict=True))
        for group, param, grad, *place in zip(group_of, params, grads, *places, strict=True):
            rows += [*place, param.numel(), self._dtypes[param.dtype], self._dtypes[grad.dtype], group]
        chunks = [(i, start) for i, param in enumerate(params) for start in range(0, max(param.numel(), 1), chunk)]
        table = _kept(cache, "table", [*rows, *chain(*chunks)], torch.int64, device)
        numbers = [(g.lr, g.beta1, g.beta2, g.eps, g.weight_decay) for g in groups]
        settings = _kept(cache, "settings", [*chain(*numbers), max_grad_norm or 0.0], torch.float64, device)

        clips = max_grad_norm is not None
        scalars = torch.empty((len(params), self._extension.ADAMW_SCALARS), dtype=torch.float32, device=device)
        partials = torch.empty((len(chunks),), dtype=torch.float32, device=device) if clips else None
        grad_norm = torch.empty((), dtype=torch.float32, device=device) if clips else None
        arguments = dict(
            tensors=table,
            chunks=table[len(rows) :],
            groups=settings,
            scalars=scalars,
            partials=partials,
            max_grad_norm=settings[-1:],
            grad_norm=grad_norm,
            count=len(chunks),
        )
        through = [t for column in state for t in column if t is not None]
        self._queue(table, ("adamw_prepare", arguments), ("adamw_step", arguments), through=through)
        return grad_norm


def _kept(cache: dict[str, Any], name: str, values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values in memory of the device that `cache` keeps, copied there only if they are not what it holds."""
    held, table = cache.get(name, (None, None))
    if held == values:
        return table
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the {name} of adamw_step changed while a CUDA graph is captured; take a step with the same tensors first"
        )
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()
    if table is None or table.shape != host.shape:
        table = torch.empty_like(host, device=device)
    # In the stream's order, without waiting: an earlier step has read the old values by then.
    table.copy_(host, non_blocking=True)
    cache[name] = (values, table)
    return table


def _drawn(dropout: Dropout | None) -> dict[str, Any]:
    """How the kernels take dropout: rng, threshold and the scale of what is kept."""
    if dropout is None:
        return {"rng": None, "threshold": 0, "scale": 1.0}
    threshold = dropout_threshold(dropout.p)
    return {"rng": dropout.rng if threshold else None, "threshold": threshold, "scale": dropout_scale(dropout.p)}


backend: Backend = Kernels("_cuda", "cuda", "it is built where nvcc is found")
