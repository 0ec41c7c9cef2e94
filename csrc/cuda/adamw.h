// AdamW (Loshchilov & Hutter 2019) over many tensors in two launches, with clipping by the global norm of their
// gradients. The formula is lora_kernels/reference.py, adamw_step. All tables are in device memory, so that a CUDA
// graph can hold a step, and only pointers are passed.
#pragma once

#include "dtype.cuh"
#include "launch.cuh"

namespace lora_kernels::cuda {

// A row of the table of tensors, as Python writes it: int64 throughout, addresses included.
struct AdamWTensor {
  void* param;  // [numel] of param_dtype
  void* grad;   // [numel] of grad_dtype
  float* exp_avg;
  float* exp_avg_sq;
  float* step;    // steps taken so far; raised by one
  float* master;  // [numel]: the unrounded parameter where param_dtype isn't float32, else null
  int64_t numel;
  int64_t param_dtype, grad_dtype;
  int64_t group;
};

// kAdamWChunk elements of a tensor, from `start`, which one block works on. Every tensor has the chunk with start 0,
// also an empty one.
struct AdamWChunk {
  int64_t tensor, start;
};
constexpr int64_t kAdamWChunk = 8192;

struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
};

// What the step needs of a tensor's group and step.
struct AdamWScalars {
  float decay, weight1, beta2, weight2, step_size, inv_sqrt_correction2, eps;
};

struct AdamWStep {
  const AdamWTensor* tensors;
  const AdamWChunk* chunks;
  const AdamWGroup* groups;
  AdamWScalars* scalars;        // [tensors], written by adamw_prepare
  float* partials;              // [chunks], sums of squares; null: no clipping, and no check of the norm
  const double* max_grad_norm;  // [1], where there is clipping
  float* grad_norm;             // [1], likewise
  int count;                    // of chunks
};

// Queued one after the other on `stream` of the current device: sums of squares, scalars, steps raised; then the step.
// Where the norm isn't finite, nothing but grad_norm changes.
cudaError_t adamw_prepare(const AdamWStep& params, cudaStream_t stream);
cudaError_t adamw_step(const AdamWStep& params, cudaStream_t stream);

}  // namespace lora_kernels::cuda
