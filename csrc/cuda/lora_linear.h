// CUDA kernels of lora_linear. Nothing here knows Python or torch.
//   y = column_scale ∘ (x Wᵀ + scaling · (h ∘ lora_e) lora_bᵀ) + bias,  h = dropout(x) lora_aᵀ
//   dh = scaling · (dy lora_b) ∘ lora_e;  dlora_b = scaling · dyᵀ (h ∘ lora_e);  dlora_e = scaling · Σ_m h ∘ (dy
//   lora_b) dlora_a = dhᵀ dropout(x);  dx = dy W + dropout'(dh lora_a)
// Shapes: x [M,K], weight [N,K], y [M,N], lora_a [R,K], lora_b [N,R], lora_e [R], h and dh [M,R], every extent >= 1.
// `dtype` is that of x, dy, weight, bias, y and dx: bfloat16 or float16. Adapters and their gradients are float32 or of
// that type. Rows of x and dy are ld_* elements apart; what has no stride here is contiguous. Tensor cores multiply in
// `dtype` and accumulate in float32.
#pragma once

#include "dtype.cuh"
#include "few_rows.h"
#include "launch.cuh"
#include "rank_parts.h"

namespace lora_kernels::cuda {

// An element is dropped iff its 16 random bits are below threshold. rng: (seed, offset) in device memory; it may be
// null where threshold is 0, which drops nothing.
struct Dropout {
  const int64_t* rng;
  uint32_t threshold;
};

// Columns of x that a block of lora_h takes at once.
constexpr int kHColumns = 256;
// Rows and ranks that a block of lora_h makes at most.
constexpr int kHRows = 32;
constexpr int kHRanks = 64;

// h_parts [splits,M,R] of dropout(x) lora_aᵀ over blocks of columns_per_split columns, a multiple of kHColumns.
struct LoraH {
  const void* x;
  int64_t ld_x;
  const void* lora_a;
  DType lora_a_dtype;
  float* h_parts;
  int M, K, R, columns_per_split;
  Dropout dropout;
  float scale;  // of what is kept
  DType dtype;
};

// out [M,N] = column_scale ∘ (x [M,K] weightᵀ + dropout(scale · (u ∘ lora_e) v)) + bias, u [M,R] and v [R,N]. Forward:
// x, W, h and lora_bᵀ. Backward: dy, Wᵀ, dh, in one part, and lora_a, with N and K changing places. One stride of
// weight is 1.
struct LoraGemm {
  const void* x;
  int64_t ld_x;
  const void* weight;
  int64_t stride_wn, stride_wk;
  const float* column_scale;  // [N] or null
  const void* bias;           // [N] or null
  RankParts u;
  const void* lora_e;  // [R] or null
  DType lora_e_dtype;
  const void* v;
  DType v_dtype;
  int64_t stride_vr, stride_vn;
  void* out;
  int M, N, K, R;
  float scale;
  Dropout dropout;
  DType dtype;
};

// For lora_few_rows: rows of one element type, ld elements apart.
struct DenseWeight {
  const void* data;
  int64_t ld, N, K;
};

// Of y = column_scale ∘ z + bias: dz = dy ∘ column_scale, contiguous, and dscale_parts [splits,N] of Σ_m dy ∘ z over
// blocks of rows_per_split rows, where z = (y - bias) / column_scale; 0 where column_scale is.
struct ColumnScaleBwd {
  const void* dy;
  int64_t ld_dy;
  const void* y;     // [M,N] contiguous, or null, as dscale_parts then is
  const void* bias;  // [N] or null
  const float* column_scale;
  void* dz;
  float* dscale_parts;
  int M, N;
  int rows_per_split;  // a multiple of kScaleRows
  DType dtype;
};
constexpr int kScaleRows = 8, kScaleColumns = 256;

// Partial sums of dy lora_b over blocks of kDhColumns(R) columns, dh_parts [column_blocks,M,R], and of dyᵀ h over
// blocks of rows_per_split rows, db_parts [splits,N,R]; de_parts [splits,column_blocks,R]. Each is null where not
// needed.
struct LoraDhDloraB {
  const void* dy;
  int64_t ld_dy;
  const float* h;
  const void* lora_b;
  DType lora_b_dtype;
  float* dh_parts;
  float* db_parts;
  float* de_parts;
  int M, N, R;
  int rows_per_split;  // a multiple of kDhRows
  DType dtype;
};
constexpr int kDhRows = 16;
constexpr int dh_columns(int64_t R) { return R > 32 ? 256 : 512; }

// dh, dlora_b and dlora_e: scaling (and lora_e) times the sum of their parts, always in the same order.
struct LoraReduce {
  const float* dh_parts;
  const float* db_parts;
  const float* de_parts;
  float* dh;
  void* dlora_b;
  void* dlora_e;
  DType dlora_b_dtype, dlora_e_dtype;
  const void* lora_e;  // or null
  DType lora_e_dtype;
  int column_blocks, splits;
  int M, N, R;
  float scaling;
  DType dtype;
};

// dlora_a = dhᵀ dropout(x)
struct LoraDloraA {
  const void* x;
  int64_t ld_x;
  const float* dh;
  void* dlora_a;
  DType dlora_a_dtype;
  int M, K, R;
  Dropout dropout;
  float scale;  // of what is kept
  DType dtype;
};

// Each queues one kernel on `stream` of the current device.
cudaError_t lora_h(const LoraH& params, cudaStream_t stream);
cudaError_t lora_gemm(const LoraGemm& params, cudaStream_t stream);
cudaError_t lora_few_rows(const LoraFewRows<DenseWeight>& params, cudaStream_t stream);
cudaError_t column_scale_bwd(const ColumnScaleBwd& params, cudaStream_t stream);
cudaError_t lora_dh_dlora_b(const LoraDhDloraB& params, cudaStream_t stream);
cudaError_t lora_reduce(const LoraReduce& params, cudaStream_t stream);
cudaError_t lora_dlora_a(const LoraDloraA& params, cudaStream_t stream);

}  // namespace lora_kernels::cuda
