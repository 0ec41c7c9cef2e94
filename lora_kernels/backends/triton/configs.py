"""Launch configurations: one explicit table per GPU family, nothing tuned at run time.

tests/backends/test_triton_aot.py compiles every entry for every chip of its family and refuses spills or too much
shared memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lora_kernels.backends.parts import ceil_div

# Shared memory one block may use, in bytes; the families below are sized for the smallest chip in them.
SHARED_MEMORY: dict[int | str, int] = {
    80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
    "gfx90a": 64 << 10, "gfx942": 64 << 10,
}  # fmt: skip

_FAMILY: dict[int | str, str] = {
    80: "sm80", 86: "sm86", 89: "sm86", 90: "sm90", 100: "sm100", 103: "sm100", 120: "sm86", 121: "sm86",
    "gfx90a": "gfx9", "gfx942": "gfx9",
}  # fmt: skip


def _config(num_warps: int, num_stages: int, **blocks: int) -> dict[str, int]:
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def _gemm(
    block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int, slices: int = 2, group_m: int = 8
) -> dict[str, int]:  # fmt: skip
    return _config(num_warps, num_stages, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=group_m,
                   SLICES=slices)  # fmt: skip


# The two big GEMMs: family -> (16-bit, float32). The interpreter's cost is the number of operations, not their size.
_GEMM = {
    "sm80": (_gemm(128, 128, 64, 8, 3), _gemm(64, 64, 32, 8, 3)),
    "sm86": (_gemm(128, 128, 32, 8, 4), _gemm(64, 64, 32, 8, 3)),
    "sm90": (_gemm(128, 128, 64, 8, 4), _gemm(64, 64, 32, 8, 3)),
    "sm100": (_gemm(128, 256, 64, 8, 3, 4), _gemm(64, 64, 32, 8, 3)),
    "gfx9": (_gemm(128, 128, 32, 8, 2), _gemm(64, 64, 32, 8, 2)),
    "interpreter": (_gemm(64, 64, 64, 4, 1), _gemm(64, 64, 64, 4, 1)),
}

# The same where the copy engine fetches the tiles (`by_tma`), which leaves registers for a larger one.
_TMA_GEMM = {"sm90": _gemm(128, 256, 64, 8, 3, 4, 16)}

# The blocks to take, in this order, while those before are fewer than `_FULL`, which leaves a third of the 132
# multiprocessors idle. Measured on an H200 (docs/performance.md), whose family alone has them.
_FEWER_BLOCKS = {"sm90": (_GEMM["sm90"][0], _gemm(64, 64, 64, 4, 5))}
_FULL = 92
# Up to so many rows the weight is most of the traffic still.
_LOW_ROWS = 128
_LOW_GEMM = {"sm90": _gemm(64, 32, 128, 4, 4, 1)}

# The same with an NF4 weight, whose tile all warps decode between two products: small enough for two blocks on a
# multiprocessor, which take turns at decoding and multiplying (docs/speed_model.md). An accumulator of 128 x 64 leaves
# registers for that: 128 a thread with 8 warps, or 255 with 4.
_NF4_GEMM = {
    "sm80": (_gemm(128, 64, 64, 4, 3), _gemm(64, 64, 32, 8, 3)),
    "sm86": (_gemm(128, 64, 32, 4, 3), _gemm(64, 64, 32, 4, 3)),
    "sm90": (_gemm(128, 64, 64, 8, 3), _gemm(64, 64, 32, 8, 3)),
    "sm100": (_gemm(128, 128, 64, 8, 3), _gemm(64, 64, 32, 8, 3)),
    "gfx9": (_gemm(128, 128, 32, 8, 2), _gemm(64, 64, 32, 8, 2)),
}

# Up to SKINNY_ROWS rows the weight is all the traffic: no more rows of products than tensor cores must have, and many
# small programs, each with a deep queue of loads, so that every multiprocessor reads.
SKINNY_ROWS = 16
_SKINNY_GEMM = {
    "gemm": (_gemm(16, 16, 256, 2, 4, 1), _gemm(16, 32, 64, 4, 3, 1)),
    "nf4_rows": (_gemm(16, 16, 256, 4, 3, 1), _gemm(16, 16, 128, 4, 3, 1)),
    "nf4_cols": (_gemm(16, 32, 128, 4, 3, 1), _gemm(16, 32, 64, 4, 3, 1)),
}
# Two of its blocks fit the shared memory of a multiprocessor, 99 KiB.
_SKINNY_GEMM_SM86 = _gemm(16, 16, 256, 4, 3, 1)
# family -> (forward, backward): rows up to which an NF4 weight is decoded inside the product. With more it is
# dequantised as a whole first, which takes N K values of x's dtype and less time than every row of blocks decoding it
# anew. Measured on an H200, in bfloat16.
_NF4_ROWS = {"sm90": (64, SKINNY_ROWS)}
_NF4_LOW = {"sm90": (_gemm(32, 32, 128, 4, 3, 1), _gemm(64, 32, 128, 4, 3, 1))}
# Where rows don't start at a block, bytes and scales are addressed one by one.
_NF4_RAGGED = (_gemm(64, 64, 32, 4, 2, 2), _gemm(64, 64, 32, 4, 2, 1))

# The epilogue alone, over a product that the vendor's library made: bound by memory, so many small programs.
_FINISH = (_gemm(64, 64, 32, 8, 1, 1), _gemm(32, 64, 32, 8, 1, 1))

# The kernels bound by memory hardly differ between chips: kernel -> BLOCK_R -> configuration for 16-bit inputs.
_SKINNY = {
    "h": {
        16: _config(4, 4, BLOCK_M=16, BLOCK_K=128),
        32: _config(4, 3, BLOCK_M=32, BLOCK_K=128),
        64: _config(4, 3, BLOCK_M=32, BLOCK_K=64),
    },
    "dh_dlora_b": {
        16: _config(8, 3, BLOCK_M=64, BLOCK_N=256),
        32: _config(8, 2, BLOCK_M=32, BLOCK_N=256),
    },
    "dlora_a": {
        16: _config(4, 4, BLOCK_M=128, BLOCK_K=32),
        32: _config(4, 3, BLOCK_M=128, BLOCK_K=32),
        64: _config(4, 3, BLOCK_M=64, BLOCK_K=32),
    },
}

# With many rows: larger blocks, for which the mask is cheaper to make; of h with so many columns that its parts are
# enough for all multiprocessors.
_LONG = {
    "h": {
        16: _config(4, 5, BLOCK_M=32, BLOCK_K=64),
        32: _SKINNY["h"][32],
        64: _SKINNY["h"][64],
    },
    "dlora_a": {
        16: _config(4, 5, BLOCK_M=32, BLOCK_K=128),
        32: _config(4, 3, BLOCK_M=32, BLOCK_K=128),
        64: _config(4, 2, BLOCK_M=32, BLOCK_K=128),
    },
}
_MANY_ROWS = 1025


class Parts(NamedTuple):
    """When a sum over rows or columns is cut into parts."""

    programs: int  # of all parts, at most, on a multiprocessor
    worth: int  # the length from which on it is
    least: int  # the least length of a part


# Adding the parts up is one more launch, except for those of dh_dlora_b, which has another sum to make anyway, and for
# those of h, which the product adds up.
PARTS = {"h": Parts(4, 2048, 512), "dlora_a": Parts(2, _MANY_ROWS, 128), "dh_dlora_b": Parts(2, 1, 1)}


def most_parts_of_h(rows: int) -> int:
    """The product adds them up all at once, in the registers that its accumulator leaves."""
    return 32 if rows <= SKINNY_ROWS else 8


# AdamW is bound by memory everywhere: elements of a tensor for one program and at once, tensors and chunks at once.
ADAMW = _config(4, 1, CHUNK=4096, BLOCK=1024, BLOCK_T=256, BLOCK_C=1024)


GEMMS = ("gemm", "tma_gemm", "nf4_rows", "nf4_cols", "nf4_ragged", "finish")


def block_r(kernel: str, rank: int, is_float32: bool) -> int:
    """Columns of the rank that `kernel` handles at once: `rank` padded to 16, 32 or 64; larger ranks take more steps.

    Registers set the limit: the GEMMs hold a large accumulator, dh_dlora_b two products, and float32 the pieces of
    its emulation by TF32.
    """
    largest = 16 if is_float32 or kernel in GEMMS else 32 if kernel == "dh_dlora_b" else 64
    return next(step for step in (16, 32, 64) if step >= min(rank, largest))


def tiles(config: dict[str, int], rows: int, columns: int) -> int:
    """Into how many tiles a GEMM's result falls."""
    return ceil_div(rows, config["BLOCK_M"]) * ceil_div(columns, config["BLOCK_N"])


