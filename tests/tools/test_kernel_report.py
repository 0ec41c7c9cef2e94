"""The readers and gates of tools/kernel_report.py, on assembly and rows written by hand."""

import binaries
import kernel_report
import pytest

SASS = """
        /*0000*/                   LDG.E.U16 R2, [R4.64] ;            /* 0x0 */
        /*0010*/                   HMMA.16816.F32 R8, R4, R6, R8 ;    /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.64 [R1], [R2.64] ;  /* 0x0 */
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;        /* 0x0 */
        /*0040*/              @!P0 BRA {target} ;                     /* 0x0 */
        /*0050*/                   LDG.E R2, [R4.64] ;                /* 0x0 */
        /*0060*/                   BRA 0x60 ;                         /* 0x0 */
"""
AMDGCN = """
	global_load_dwordx4 v[0:3], v[4:5], off
.LBB0_1:
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	buffer_load_ushort v1, v2, s[0:3], 0 offen
	s_cbranch_scc1 {label}
.LBB0_2:
	s_endpgm
"""


def test_matrix_instructions_count_inside_loops_only():
    inside = binaries.sass_facts(SASS.format(target="0x20"))
    assert inside == {"matrix": "HMMA.16816.F32.BF16", "matrix_in_loops": 1, "matrix_anywhere": 2, "loads": [2, 4, 8]}
    outside = binaries.sass_facts(SASS.format(target="0x50"))
    assert outside["matrix"] is None and outside["matrix_anywhere"] == 2
    inside = binaries.amdgcn_facts(AMDGCN.format(label=".LBB0_1"))
    assert inside["matrix"] == "v_mfma_f32_16x16x16_bf16" and inside["loads"] == [2, 16]
    assert binaries.amdgcn_facts(AMDGCN.format(label=".LBB0_2"))["matrix"] is None


CUDA = {"arch": "sm_80", "mangled": "_Z11gemm_kernelILb1ELb1EEEv", "kernel": "gemm_kernel", "registers": 128,
        "spills": 0, "static_shared": 0, "matrix": "HMMA"}  # fmt: skip
TRITON = {"chip": "80", "kernel": "y", "spills": 0, "shared": 100, "shared_limit": 100, "matrix_kernel": True,
          "matrix": "HMMA", "contracted": False}  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"spills": 8}, {"static_shared": 50 << 10}, {"matrix": None}, {"registers": 129}], ids=str
)
def test_a_bad_cuda_kernel_is_a_problem(change):
    assert kernel_report.cuda_problems([CUDA]) == []
    assert len(kernel_report.cuda_problems([CUDA, CUDA | change])) == 1


@pytest.mark.parametrize("change", [{"spills": 1}, {"shared": 101}, {"matrix": None}, {"contracted": True}], ids=str)
def test_a_bad_triton_kernel_is_a_problem(change):
    assert kernel_report.triton_problems([TRITON]) == []
    assert len(kernel_report.triton_problems([TRITON, TRITON | change])) == 1
    assert kernel_report.triton_problems([TRITON | {"matrix_kernel": False, "matrix": None}]) == []
