// The elementwise parts of a decoder layer: RMSNorm (Zhang & Sennrich 2019) and SwiGLU (Shazeer 2020).
// All tensors are contiguous and, unless they say float, of one dtype. Arithmetic is fp32, rounded once where stored.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lora_kernels::cpu {

// rstd[m] = 1 / sqrt(mean_k x[m, k]^2 + eps);  y = x * rstd * (offset + weight)
struct RmsNormFwd {
  const void* x;  // [M, K]
  const void* weight;
  float eps, offset;
  void* y;
  float* rstd;
  int64_t M, K;
  DType dtype;
  int num_threads;
};

// g = dy * (offset + weight);  dx = rstd * g - x * rstd^3 * mean_k(g * x)
struct RmsNormBwd {
  const void* dy;
  const void* x;
  const float* rstd;
  const void* weight;
  float offset;
  void* dx;
  int64_t M, K;
  DType dtype;
  int num_threads;
};

// y = gate * sigmoid(gate) * up
struct SwigluFwd {
  const void* gate;  // [size]
  const void* up;
  void* y;
  int64_t size;
  DType dtype;
  int num_threads;
};

struct SwigluBwd {
  const void* dy;
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
  int64_t size;
  DType dtype;
  int num_threads;
};

// One instruction set's build of the kernels, which never run out of memory: all return true.
struct DecoderKernels {
  bool (*rms_norm_fwd)(const RmsNormFwd&);
  bool (*rms_norm_bwd)(const RmsNormBwd&);
  bool (*swiglu_fwd)(const SwigluFwd&);
  bool (*swiglu_bwd)(const SwigluBwd&);
};

}  // namespace lora_kernels::cpu
