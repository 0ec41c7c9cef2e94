// CUDA kernels of NF4 weights: quantise, dequantise, and the linear map of a few tokens, which decodes in registers.
// The format is described in lora_kernels/reference.py, class NF4.
#pragma once

#include "dtype.cuh"
#include "few_rows.h"
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

// Each queues one kernel on `stream` of the current device.
cudaError_t nf4_quantize(const Nf4Quantize& params, cudaStream_t stream);
cudaError_t nf4_quantize_absmax(const Nf4QuantizeAbsmax& params, cudaStream_t stream);
cudaError_t nf4_dequantize(const Nf4Dequantize& params, cudaStream_t stream);
cudaError_t nf4_few_rows(const LoraFewRows<Nf4Weight>& params, cudaStream_t stream);

}  // namespace lora_kernels::cuda
