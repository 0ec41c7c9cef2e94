// CPU products of few rows with a frozen weight that is NF4 or dense in any storage type: decoded or converted in
// cache.
#pragma once

#include "nf4.h"

namespace lora_kernels::cpu {

// W [N,K]: `nf4`, unless `dense` is given, whose rows are ld_dense elements apart.
struct Weight {
  Nf4Weight nf4;
  const void* dense;
  DType dense_dtype;
  int64_t ld_dense;
  int64_t N, K;
};

// y = x Wᵀ: x [M,K], y [M,N] contiguous.
struct FewRowsForward {
  Weight weight;
  const float* x;
  float* y;
  int64_t M;
  int num_threads;
};

// dx = dy W: dy [M,N], dx [M,K] contiguous.
struct FewRowsBackward {
  Weight weight;
  const float* dy;
  float* dx;
  int64_t M;
  int num_threads;
};

// One instruction set's build. Each returns false when memory ran out.
struct FewRowsKernels {
  bool (*forward)(const FewRowsForward&);
  bool (*backward)(const FewRowsBackward&);
};

}  // namespace lora_kernels::cpu
