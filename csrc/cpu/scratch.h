// Scratch memory that a thread keeps from call to call: freshly allocated, its pages would cost more than what is
// written to them.
#pragma once

#include <cstdint>

namespace lora_kernels::cpu {

// `floats` floats, aligned to 64 bytes, or null where memory ran out. Given back in the reverse order.
float* take_scratch(int64_t floats);
void give_scratch(float* scratch, int64_t floats);

}  // namespace lora_kernels::cpu
