#include "simt/ptx.h"

#include <cstring>

#include "simt/memory.h"

namespace lora_kernels::simt {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;

struct LoadMatrices {
  uint32_t* registers;
  int count;
  bool transposed;
  const void* row;
};

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

// Matrix j's row i comes from lane 8j + i. Lane i gets elements (i / 4, 2 (i % 4)) and (i / 4, 2 (i % 4) + 1) of each
// matrix, or of its transpose.
void load(void* const (&arguments)[kWarpSize]) {
  const LoadMatrices& first = *static_cast<LoadMatrices*>(arguments[0]);
  for (int j = 0; j < first.count; ++j) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i)
      std::memcpy(matrix[i], static_cast<LoadMatrices*>(arguments[8 * j + i])->row, sizeof(matrix[i]));
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = first.transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = first.transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      static_cast<LoadMatrices*>(arguments[lane])->registers[j] = low | high << 16;
    }
  }
}

template <float convert(uint16_t)>
void multiply(void* const (&arguments)[kWarpSize]) {
  using Row = float __attribute__((vector_size(32)));  // of 8 columns
  float a[16][16];
  Row b[16], d[16];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Mma& mma = *static_cast<Mma*>(arguments[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
      a[row][column] = convert(mma.a[i] & 0xffff);
      a[row][column + 1] = convert(mma.a[i] >> 16);
      d[group + i / 2 * 8][pair + i % 2] = mma.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = convert(mma.b[i] & 0xffff);
      b[pair + i * 8 + 1][group] = convert(mma.b[i] >> 16);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) d[row] += a[row][k] * b[k];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Mma& mma = *static_cast<Mma*>(arguments[lane]);
    for (int i = 0; i < 4; ++i) mma.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void wait_for_previous_kernel(Site site) {
  if (!is_skipped(site)) memory_previous_kernel_finished();
}

void load_matrices(uint32_t* registers, int count, bool transposed, const void* smem_row, Site site) {
  // The addresses of lanes that no matrix needs are not used.
  if (lane_index() < 8 * count) {
    check_shared16(smem_row, "ldmatrix", site);
    const std::string problem = memory_access(smem_row, 16, false, __builtin_return_address(0));
    if (!problem.empty()) fail(problem, site);
  }
  LoadMatrices argument{registers, count, transposed, smem_row};
  warp_collective("ldmatrix", &load, kAllLanes, &argument, site);
}

template <float convert(uint16_t)>
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Mma argument{d, a, b};
  warp_collective("mma.sync", &multiply<convert>, kAllLanes, &argument, site);
}

template void mma_m16n8k16<bfloat16_float>(float*, const uint32_t*, const uint32_t*, Site);
template void mma_m16n8k16<half_float>(float*, const uint32_t*, const uint32_t*, Site);

}  // namespace lora_kernels::simt
