"""Reads GPU binaries: registers, spills, static shared memory, the main loop, its matrix instructions, load widths."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

# NVIDIA's mma.sync, wgmma, its 8-bit form, tcgen05; AMD's.
MATRIX = re.compile(r"\b(HMMA|HGMMA|QGMMA|UTCHMMA|v_mfma)[\w.]*")
_SASS_LOAD = re.compile(r"\bLDG(?:STS)?\.E([\w.]*)")
_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def tool(name: str) -> Path:
    """NVIDIA's cuobjdump or nvdisasm: the toolkit's, or the one that Triton brings. FileNotFoundError if neither."""
    if found := shutil.which(name):
        return Path(found)
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        raise FileNotFoundError(f"there is no {name}, neither in PATH nor in Triton ({path})")
    return path


def nvidia_kernels(binary: Path) -> dict[tuple[str, str], dict]:
    """{(architecture, mangled name): facts} of each kernel in a cubin, object file or shared library."""
    rows: dict[tuple[str, str], dict] = {}
    for arch, text in _dump("--dump-resource-usage", binary):
        for name, usage in re.findall(r"Function (\w+):\s+(REG:.*)", text):
            number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
            spills = number["STACK"] + number["LOCAL"]
            rows[arch, name] = {"registers": number["REG"], "spills": spills, "static_shared": number["SHARED"]}
    for arch, text in _dump("-sass", binary):
        for part in text.split("Function : ")[1:]:
            rows[arch, part.split()[0]] |= {**sass_facts(part), "loop": main_loop(*sass_loops(part))}
    return rows


def _dump(option: str, binary: Path) -> Iterator[tuple[str, str]]:
    """What cuobjdump says, as (architecture, text) for each binary in the file; a cubin's architecture is ""."""
    environment = {**os.environ, "PATH": f"{tool('nvdisasm').parent}:{os.environ['PATH']}"}
    command = [str(tool("cuobjdump")), option, str(binary)]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    only, *parts = re.split(r"\narch = (sm_\w+)\n", text)
    return zip(parts[::2], parts[1::2], strict=True) if parts else iter([("", only)])


def sass_loops(text: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """The instructions (address, text) of one kernel's SASS, and the first and last address of each loop."""
    code = [(int(at, 16), line) for at, line in re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", text, re.M)]
    loops = []
    for at, line in code:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)
        # The last branch of a kernel is to itself.
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    return code, loops


def amdgcn_loops(text: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """The same for AMD's assembly of one kernel, with line numbers for addresses."""
    code = list(enumerate(text.splitlines()))
    labels = {label[1]: at for at, line in code if (label := re.match(r"(\.?LBB\w+):", line))}
    branches = [(at, re.search(r"\bs_c?branch\w*\s+(\.?LBB\w+)", line)) for at, line in code]
    return code, [(labels[branch[1]], at) for at, branch in branches if branch and labels[branch[1]] <= at]


def main_loop(code: list[tuple[int, str]], loops: list[tuple[int, int]]) -> list[str]:
    """The instructions of the loop with most matrix instructions, the inner one where loops nest; of kernels without
    them, of the longest innermost loop. All instructions where there is no loop."""

    def inside(loop: tuple[int, int]) -> list[str]:
        return [line for at, line in code if loop[0] <= at <= loop[1]]

    # A wait moved behind the end of the kernel jumps back into the middle of a loop. That is no loop of its own.
    own = [loop for loop in loops if not any(first < loop[0] <= last < loop[1] for first, last in loops)]
    inner = [loop for loop in own if not any(loop[0] <= other[0] and other[1] < loop[1] for other in own)]

    def weight(loop: tuple[int, int]) -> tuple[int, int]:
        matrix = sum(bool(MATRIX.search(line)) for line in inside(loop))
        # Of loops with the same products the shorter one, of loops without any the longer.
        return matrix, loop[0] - loop[1] if matrix else loop[1] - loop[0]

    candidates = own if any(weight(loop)[0] for loop in own) else inner
    return inside(max(candidates, key=weight)) if candidates else [line for _, line in code]


def sass_facts(text: str) -> dict:
    """Matrix instructions, those inside loops, and widths of global loads in the SASS of one kernel."""
    code, loops = sass_loops(text)
    loads = [
        next((_SASS_BYTES[word] for word in load[1].split(".") if word in _SASS_BYTES), 4)
        for _, line in code
        if (load := _SASS_LOAD.search(line))
    ]
    return _facts(code, loops, loads)


def amdgcn_facts(text: str) -> dict:
    """The same for AMD's assembly of one kernel."""
    code, loops = amdgcn_loops(text)
    loads = [
        _AMD_BYTES.get(load[1], 1 if "byte" in load[1] else 2) for _, line in code if (load := _AMD_LOAD.search(line))
    ]
    return _facts(code, loops, loads)


def _facts(code: list[tuple[int, str]], loops: list[tuple[int, int]], loads: Iterable[int]) -> dict:
    matrix = [(at, found[0]) for at, line in code if (found := MATRIX.search(line))]
    looped = [name for at, name in matrix if any(start <= at <= end for start, end in loops)]
    return {"matrix": looped[0] if looped else None, "matrix_in_loops": len(looped), "matrix_anywhere": len(matrix),
            "loads": sorted(set(loads))}  # fmt: skip
