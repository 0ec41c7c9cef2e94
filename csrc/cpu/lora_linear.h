// CPU kernels of the low-rank half of lora_linear. Nothing here knows Python or torch.
//   y = column_scale ∘ (x Wᵀ + scaling · ((dropout(x) lora_aᵀ) ∘ lora_e) lora_bᵀ) + bias
// The products with W are product.h's. Shapes: x [M,K], y [M,N], lora_a [R,K], lora_b [N,R], h and dh [M,R].
// Rows of x, y, dx and dy are `ld_*` elements apart with unit column stride; everything else is contiguous.
#pragma once

#include "dropout.h"
#include "dtype.h"

namespace lora_kernels::cpu {

// h = dropout(x) lora_aᵀ
struct LoraAFwd {
  const void* x;
  DType x_dtype;
  int64_t ld_x;
  const void* lora_a;
  DType lora_a_dtype;
  float* h;
  int64_t M, K, R;
  Kept kept;
  int num_threads;
};

// Of y = column_scale ∘ z + bias:  dz = dy ∘ column_scale;  total = Σ_m dy ∘ (y - bias). One pass over dy and y. dz is
// contiguous.
struct ColumnScaleBwd {
  const void* dy;
  int64_t ld_dy;
  const void* y;  // or null, as total then is
  int64_t ld_y;
  const float* bias;  // [N] or null
  const float* column_scale;
  void* dz;
  DType dtype;
  float* total;  // [N]
  int64_t M, N;
  int num_threads;
};

// dh = scaling · dy lora_b;  dlora_b = scaling · dyᵀ h. One pass over dy.
struct LoraBBwd {
  const void* dy;
  DType dy_dtype;
  int64_t ld_dy;
  const float* h;
  const void* lora_b;
  DType lora_b_dtype;
  float scaling;
  float* dh;       // [M,R] or null
  float* dlora_b;  // [N,R] or null
  int64_t M, N, R;
  int num_threads;
};

// dlora_a = dhᵀ dropout(x)
struct LoraABwd {
  const void* x;
  DType x_dtype;
  int64_t ld_x;
  const float* dh;
  float* dlora_a;  // [R,K]
  int64_t M, K, R;
  Kept kept;
  int num_threads;
};

// One instruction set's build. Each returns false when memory ran out.
struct LoraLinearKernels {
  void (*draw_mask)(const DrawMask&);
  bool (*lora_a_fwd)(const LoraAFwd&);
  bool (*lora_b_bwd)(const LoraBBwd&);
  bool (*lora_a_bwd)(const LoraABwd&);
  bool (*column_scale_bwd)(const ColumnScaleBwd&);
};

}  // namespace lora_kernels::cpu
