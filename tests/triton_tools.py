"""Ahead-of-time compilation of the shipped Triton kernels for GPUs that need not be there.

`python tests/triton_tools.py [--full] [--chips 80 gfx942]` prints registers, spills and shared memory of every variant.
It must run without TRITON_INTERPRET, which is why the tests call it as a subprocess.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import binaries

FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Divisible by 16 in every real model; triton specialises its code on that.
DIVISIBLE = {
    "M",
    "N",
    "K",
    "stride_xm",
    "stride_dym",
    "stride_om",
    "stride_x1m",
    "stride_x2m",
    "stride_up",
    "stride_um",
    "stride_hm",
    "K1",
    "K2",
    "rows_per_split",
    "columns_per_split",
    "size",
    "blocks",
}
FLOAT_ARGUMENTS = {"scale", "scaling", "inv_keep"}
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


def variants(full: bool = False, dtypes: bool = False) -> list[dict]:
    """Kernel, dtype, rank and flags of each variant: what training in bf16 at R <= 16 launches, with `dtypes` in fp16
    and fp32 too, or everything."""

    def some(dtype: str, rank: int, even: bool = True, dropout: bool = True, conv1d: bool = False) -> list[dict]:
        need = {"NEED_DH": True, "NEED_DB": True, "NEED_DE": True}
        forward = {"HAS_SCALE": False, "HAS_BIAS": True, "HAS_E": True, "HAS_DROPOUT": False}
        backward = {"HAS_SCALE": False, "HAS_BIAS": False, "HAS_E": False, "HAS_DROPOUT": dropout}
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
             "flags": flags, "depth": 4096 if even else 4095, "low_rank": label,
             "unit_stride": "stride_wk" if (label == "y") != conv1d else "stride_wn"}
            for kernel, label, flags in kernels
        ]  # fmt: skip

    def gemms(rows: list[dict]) -> list[dict]:
        return [row for row in rows if row["kernel"] == "gemm"]

    def scaled(rows: list[dict]) -> list[dict]:
        """Those that make y, with a column scale."""
        return [
            {**row, "label": f"{row['label']} scaled", "flags": {**row["flags"], "HAS_SCALE": True}}
            for row in gemms(rows)
            if row["low_rank"] == "y"
        ]

    def skinny(rows: list[dict]) -> list[dict]:
        """The large products with few rows."""
        return [{**row, "label": f"{row['label']} M<=16", "rows": 16} for row in gemms(rows)]

    def column_scale(dtype: str) -> list[dict]:
        flags = {"HAS_BIAS": True, "NEED_DSCALE": True}
        kernel = "column_scale_bwd"
        return [{"kernel": kernel, "label": f"{kernel} {dtype}", "dtype": dtype, "rank": 0, "flags": flags, "depth": 0}]

    def adamw(param: str, grad: str, aligned: bool = True) -> list[dict]:
        notes = f"{param} {grad}" + " unaligned" * (not aligned)
        flags = {"PARAM": param, "GRAD": grad, "ALIGNED": aligned, "HAS_NORM": True}
        return [
            {"op": "adamw", "kernel": kernel, "label": f"adamw {kernel} {notes}", "flags": flags}
            for kernel in ("norm", "prepare", "step")
        ]

    def nf4(dtype: str, rows: int = 4096, block_size: int = 64, double: bool = False, ragged: bool = False, **other):
        notes = [f"bs{block_size}", *(["double"] * double), *(["ragged rows"] * ragged), *(["M<=16"] * (rows <= 16))]
        change = {"rows": rows, "nf4": "double" if double else "single", "ragged": ragged}
        flags = {"BLOCK_SIZE": block_size, "ALIGNED": not ragged}
        kinds = {"y": "nf4_rows", "dx": "nf4_cols"}
        return [
            {**row, **change, "label": f"nf4 {row['label']} {' '.join(notes)}",
             "flags": {**row["flags"], **flags, "WEIGHT": kinds[row["low_rank"]]}}
            for row in gemms(some(dtype, 16, **other))
        ]  # fmt: skip

    def codec(dtype: str, block_size: int, double: bool) -> list[dict]:
        note = f"{dtype} bs{block_size}{' double' * double}"
        common = {"dtype": dtype, "nf4": "double" if double else "single", "block_size": block_size}
        kernels = ["quantize_absmax"] if double else ["quantize"]
        return [
            {**common, "kernel": kernel, "label": f"{kernel} {note}",
             "flags": {} if kernel == "quantize_absmax" else {"BLOCK_SIZE": block_size}}
            for kernel in [*kernels, "dequantize"]
        ]  # fmt: skip

    def sized(rows: list[dict], m: int, n: int, note: str) -> list[dict]:
        """The large products for so many rows and columns, which may have blocks of their own."""
        return [{**row, "label": f"{row['label']} {note}", "rows": m, "columns": n} for row in gemms(rows)]

    def tma(rows: list[dict]) -> list[dict]:
        return [{**row, "label": f"{row['label']} TMA", "kernel": "tma_gemm"} for row in gemms(rows)]

    def finish(rows: list[dict]) -> list[dict]:
        """The epilogues over a product of the vendor's."""
        return [{**row, "label": f"{row['label']} finish", "finish": True} for row in gemms(rows)]

    def group(rows: list[dict], layers: int = 3) -> list[dict]:
        """The large products that make dx of so many layers."""
        return [
            {**row, "label": f"{row['label']} of {layers}", "layers": layers}
            for row in rows
            if row["low_rank"] == "dx" and row["kernel"].endswith("gemm")
        ]

    def in_parts(rows: list[dict], parts: int) -> list[dict]:
        """The products that add up h."""
        return [
            {**row, "label": f"{row['label']} {parts} parts", "parts": parts} for row in rows if row["low_rank"] == "y"
        ]

    def short(rows: list[dict]) -> list[dict]:
        """The kernels that have blocks of their own for many rows, for fewer."""
        return [
            {**row, "label": f"{row['label']} M=512", "rows": 512} for row in rows if row["kernel"] in ("h", "dlora_a")
        ]

    mid, small, low = (512, 4096, "M=512"), (512, 512, "512 x 512"), (64, 4096, "M=64")
    chosen = some("bf16", 16) + skinny(some("bf16", 16)) + scaled(some("bf16", 16)) + column_scale("bf16")
    chosen += nf4("bf16") + nf4("bf16", rows=16, double=True)
    chosen += codec("bf16", 64, double=True) + adamw("fp32", "fp32")
    chosen += tma(some("bf16", 16)) + tma(sized(some("bf16", 16), *mid)) + finish(some("bf16", 16))
    for size in (mid, small, low):
        chosen += sized(some("bf16", 16), *size)
    chosen += group(some("bf16", 16)) + group(tma(some("bf16", 16))) + in_parts(skinny(some("bf16", 16)), 32)
    chosen += in_parts(nf4("bf16", rows=16, double=True), 32)
    for rows in (some("bf16", 16), tma(some("bf16", 16)), nf4("bf16", double=True)):
        chosen += in_parts(rows, 8)
    for rows in (32, 64):
        chosen += [{**row, "label": f"{row['label']} M={rows}", "rows": rows} for row in nf4("bf16")]
    if dtypes:
        chosen += some("fp16", 16) + some("fp32", 16)
    if full:
        for rows in (some("bf16", 16, dropout=False), some("fp16", 64, conv1d=True), scaled(some("bf16", 16))):
            chosen += tma(rows) + tma(sized(rows, *mid)) + finish(rows)
        for rows in (some("bf16", 16, even=False), some("bf16", 16, dropout=False), some("fp16", 16, conv1d=True)):
            chosen += group(rows) + group(rows, 2) + group(tma(rows), 2)
        chosen += group(some("fp32", 16)) + group(sized(some("bf16", 16), *mid), 2) + group(skinny(some("bf16", 16)))
        chosen += in_parts(skinny(some("fp32", 16)), 32) + in_parts(skinny(scaled(some("bf16", 64))), 8)
        chosen += in_parts(nf4("fp32", rows=16), 32) + in_parts(nf4("fp32"), 8) + in_parts(some("fp32", 16), 8)
        for rows in (scaled(some("fp16", 64)), some("bf16", 16, even=False), sized(some("bf16", 16), *mid)):
            chosen += in_parts(rows, 8) + in_parts(tma(rows), 8)
        for rows in (sized(some("bf16", 16), *small), sized(some("bf16", 16), *low), finish(some("fp16", 16))):
            chosen += in_parts(rows, 8)
        chosen += in_parts(finish(some("fp32", 16)), 8)
        chosen += tma(some("bf16", 16, even=False)) + tma(sized(some("bf16", 16, even=False), *mid))
        for rows in (32, 64):
            uneven = nf4("bf16", block_size=32, even=False)
            chosen += [{**row, "label": f"{row['label']} M={rows}", "rows": rows} for row in uneven]
        for size in (mid, small, low):
            chosen += sized(some("bf16", 64, even=False), *size) + scaled(sized(some("fp16", 16), *size))
        chosen += finish(some("fp32", 16)) + finish(some("fp32", 16, dropout=False)) + finish(some("bf16", 64))
        for dtype in FLOATS:
            for rank in (16, 32, 64):
                chosen += short(some(dtype, rank))
        chosen += scaled(some("bf16", 64, even=False, conv1d=True)) + scaled(some("fp32", 16)) + scaled(nf4("bf16"))
        chosen += (
            skinny(some("bf16", 64, even=False, conv1d=True)) + skinny(some("fp32", 16)) + skinny(some("fp16", 16))
        )
        chosen += scaled(skinny(some("bf16", 16))) + skinny(some("bf16", 16, dropout=False))
        chosen += scaled(nf4("fp32", rows=16)) + column_scale("fp32") + column_scale("fp16")
        chosen += adamw("fp32", "fp32", aligned=False) + adamw("bf16", "bf16") + adamw("fp16", "fp16")
        chosen += some("bf16", 32) + some("bf16", 64) + some("fp16", 16) + some("fp32", 16) + some("fp32", 64)
        chosen += gemms(some("bf16", 16, even=False)) + gemms(some("bf16", 64, even=False, conv1d=True))
        chosen += some("bf16", 16, dropout=False) + gemms(some("bf16", 16, conv1d=True))
        for dtype in FLOATS:
            chosen += nf4(dtype, double=True) + nf4(dtype, rows=16) + nf4(dtype, double=True, ragged=True, even=False)
            chosen += nf4(dtype, dropout=False, block_size=32, even=False) + codec(dtype, 4096, double=True)
        chosen += nf4("bf16", ragged=True) + nf4("bf16", rows=16, block_size=32, even=False)
        chosen += codec("fp32", 32, double=False)
    return chosen


