"""The arithmetic of tools/speed_model.py: on assembly written by hand, and on one compiled kernel."""

import binaries
import kernel_report
import pytest
import speed_model
from speed_model import CHIPS, Work

A100, H100, MI300X = (next(chip for chip in CHIPS if chip.arch == arch) for arch in ("80", "90", "gfx942"))
# Two loops; what is at 0x90 is a wait moved behind the end, which jumps back into the first.
SASS = """
        /*0000*/                   LDG.E.128 R2, [R4.64] ;               /* 0x0 */
        /*0010*/                   LDS.64 R8, [R4] ;                     /* 0x0 */
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;  /* 0x0 */
        /*0030*/              @!P0 BRA 0x10 ;                            /* 0x0 */
        /*0040*/                   FMUL R8, R4, R6 ;                     /* 0x0 */
        /*0050*/                   IADD3 R8, R4, R6, RZ ;                /* 0x0 */
        /*0060*/                   SHFL.IDX PT, R8, R4, R6, R7 ;         /* 0x0 */
        /*0070*/               @P1 BRA 0x40 ;                            /* 0x0 */
        /*0080*/                   EXIT ;                                /* 0x0 */
        /*0090*/                   NOP ;                                 /* 0x0 */
        /*00a0*/                   BRA 0x20 ;                            /* 0x0 */
"""


def test_the_main_loop_is_the_one_with_matrix_instructions():
    loop = binaries.main_loop(*binaries.sass_loops(SASS))
    assert [line.split()[0] for line in loop] == ["LDS.64", "HMMA.16816.F32.BF16", "@!P0"]
    without = binaries.main_loop(*binaries.sass_loops(SASS.replace("HMMA.16816", "FFMA")))
    assert [line.split()[0] for line in without] == ["FMUL", "IADD3", "SHFL.IDX", "@P1"]
    straight = binaries.main_loop(*binaries.sass_loops("        /*0000*/                   EXIT ;\n"))
    assert [line.strip() for line in straight] == ["EXIT"]


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R8, R4, R6, R8", 2 * 16 * 8 * 8),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24", 2 * 64 * 256 * 16 // 4),
        ("v_mfma_f32_32x32x8_bf16 v[2:17], v[80:81], v[40:41], v[2:17]", 2 * 32 * 32 * 8),
        ("v_mfma_f32_32x32x8bf16_1k v[2:17], v[80:81], v[40:41], v[2:17]", 2 * 32 * 32 * 8),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]", None),
        ("FFMA R8, R4, R6, R8", 0),
    ],
)
def test_flops_of_matrix_instructions(line, flops):
    assert speed_model.tensor_flops(line) == flops


def test_the_busiest_unit_limits_an_iteration():
    lines = ["LDS.128 R4, [R8]", "LDSM.16.M88.4 R4, [R8]", "@P0 STS R4, R8", "FMUL R4, R5, R6", "LOP3.LUT R4, R5, R6",
             "HMMA.16816.F32.BF16 R8, R4, R6, R8", "UIADD3 UR4, UR5, UR6", "BRA 0x10"]  # fmt: skip
    loop = speed_model.loop_cost(lines, A100, 8)
    # 512 bytes, 512 and 128 at 128 a clock; 32 lanes of 64; 4096 FLOPs of 2048; eight instructions, four a clock.
    assert loop.units == {"load/store": 72, "FP32": 4, "integer": 4, "tensor": 16, "issue": 16}
    assert loop.limit == "load/store" and loop.clocks(1) == 72 and loop.clocks(2) == 144
    # The H100 has twice the FP32 lanes and tensor FLOPs.
    assert {"FP32": 2, "tensor": 8}.items() <= speed_model.loop_cost(lines, H100, 8).units.items()
    amd = ["\tds_read_b128 v[0:3], v4", "\tv_add_u32 v0, v1, v2", "\ts_add_u32 s0, s1, s2", ".LBB0_1:", ""]
    assert speed_model.loop_cost(amd, MI300X, 4).units == {"load/store": 4 * 8, "vector": 4}


def test_phases_between_barriers_add_up_unless_another_block_fills_them():
    lines = ["LDS.128 R4, [R8]", "BAR.SYNC 0x0", *["HMMA.16816.F32.BF16 R8, R4, R6, R8"] * 3, "BAR.SYNC 0x0"]
    loop = speed_model.loop_cost([*lines, "LDS.64 R4, [R8]"], A100, 8)
    assert loop.units["tensor"] == loop.units["load/store"] == 48
    # What follows the last barrier belongs to the phase before the first.
    assert loop.phases == 96 and loop.clocks(1) == 96 and loop.clocks(2) == 96 and loop.clocks(3) == 144


def test_registers_shared_memory_and_threads_limit_blocks():
    def blocks(registers, shared, warps, chip=A100):
        return speed_model.blocks_per_multiprocessor(chip, registers, shared, warps)

    assert blocks(128, 0, 8) == 2 and blocks(129, 0, 8) == 1 and blocks(32, 0, 8) == 8
    assert blocks(32, 81 << 10, 8) == 2 and blocks(32, 82 << 10, 8) == 1
    assert blocks(32, 1 << 20, 8) == 1
    assert blocks(128, 32 << 10, 8, MI300X) == 2 and blocks(257, 0, 4, MI300X) == 1


def test_the_multiprocessor_with_most_blocks_decides():
    loop = speed_model.Loop({"tensor": 100.0}, 150.0)

    def predicted(grid):
        return speed_model.predict(A100, loop, 2, Work(grid, 10, 0, 0, 0))

    # Two blocks at once need 200 clocks for an iteration of each, one alone 150.
    assert predicted(108) == (pytest.approx(10 * 150 / 1410), "barriers")
    assert predicted(109) == (pytest.approx(10 * 200 / 1410), "tensor")
    assert predicted(3 * 108) == (pytest.approx(10 * 350 / 1410), "tensor")
    time, limit = speed_model.predict(A100, loop, 2, Work(108, 10, 0, 0, 2039e6))
    assert time == pytest.approx(1000) and limit == "DRAM"


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_no_perfect_kernel_is_faster_than_the_roofline(chip):
    """A loop of nothing but the product, at any number of blocks."""
    step = 2 * 128 * 128 * 64
    loop = speed_model.Loop({"tensor": step / chip.tensor}, step / chip.tensor)
    for m in (1, 129, 4096):
        work = speed_model.product(m, speed_model.DENSE, 128, 128, 64)
        for resident in (1, 2, 3):
            assert speed_model.predict(chip, loop, resident, work)[0] >= work.floor(chip) * (1 - 1e-9)


def test_a_compiled_main_loop_does_the_flops_of_its_block():
    pytest.importorskip("triton")
    rows = kernel_report.triton_rows("--loops", "--chips", "80", "90", "gfx942", "--kernel", "y bf16 R16 bs64")
    rows = [row for row in rows if row["kernel"] == "nf4 y bf16 R16 bs64"]
    assert [row["chip"] for row in rows] == ["80", "90", "gfx942"]
    for row, chip in zip(rows, (A100, H100, MI300X), strict=True):
        config = row["config"]
        block = 2 * config["BLOCK_M"] * config["BLOCK_N"] * config["BLOCK_K"]
        assert speed_model.loop_flops(row["loop"], config["num_warps"]) == block
        loop = speed_model.loop_cost(row["loop"], chip, config["num_warps"])
        work = speed_model.triton_work("y", 4096, speed_model.NF4, config, chip)
        assert loop.phases >= loop.units["tensor"] == block / chip.tensor
        assert speed_model.predict(chip, loop, 2, work)[0] >= work.floor(chip)
