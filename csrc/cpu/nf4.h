// CPU kernels of NF4 weights: quantise and dequantise. The format is described in lora_kernels/reference.py, class NF4.
#pragma once

#include "dtype.h"

namespace lora_kernels::cpu {

struct Nf4Weight {
  const uint8_t* packed;
  const void* absmax;          // float [blocks], or uint8 [blocks] under double quantisation
  const float* absmax_scale;   // [(blocks + 255) / 256], or null without double quantisation
  const float* absmax_code;    // [256], the dynamic 8-bit code
  const float* absmax_offset;  // [1]
  int64_t block_size;
  int64_t N, K;
};

// packed and absmax of `size` elements. An absmax is not finite iff an element of its block is not.
struct Nf4Quantize {
  const void* weight;
  DType weight_dtype;
  int64_t size;
  int64_t block_size;
  uint8_t* packed;
  float* absmax;
  int num_threads;
};

// codes and scales of absmax - offset, in blocks of 256.
struct Nf4QuantizeAbsmax {
  const float* absmax;
  int64_t blocks;
  float absmax_offset;
  const float* absmax_code;
  uint8_t* codes;
  float* absmax_scale;
};

// out[n - row_first, k - col_first] = W[n, k] for rows and columns of the ranges, rounded once.
struct Nf4Dequantize {
  Nf4Weight weight;
  int64_t row_first, row_last, col_first, col_last;
  void* out;
  DType out_dtype;
  int64_t ld_out;
  int num_threads;
};

// One instruction set's build.
struct Nf4Kernels {
  bool (*quantize)(const Nf4Quantize&);
  bool (*quantize_absmax)(const Nf4QuantizeAbsmax&);
  bool (*dequantize)(const Nf4Dequantize&);
};

}  // namespace lora_kernels::cpu
