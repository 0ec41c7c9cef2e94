// Forward and backward passes of layers that read the same x, in one call each.
#pragma once

#include "lora_linear.h"
#include "weight.h"

namespace lora_kernels::cpu {

// The most layers of a call.
constexpr int kMaxLayers = 8;

// y = column_scale ∘ (x Wᵀ + scaling · (h ∘ lora_e) lora_bᵀ) + bias and h = dropout(x) lora_aᵀ. The rows of a dense W,
// and everything else, are contiguous.
struct Layer {
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

// Layers that read one x [M,K], whose rows are ld_x apart.
struct LayersForward {
  const Layer* layers[kMaxLayers];
  void* y[kMaxLayers];   // [M,N] in the type of x
  float* h[kMaxLayers];  // [M,R] or null
  int count;
  const void* x;
  DType x_dtype;
  int64_t ld_x, M, K;
  DType product_dtype;  // float32, or bfloat16 where x is: see Product::in_dtype
  Dropout dropout;
  int num_threads;
};

// The gradients of what LayersForward computes, but for column_scale's: dy is that of column_scale ∘ (...), times
// column_scale.
struct LayersBackward {
  const Layer* layers[kMaxLayers];
  const void* dy[kMaxLayers];  // [M,N] in the type of x
  int64_t ld_dy[kMaxLayers];
  const float* h[kMaxLayers];
  void* dlora_a[kMaxLayers];  // in the type of lora_a, or null, as the next two
  void* dlora_b[kMaxLayers];
  void* dlora_e[kMaxLayers];
  int count;
  const void* x;  // only read for dlora_a
  DType x_dtype;
  int64_t ld_x, M, K;
  void* dx;  // [M,K], or null
  DType product_dtype;
  Dropout dropout;
  int num_threads;
};

struct Isa;
// By that build's kernels. M, K and all N are at least 1. Return false when memory ran out.
bool layers_forward(const Isa& isa, const LayersForward& p);
bool layers_backward(const Isa& isa, const LayersBackward& p);

}  // namespace lora_kernels::cpu
