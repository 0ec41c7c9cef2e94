// AdamW (Loshchilov & Hutter 2019) over many tensors in one call, with clipping by the global norm of their gradients.
// Nothing here knows Python or torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lora_kernels::cpu {

struct AdamWTensor {
  void* param;    // [numel] of param_dtype
  float* master;  // [numel]: the unrounded parameter where param_dtype isn't fp32, else null
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* step;  // steps taken so far; raised by one
  int64_t numel;
  DType param_dtype;
  DType grad_dtype;
  int group;
};

struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
};

// Two passes over the gradients: their norm, then clipping and the step. Where the norm isn't finite nothing but
// grad_norm changes. Results depend neither on num_threads nor on timing.
struct AdamWStep {
  const AdamWTensor* tensors;
  int64_t count;
  const AdamWGroup* groups;
  double max_grad_norm;
  float* grad_norm;  // null: no first pass and no clipping
  int num_threads;
};

// One instruction set's build of the kernel, which returns false when memory ran out.
struct AdamWKernels {
  bool (*step)(const AdamWStep&);
};

}  // namespace lora_kernels::cpu
