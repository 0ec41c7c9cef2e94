// Products of any number of rows with frozen weights, which are decoded or converted in cache.
#pragma once

#include "dropout.h"
#include "weight.h"

namespace lora_kernels::cpu {

// scale · in Wᵀ, of `in` [M,K]; in a transposed product scale · in W, of `in` [M,N]. Rows of `in` are ld apart.
// An NF4 weight has the scale 1. Of the product, only what `kept` says is taken; its scale is not.
struct ProductTerm {
  Weight weight;
  const void* in;
  int64_t ld;
  float scale;
  Kept kept = {};
};

// out [M,J] = column_scale ∘ Σ terms + bias, rounded once. No size is 0, and there is a term. With a bfloat16 `in` the
// weights, with their scales, are rounded to bfloat16 too, and products are added up in float32.
struct Product {
  const ProductTerm* terms;
  int count;
  DType in_dtype;  // of all terms: float32 or bfloat16
  bool transposed;
  const float* column_scale;  // [J] or null
  const float* bias;          // [J] or null
  void* out;
  DType out_dtype;
  int64_t ld_out;
  int64_t M, J;
  int num_threads;
};

// out [rows,cols] = in, whose rows are ld apart, in another type. out is contiguous.
struct Convert {
  const void* in;
  DType in_dtype;
  int64_t ld;
  void* out;
  DType out_dtype;
  int64_t rows, cols;
  int num_threads;
};

// One instruction set's build. `product` returns false when memory ran out.
struct ProductKernels {
  bool (*product)(const Product&);  // in_dtype may not be float16
  void (*convert)(const Convert&);
};

}  // namespace lora_kernels::cpu
