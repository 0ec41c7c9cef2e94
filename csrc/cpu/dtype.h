#pragma once

#include <cstdint>

namespace lora_kernels::cpu {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace lora_kernels::cpu
