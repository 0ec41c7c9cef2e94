// CPU products of few rows with a frozen weight that is NF4 or dense in any storage type: decoded or converted in
// registers.
#pragma once

#include "layers.h"

namespace lora_kernels::cpu {

// Rows up to which the kernel holds all their sums in registers.
constexpr int kFewRows = 8;

// One instruction set's build. Returns false when memory ran out.
struct FewRowsKernels {
  bool (*layers_forward)(const LayersForward&);  // M <= kFewRows, without dropout: one pass over each weight
};

}  // namespace lora_kernels::cpu
