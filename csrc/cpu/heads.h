// What attention and rotary position embedding work on.
#pragma once

#include <cstdint>

namespace lora_kernels::cpu {

// [B, heads, T, D]; the elements of a row lie side by side.
struct Heads {
  void* data;
  int64_t batch, head, row;  // how far apart these are, in elements
};

template <class T>
inline __attribute__((always_inline)) T* row_of(const Heads& x, int64_t b, int64_t h, int64_t t) {
  return (T*)x.data + b * x.batch + h * x.head + t * x.row;
}

}  // namespace lora_kernels::cpu