def applies(chip: int | str, variant: dict) -> bool:
    """Whether a launch on the chip can take this variant."""
    from lora_kernels.backends.triton import configs

    return variant["kernel"] != "tma_gemm" or configs.by_tma(configs.families()[chip], 4096, 4096)


def compile_variant(chip: int | str, variant: dict) -> dict:
    """Compile one variant for one chip and read the binary: registers, spills, shared memory, what is in its loops."""
    from lora_kernels.backends.triton import configs, lora_linear, nf4

    if variant.get("op") == "adamw":
        return compile_adamw(chip, variant)

    name, family, is_float32 = variant["kernel"], configs.families()[chip], variant["dtype"] == "fp32"
    kernel = getattr(lora_linear, f"_{name}_kernel", None) or getattr(nf4, f"_{name}_kernel")
    if "block_size" in variant:
        config = configs.codec(family, name, variant["block_size"])
    else:
        table = name if "nf4" not in variant else "nf4_ragged" if variant["ragged"] else variant["flags"]["WEIGHT"]
        table = "finish" if variant.get("finish") else table
        problem = (variant["rank"], is_float32, variant["depth"], variant.get("rows", 4096))
        config = configs.lookup(family, table, *problem, variant.get("columns", 4096))
    options = {name: value for name, value in config.items() if name in OPTIONS}
    constants = {**variant["flags"], **{name: value for name, value in config.items() if name not in options}}
    constants["PRECISION"] = "tf32x3" if is_float32 and isinstance(chip, int) else "ieee"
    if name.endswith("gemm"):
        constants["stride_vn" if variant["low_rank"] == "dx" else "stride_vr"] = 1
        if name == "tma_gemm":
            constants["W_ROWS"] = variant["unit_stride"] == "stride_wk"
        elif "nf4" not in variant:
            constants |= {variant["unit_stride"]: 1, "WEIGHT": "dense", "BLOCK_SIZE": 1, "ALIGNED": True}
            constants |= dict.fromkeys(("absmax_ptr", "tables_ptr"))
    if variant.get("nf4") != "double":
        constants |= dict.fromkeys(("absmax_scale_ptr", "absmax_offset_ptr"))
    if not variant.get("finish"):
        constants["product_ptr"] = None
    if constants.get("HAS_BIAS") is False:
        constants["bias_ptr"] = constants["lora_e_ptr"] = None
    if constants.get("HAS_SCALE") is False:
        constants["column_scale_ptr"] = None
    if constants.get("HAS_DROPOUT") is False:
        constants["rng_ptr"] = None
    if variant.get("parts", 1) == 1:
        constants["u_sum_ptr"] = None
    overlaps = configs.overlaps(family) and not variant.get("finish")
    constants |= {"PARTS": variant.get("parts", 1), "OVERLAPS": overlaps}
    for layer in range(variant.get("layers", 1), 3):
        absent = [f"x{layer}_ptr", f"w{layer}_ptr", f"x{layer}_desc", f"w{layer}_desc"]
        constants |= dict.fromkeys(absent)
    for layer in range(1, variant.get("layers", 1)):
        constants[f"stride_w{layer}{variant['unit_stride'][-1]}"] = 1
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    pointers = dict.fromkeys(
        (
            "x_ptr",
            "w_ptr",
            "x1_ptr",
            "w1_ptr",
            "x2_ptr",
            "w2_ptr",
            "bias_ptr",
            "out_ptr",
            "dy_ptr",
            "y_ptr",
            "dz_ptr",
            "weight_ptr",
        ),
        variant["dtype"],
    )
    pointers |= {"rng_ptr": "i64", "packed_ptr": "u8", "codes_ptr": "u8"}
    if "nf4" in variant:
        pointers["w_ptr"] = "u8"
    if variant.get("nf4") == "double" and name != "quantize_absmax":
        pointers["absmax_ptr"] = "u8"
    signature, attrs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, "fp32")
        elif name.endswith("_desc"):
            blocks = "MK" if name.startswith("x") else "NK" if constants["W_ROWS"] else "KN"
            rows, columns = (config[f"BLOCK_{letter}"] for letter in blocks)
            signature[name] = f"tensordesc<{variant['dtype']}[{rows}, {columns}]>"
        else:
            signature[name] = "fp32" if name in FLOAT_ARGUMENTS else "i32"
        # K is left undivided in the ragged variants: that is their point.
        divisible = name in DIVISIBLE and not (name == "K" and constants.get("EVEN_K") is False)
        if name not in constants and (name.endswith("_ptr") or divisible or name.startswith("stride_w")):
            attrs[(index,)] = [["tt.divisibility", 16]]
    row = _compile(chip, kernel, signature, constants, attrs, options)
    # Dequantisation's code · scale + offset must round twice.
    row["contracted"] = row["fma"] and variant["kernel"] == "dequantize"
    # The driver starts these before the kernel whose result they need has ended.
    must_wait = bool(constants.get("OVERLAPS")) and (name.endswith("gemm") or name == "reduce")
    row["does_not_wait"] = must_wait and row["waits"] != 1
    about = {"kernel": variant["label"], "matrix_kernel": "low_rank" in variant and variant["kernel"] != "reduce"}
    return {**about, "config": config} | row