def _gemm_table(family: str, kernel: str, rows: int, columns: int) -> tuple[dict[str, int], dict[str, int]]:
    """(16-bit, float32)"""
    if family == "interpreter":
        return _GEMM[family]
    if kernel == "nf4_ragged":
        return _NF4_RAGGED
    if kernel == "finish":
        return _FINISH
    if rows <= SKINNY_ROWS:
        sixteen_bit, float32 = _SKINNY_GEMM[kernel]
        return (_SKINNY_GEMM_SM86 if family == "sm86" and kernel == "gemm" else sixteen_bit), float32
    if kernel.startswith("nf4"):
        low = [config for config in _NF4_LOW.get(family, ()) if rows <= config["BLOCK_M"]]
        return (low[0], _NF4_GEMM[family][1]) if low else _NF4_GEMM[family]
    sixteen_bit, float32 = _GEMM[family]
    if kernel == "tma_gemm":
        sixteen_bit = _TMA_GEMM[family]
    if family in _LOW_GEMM and rows <= _LOW_ROWS:
        return _LOW_GEMM[family], float32
    for fewer in _FEWER_BLOCKS.get(family, ()):
        if tiles(sixteen_bit, rows, columns) < _FULL:
            sixteen_bit = fewer
    return sixteen_bit, float32


