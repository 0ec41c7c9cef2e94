// y of a few rows of x, as when a model generates: its time is that of reading the weight once.
#pragma once

#include "dtype.cuh"
#include "rank_parts.h"

namespace lora_kernels::cuda {

// y [M,N] = column_scale ∘ (x [M,K] Wᵀ + scaling · (h ∘ lora_e) lora_bᵀ) + bias for M <= kFewRows. Weight has N, K and
// the place of W [N,K], which is rounded to dtype (bfloat16 or float16, that of x, bias and y) if it is not of it. h
// float32, lora_b [N,R]; R may be 0.
template <class Weight>
struct LoraFewRows {
  Weight weight;
  const void* x;
  int64_t ld_x;
  const float* column_scale;  // [N] or null
  const void* bias;           // [N] or null
  RankParts h;
  const void* lora_b;
  DType lora_b_dtype;
  const void* lora_e;  // [R] or null
  DType lora_e_dtype;
  void* y;
  int M, R;
  float scaling;
  DType dtype;
};
constexpr int kFewRows = 16;

}  // namespace lora_kernels::cuda
