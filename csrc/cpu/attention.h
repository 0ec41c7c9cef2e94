// Causal softmax attention: o = softmax(scale q kᵀ, each row over its own key and those before it) v, in blocks (Dao
// 2023), so that no [T, T] exists. Arithmetic is fp32, rounded once where stored.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "heads.h"

namespace lora_kernels::cpu {

// H query heads, of which each H / KV in a row share a key and a value head.
struct AttentionShape {
  int64_t B, H, KV, T, D;
  float scale;
  DType dtype;
  int num_threads;
};

// lse[b, h, t] = log Σ exp(scale q kᵀ) of the row
struct AttentionFwd {
  Heads q, k, v, o;
  float* lse;
  AttentionShape shape;
};

// With p = exp(scale q kᵀ - lse), dp = do vᵀ and ds = p ∘ (dp - Σ do ∘ o of the row):
// dv = pᵀ do; dq = scale ds k; dk = scale dsᵀ q; dk and dv summed over the query heads of theirs.
struct AttentionBwd {
  Heads q, k, v, o, dout, dq, dk, dv;
  const float* lse;
  AttentionShape shape;
};

// One instruction set's build of the kernels. They return false where memory ran out. The results are the same bits for
// any number of threads.
struct AttentionKernels {
  bool (*forward)(const AttentionFwd&);
  bool (*backward)(const AttentionBwd&);
};

}  // namespace lora_kernels::cpu