def compile_adamw(chip: int | str, variant: dict) -> dict:
    import triton.language as tl

    from lora_kernels.backends.triton import adamw, configs

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

    from lora_kernels.backends.triton import configs

    target = GPUTarget("cuda", chip, 32) if isinstance(chip, int) else GPUTarget("hip", chip, 64)
    source = triton.compiler.ASTSource(kernel, signature, constants, attrs)
    compiled = triton.compile(source, target=target, options=options)
    row = {"chip": str(chip), "shared": compiled.metadata.shared, "shared_limit": configs.SHARED_MEMORY[chip]}
    assembly = compiled.asm["ptx" if isinstance(chip, int) else "amdgcn"]
    # v_fma_mixlo_f16 is no contraction: it multiplies, adds zero, and rounds to float32 before float16.
    row["waits"] = assembly.count("griddepcontrol.wait")
    row["fma"] = bool(re.search(r"\bfma\.|v_(pk_)?fma_f32|v_fmac|v_mac_f32|v_mad_f32", assembly))
    return row | (_read_cubin(compiled) if isinstance(chip, int) else _read_amdgcn(compiled.asm["amdgcn"]))


def _read_cubin(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (facts,) = binaries.nvidia_kernels(Path(file.name)).values()
    return facts


def _read_amdgcn(text: str) -> dict:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    # Scalar registers spill into lanes of vector registers; if that reached memory the private segment would show it.
    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return {"registers": number("vgpr_count"), "spills": spills, **binaries.amdgcn_facts(text),
            "loop": binaries.main_loop(*binaries.amdgcn_loops(text))}  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [f"{'chip':7} {'kernel':44} {'regs':>5} {'spills':>6} {'shared':>7} {'limit':>7} {'load':>5}  instruction"]
    for row in rows:
        lines.append(
            f"{row['chip']:7} {row['kernel']:44} {row['registers']:5} {row['spills']:6} {row['shared']:7} "
            f"{row['shared_limit']:7} {max(row['loads'], default=0):5}  {row['matrix'] or '-'}"
        )
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from lora_kernels.backends.triton import configs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="every dtype, rank step and flag instead of bf16 at R <= 16"
    )
    parser.add_argument("--dtypes", action="store_true", help="fp16 and fp32 besides bf16, at R <= 16")
    parser.add_argument("--chips", nargs="*", help="some of " + " ".join(map(str, configs.families())))
    parser.add_argument("--kernel", default="", help="only variants whose name contains this")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--loops", action="store_true", help="in the JSON, the instructions of each main loop")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    options = parser.parse_args()
    chips = [chip for chip in configs.families() if not options.chips or str(chip) in options.chips]
    work = [(chip, v) for chip in chips for v in variants(options.full, options.dtypes)]
    work = [(chip, v) for chip, v in work if options.kernel in v["label"] and applies(chip, v)]
    with ProcessPoolExecutor(options.workers) as pool:
        rows = list(pool.map(compile_variant, *zip(*work, strict=True)))
    if not options.loops:
        rows = [{name: value for name, value in row.items() if name != "loop"} for row in rows]
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
