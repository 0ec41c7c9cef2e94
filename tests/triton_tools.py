"""Ahead-of-time compilation of the shipped Triton kernels for GPUs that need not be there.

`python tests/triton_tools.py [--full] [--chips 80 gfx942]` prints registers, spills and shared memory of every variant.
It must run without TRITON_INTERPRET, which is why the tests call it as a subprocess.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Divisible by 16 in every real model; triton specialises its code on that.
DIVISIBLE = {"M", "N", "K", "stride_xm", "stride_dym", "stride_om", "rows_per_split"}
FLOAT_ARGUMENTS = {"scale", "scaling", "inv_keep"}


def variants(full: bool) -> list[dict]:
    """Kernel, dtype, rank and flags of each variant: what training in bf16 at R <= 16 launches, or everything."""

    def some(dtype: str, rank: int, even: bool = True, dropout: bool = True, conv1d: bool = False) -> list[dict]:
        need = {"NEED_DH": True, "NEED_DB": True, "NEED_DE": True}
        forward = {"HAS_BIAS": True, "HAS_E": True, "HAS_DROPOUT": False}
        backward = {"HAS_BIAS": False, "HAS_E": False, "HAS_DROPOUT": dropout}
        kernels = [
            ("h", "h", {"HAS_DROPOUT": dropout}),
            ("gemm", "y", forward),
            ("dh_dlora_b", "dh_dlora_b", need),
            ("reduce", "reduce", {**need, "HAS_E": True}),
            ("dlora_a", "dlora_a", {"HAS_DROPOUT": dropout}),
            ("gemm", "dx", backward),
        ]
        notes = [dtype, f"R{rank}", *(["ragged K"] * (not even)), *(["p=0"] * (not dropout)), *(["W^T"] * conv1d)]
        return [
            {"kernel": kernel, "label": f"{label} {' '.join(notes)}", "dtype": dtype, "rank": rank,
             "flags": flags, "depth": 0 if even else 1, "low_rank": label,
             "unit_stride": "stride_wk" if (label == "y") != conv1d else "stride_wn"}
            for kernel, label, flags in kernels
        ]  # fmt: skip

    def gemms(rows: list[dict]) -> list[dict]:
        return [row for row in rows if row["kernel"] == "gemm"]

    def adamw(param: str, grad: str, aligned: bool = True) -> list[dict]:
        notes = f"{param} {grad}" + " unaligned" * (not aligned)
        flags = {"PARAM": param, "GRAD": grad, "ALIGNED": aligned, "HAS_NORM": True}
        return [
            {"op": "adamw", "kernel": kernel, "label": f"adamw {kernel} {notes}", "flags": flags}
            for kernel in ("norm", "prepare", "step")
        ]

    chosen = some("bf16", 16) + adamw("fp32", "fp32")
    if full:
        chosen += adamw("fp32", "fp32", aligned=False) + adamw("bf16", "bf16") + adamw("fp16", "fp16")
        chosen += some("bf16", 32) + some("bf16", 64) + some("fp16", 16) + some("fp32", 16) + some("fp32", 64)
        chosen += gemms(some("bf16", 16, even=False)) + gemms(some("bf16", 64, even=False, conv1d=True))
        chosen += some("bf16", 16, dropout=False) + gemms(some("bf16", 16, conv1d=True))
    return chosen


def compile_variant(chip: int | str, variant: dict) -> dict:
    """Compile one variant for one chip and read the binary: registers, spills, shared memory, matrix instruction."""
    from lora_kernels.triton import configs, lora_linear

    if variant.get("op") == "adamw":
        return compile_adamw(chip, variant)

    kernel = getattr(lora_linear, f"_{variant['kernel']}_kernel")
    is_float32 = variant["dtype"] == "fp32"
    config = configs.lookup(configs.families()[chip], variant["kernel"], variant["rank"], is_float32, variant["depth"])
    options = {name: value for name, value in config.items() if name.startswith("num_")}
    constants = {**variant["flags"], **{name: value for name, value in config.items() if name not in options}}
    constants[variant["unit_stride"]] = 1
    constants["PRECISION"] = "tf32x3" if is_float32 and isinstance(chip, int) else "ieee"
    constants["stride_vn" if variant["low_rank"] == "dx" else "stride_vr"] = 1
    if constants.get("HAS_BIAS") is False:
        constants["bias_ptr"] = constants["lora_e_ptr"] = None
    if constants.get("HAS_DROPOUT") is False:
        constants["rng_ptr"] = None
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    activations = {"x_ptr", "w_ptr", "bias_ptr", "out_ptr", "dy_ptr"}
    signature, attrs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "rng_ptr":
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = f"*{variant['dtype']}" if name in activations else "*fp32"
        else:
            signature[name] = "fp32" if name in FLOAT_ARGUMENTS else "i32"
        # K is left undivided in the ragged variants: that is their point.
        divisible = name in DIVISIBLE and not (name == "K" and constants.get("EVEN_K") is False)
        if name not in constants and (name.endswith("_ptr") or divisible or name.startswith("stride_w")):
            attrs[(index,)] = [["tt.divisibility", 16]]
    row = _compile(chip, kernel, signature, constants, attrs, options)
    return {"kernel": variant["label"], "matrix_kernel": variant["kernel"] != "reduce"} | row


def compile_adamw(chip: int | str, variant: dict) -> dict:
    import triton.language as tl

    from lora_kernels.triton import adamw, configs

    kernel = getattr(adamw, f"_{variant['kernel']}_kernel")
    options = {"num_warps": configs.ADAMW["num_warps"], "num_stages": configs.ADAMW["num_stages"]}
    constants = {**configs.ADAMW, **variant["flags"]}
    constants |= {name: getattr(tl, FLOATS[variant["flags"][name]]) for name in ("PARAM", "GRAD")}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    pointers = {"tensors_ptr": "*i64", "chunks_ptr": "*i64", "settings_ptr": "*fp64", "max_norm_ptr": "*fp64"}
    signature, attrs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        if signature[name].startswith("*") and name not in ("chunks_ptr", "max_norm_ptr"):
            attrs[(index,)] = [["tt.divisibility", 16]]
    row = _compile(chip, kernel, signature, constants, attrs, options)
    return {"kernel": variant["label"], "matrix_kernel": False} | row


def _compile(chip: int | str, kernel, signature: dict, constants: dict, attrs: dict, options: dict) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget

    from lora_kernels.triton import configs

    target = GPUTarget("cuda", chip, 32) if isinstance(chip, int) else GPUTarget("hip", chip, 64)
    source = triton.compiler.ASTSource(kernel, signature, constants, attrs)
    compiled = triton.compile(source, target=target, options=options)
    row = {"chip": str(chip), "shared": compiled.metadata.shared, "shared_limit": configs.SHARED_MEMORY[chip]}
    return row | (_read_cubin(compiled) if isinstance(chip, int) else _read_amdgcn(compiled.asm["amdgcn"]))


def _read_cubin(compiled) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout)}
    matrix = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"], "matrix": matrix and matrix.group()}


def _read_amdgcn(text: str) -> dict:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    # Scalar registers spill into lanes of vector registers; if that reached memory the private segment would show it.
    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    matrix = re.search(r"v_mfma\w+", text)
    return {"registers": number("vgpr_count"), "spills": spills, "matrix": matrix and matrix.group()}


def table(rows: list[dict]) -> str:
    lines = [f"{'chip':7} {'kernel':30} {'regs':>5} {'spills':>6} {'shared':>7} {'limit':>7}  instruction"]
    for row in rows:
        lines.append(
            f"{row['chip']:7} {row['kernel']:30} {row['registers']:5} {row['spills']:6} {row['shared']:7} "
            f"{row['shared_limit']:7}  {row['matrix'] or '-'}"
        )
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from lora_kernels.triton import configs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="every dtype, rank step and flag instead of bf16 at R <= 16"
    )
    parser.add_argument("--chips", nargs="*", help="some of " + " ".join(map(str, configs.families())))
    parser.add_argument("--kernel", default="", help="only variants whose name contains this")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    options = parser.parse_args()
    chips = [chip for chip in configs.families() if not options.chips or str(chip) in options.chips]
    work = [(chip, v) for chip in chips for v in variants(options.full) if options.kernel in v["label"]]
    with ProcessPoolExecutor(options.workers) as pool:
        rows = list(pool.map(compile_variant, *zip(*work, strict=True)))
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
