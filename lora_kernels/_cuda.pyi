"""What csrc/cuda/bindings.cpp defines: the CUDA kernels, queued by name."""

from collections.abc import Iterable
from typing import Any

ADAMW_CHUNK: int
ADAMW_SCALARS: int
BFLOAT16: int
DH_ROWS: int
FEW_ROWS: int
FLOAT16: int
FLOAT32: int
H_COLUMNS: int
H_RANKS: int
H_ROWS: int
SCALE_COLUMNS: int
SCALE_ROWS: int

def queue(launches: Iterable[tuple[str, dict[str, Any]]], device: int, stream: int) -> None: ...
def dh_columns(R: int) -> int: ...
def device_error() -> str | None: ...
