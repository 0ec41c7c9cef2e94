// CUDA kernels of NF4 weights: quantise, dequantise, and the linear map of a few tokens, which decodes in registers.
// The format is described in lora_kernels/reference.py, class NF4.
#pragma once

#include "dtype.cuh"
#include "launch.cuh"

namespace lora_kernels::cuda {

struct Nf4Weight {
  const uint8_t* packed;
  const void* absmax;          // float [blocks], or uint8 [blocks] under double quantisation
  const float* absmax_scale;   // [(blocks + 255) / 256], or null without double quantisation
  const float* absmax_code;    // [256], the dynamic 8-bit code
  const float* absmax_offset;  // [1]
  int block_shift;             // log2 of the block size, 5 to 12
  int64_t N, K;
};

// packed and absmax of `size` elements. An absmax is not finite iff an element of its block is not.
struct Nf4Quantize {
  const void* weight;
  DType dtype;
  int64_t size;
  int block_shift;
  uint8_t* packed;
  float* absmax;
};

// codes and scales of absmax - offset, in blocks of 256.
struct Nf4QuantizeAbsmax {
  const float* absmax;
  int64_t blocks;
  const float* absmax_offset;
  const float* absmax_code;
  uint8_t* codes;
  float* absmax_scale;
};

// out [N,K] contiguous, rounded once.
struct Nf4Dequantize {
  Nf4Weight weight;
  void* out;
  DType dtype;
};

// y [M,N] = column_scale ∘ (x [M,K] Wᵀ + scaling · (h ∘ lora_e) lora_bᵀ) + bias for M <= kNf4MaxTokens, W rounded to
// dtype (bfloat16 or float16, that of x, bias and y) as in the dense product. h [M,R] float32, lora_b [N,R]; R may be
// 0.
struct Nf4Linear {
  Nf4Weight weight;
  const void* x;
  int64_t ld_x;
  const float* column_scale;  // or null
  const void* bias;           // or null
  const float* h;
  const void* lora_b;
  DType lora_b_dtype;
  const void* lora_e;  // or null
  DType lora_e_dtype;
  void* y;
  int M, R;
  float scaling;
  DType dtype;
};
constexpr int kNf4MaxTokens = 16;

// Each queues one kernel on `stream` of the current device.
cudaError_t nf4_quantize(const Nf4Quantize& params, cudaStream_t stream);
cudaError_t nf4_quantize_absmax(const Nf4QuantizeAbsmax& params, cudaStream_t stream);
cudaError_t nf4_dequantize(const Nf4Dequantize& params, cudaStream_t stream);
cudaError_t nf4_linear(const Nf4Linear& params, cudaStream_t stream);

}  // namespace lora_kernels::cuda
