// Scratch memory that a thread keeps from call to call: freshly allocated, its pages would cost more than what is
// written to them.
#pragma once

#include <cstdint>

namespace lora_kernels::cpu {

// `floats` floats, aligned to 64 bytes, or null where memory ran out. Given back in the reverse order.
float* take_scratch(int64_t floats);
void give_scratch(float* scratch, int64_t floats);

// Scratch memory; data is null where it ran out.
struct Buffer {
  explicit Buffer(int64_t floats) : floats(floats), data(take_scratch(floats)) {}
  ~Buffer() { give_scratch(data, floats); }
  Buffer(const Buffer&) = delete;
  const int64_t floats;
  float* const data;
};

}  // namespace lora_kernels::cpu
