// A frozen weight as the kernels read it: NF4, or dense in any storage type.
#pragma once

#include "nf4.h"

namespace lora_kernels::cpu {

// W [N,K]: `nf4`, unless `dense` is given, whose rows, or columns if it is `turned`, are contiguous and ld_dense
// elements apart.
struct Weight {
  Nf4Weight nf4;
  const void* dense;
  DType dense_dtype;
  int64_t ld_dense;
  int64_t N, K;
  bool turned = false;
};

}  // namespace lora_kernels::cpu
