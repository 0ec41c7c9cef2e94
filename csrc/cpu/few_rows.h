// CPU products of few rows with a frozen weight that is NF4 or dense in any storage type: decoded or converted in
// registers or in cache.
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

// Rows up to which LayerForward holds all their sums in registers.
constexpr int kLayerRows = 8;

// y = column_scale ∘ (x Wᵀ + scaling · (h ∘ lora_e) lora_bᵀ) + bias and h = x lora_aᵀ, for M <= kLayerRows, in one pass
// over the weight. x [M,K] has rows ld_x apart and the type of y [M,N]; h [M,R].
struct LayerForward {
  const Weight* weight;  // or null: y, which is float32, comes with x Wᵀ in it
  const void* x;
  DType x_dtype;
  int64_t ld_x;
  const void* lora_a;
  DType lora_a_dtype;
  const void* lora_b;
  DType lora_b_dtype;
  float scaling;
  const float* bias;          // [N] or null
  const float* lora_e;        // [R] or null
  const float* column_scale;  // [N] or null
  void* y;
  float* h;
  int64_t M, N, K, R;
  int num_threads;
};

// One instruction set's build. Each returns false when memory ran out.
struct FewRowsKernels {
  bool (*layer_forward)(const LayerForward&);
  bool (*forward)(const FewRowsForward&);
  bool (*backward)(const FewRowsBackward&);
};

}  // namespace lora_kernels::cpu