@functools.lru_cache(maxsize=4096)
def by_tma(family: str, rows: int, columns: int) -> bool:
    """Whether the copy engine fetches the tiles of a product in 16 bits: a tenth faster on an H200 for large blocks."""
    if family not in _TMA_GEMM or rows <= _LOW_ROWS:
        return False
    return _gemm_table(family, "tma_gemm", rows, columns)[0]["BLOCK_M"] >= 128


def overlaps(family: str) -> bool:
    """Whether kernels of this family may start before the one before them has ended (programmatic dependent launch)."""
    return family in ("sm90", "sm100")


def decodes_inside(family: str, rows: int, backward: bool) -> bool:
    """Whether a product of so many rows decodes its NF4 weight itself."""
    return rows <= _NF4_ROWS[family][backward] if family in _NF4_ROWS else True


def lookup(
    family: str, kernel: str, rank: int, is_float32: bool, depth: int = 0, rows: int = 4096, columns: int = 4096
) -> dict[str, int]:
    """Blocks, num_warps and num_stages for `kernel`: "gemm" (with a dense weight), "tma_gemm" (the same
    `by_tma`), "nf4_rows" (an NF4 weight, forward), "nf4_cols" (backward), "nf4_ragged" (its rows aren't whole blocks),
    "finish", "h", "dh_dlora_b", "reduce", "dlora_a" or "column_scale_bwd".

    `depth` is the length of a GEMM's sum; where BLOCK_K doesn't divide it, the masks need the registers of half a step.
    `rows` and `columns` are those of a GEMM's result. For "h" and "dlora_a" `rows` and `depth` are those of x.
    """
    step = block_r(kernel, rank, is_float32)
    if kernel in GEMMS:
        config = {**_gemm_table(family, kernel, rows, columns)[is_float32], "BLOCK_R": step}
        config["EVEN_K"] = depth % config["BLOCK_K"] == 0
        if not config["EVEN_K"]:
            config["BLOCK_K"] //= 2
        return config
    if kernel == "reduce":
        return _config(4, 1, BLOCK_P=16, BLOCK_L=2048 if family == "interpreter" else 128)
    if kernel == "column_scale_bwd":
        return _config(4, 1, BLOCK_M=16, BLOCK_N=256)
    is_long = kernel in _LONG and rows >= _MANY_ROWS and (kernel == "dlora_a" or depth >= PARTS[kernel].worth)
    config = {**(_LONG if is_long else _SKINNY)[kernel][step], "BLOCK_R": step}
    if is_float32:
        config["BLOCK_K" if kernel == "h" or is_long else "BLOCK_M"] //= 2
        config["num_stages"] = 2
        if kernel == "dh_dlora_b":
            config["BLOCK_N"] = 64
    if family == "gfx9":
        config["num_stages"] = min(config["num_stages"], 2)
        if kernel == "dh_dlora_b" and step == 32:
            config["BLOCK_N"] = 64
    return config


def codec(family: str, kernel: str, block_size: int) -> dict[str, int | bool]:
    """Blocks and options for `kernel` of the NF4 codec: "quantize", "quantize_absmax" or "dequantize"."""
    if kernel == "quantize_absmax":
        return _config(4, 1, BLOCK_L=256 if family == "interpreter" else 32)
    elements = 32768 if family == "interpreter" else 4096
    config = _config(4 if kernel == "quantize" else 8, 1, BLOCKS=elements // block_size)
    # A scale restored in one rounding instead of two would not be that of the format.
    return config | {"enable_fp_fusion": False} if kernel == "dequantize" else config


@functools.lru_cache
def device_family(index: int) -> str:
    """The family of GPU number `index`; unknown NVIDIA chips get the entry with the smallest needs."""
    if torch.version.hip:
        return "gfx9"
    major, minor = torch.cuda.get_device_capability(index)
    return _FAMILY.get(10 * major + minor, "sm86")


def unsupported_gpu() -> str | None:
    """Why the first visible GPU that the kernels can't run on is one, or None."""
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        if torch.version.hip:
            if gpu.gcnArchName.split(":")[0] not in _FAMILY:
                return f"GPU {index} is a {gpu.name} ({gpu.gcnArchName}); of AMD's, gfx90a and gfx942 are supported"
        elif gpu.major < 8:
            return f"GPU {index} is a {gpu.name} (sm_{gpu.major}{gpu.minor}); sm_80 and newer are supported"
    return None


def families() -> dict[int | str, str]:
    """Every chip the table is checked on, and its family."""
    return {chip: _FAMILY[chip] for chip in SHARED_MEMORY}
