// CPU products of few rows with a frozen weight that is NF4 or dense in any storage type: decoded or converted in
// registers.
#pragma once

#include "weight.h"

namespace lora_kernels::cpu {

// Rows up to which LayersForward holds all their sums in registers.
constexpr int kLayerRows = 8;
// The most layers that it takes.
constexpr int kMaxLayers = 8;

// y = column_scale ∘ (x Wᵀ + scaling · (h ∘ lora_e) lora_bᵀ) + bias and h = x lora_aᵀ.
struct FewRowsLayer {
  Weight weight;
  const void* lora_a;  // [R,K]
  DType lora_a_dtype;
  const void* lora_b;  // [N,R]
  DType lora_b_dtype;
  float scaling;
  const void* bias;    // [N] in the type of x, or null
  const void* lora_e;  // [R] or null
  DType lora_e_dtype;
  const float* column_scale;  // [N] or null
  int64_t R;
};

// Layers that read one x [M,K], whose rows are ld_x apart, M <= kLayerRows: one pass over each weight.
struct LayersForward {
  const FewRowsLayer* layers[kMaxLayers];
  void* y[kMaxLayers];   // [M,N] in the type of x
  float* h[kMaxLayers];  // [M,R] or null
  int count;
  const void* x;
  DType x_dtype;
  int64_t ld_x, M, K;
  int num_threads;
};

// One instruction set's build. Returns false when memory ran out.
struct FewRowsKernels {
  bool (*layers_forward)(const LayersForward&);
};

}  // namespace lora_kernels::cpu
