// Element types, by the numbers that Python passes to all extensions.
#pragma once

#include "../cpu/dtype.h"

namespace lora_kernels::cuda {

using cpu::DType;

}  // namespace lora_kernels::cuda
