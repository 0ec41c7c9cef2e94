// Dropout drawn from a seed, and its mask.
#pragma once

#include <cstdint>

namespace lora_kernels::cpu {

// keep(m, k) is drawn by Philox4x32-7; kept elements are scaled by 65536 / (65536 - threshold). threshold 0: no
// dropout.
struct Dropout {
  uint64_t seed = 0;
  uint64_t offset = 0;
  uint32_t threshold = 0;
};

// The elements of a matrix that dropout kept: bit k % 8 of byte k / 8 of each row. Rows are kKeptUnit / 8 bytes, or a
// multiple of them, and 4 bytes more may be read. Without dropout bits is null and scale 1.
constexpr int64_t kKeptUnit = 256;
struct Kept {
  const uint8_t* bits = nullptr;
  int64_t stride = 0;
  float scale = 1;  // of the kept elements
};

// The bits of a mask [M,K].
struct DrawMask {
  Dropout dropout;
  uint8_t* bits;
  int64_t stride;
  int64_t M;
  int num_threads;
};

}  // namespace lora_kernels::cpu
