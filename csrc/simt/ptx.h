// The instructions of csrc/cuda/ptx.cuh on the host, with the fragment layouts of NVIDIA's PTX ISA.
#pragma once

#include <cstdint>

#include "simt/engine.h"
#include "simt/half.h"

namespace lora_kernels::simt {

void wait_for_previous_kernel(Site site);
void load_matrices(uint32_t* registers, int count, bool transposed, const void* smem_row, Site site);
template <float convert(uint16_t)>
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site);

}  // namespace lora_kernels::simt

namespace lora_kernels::cuda {

inline void cp_async16(void* smem, const void* gmem, bool valid, simt::Site site = {}) {
  simt::async_copy16(smem, gmem, valid, site);
}
inline void cp_async_commit(simt::Site site = {}) { simt::async_commit(site); }
template <int N>
void cp_async_wait(simt::Site site = {}) {
  simt::async_wait(N, site);
}

// Kernels run one after the other; what they may read before the wait is checked.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel(simt::Site site = {}) { simt::wait_for_previous_kernel(site); }

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row, simt::Site site = {}) {
  simt::load_matrices(r, 4, false, smem_row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row, simt::Site site = {}) {
  simt::load_matrices(r, 4, true, smem_row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row, simt::Site site = {}) {
  simt::load_matrices(r, 2, false, smem_row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row, simt::Site site = {}) {
  simt::load_matrices(r, 2, true, smem_row, site);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const __nv_bfloat16*,
                         simt::Site site = {}) {
  simt::mma_m16n8k16<simt::bfloat16_float>(d, a, b, site);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const __half*,
                         simt::Site site = {}) {
  simt::mma_m16n8k16<simt::half_float>(d, a, b, site);
}

}  // namespace lora_kernels::cuda
