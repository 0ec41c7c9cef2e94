// The elementwise parts of a decoder layer: RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020) and rotary position
// embedding (Su et al. 2021). All tensors but Heads are contiguous and, unless they say float, all are of one dtype.
// Arithmetic is fp32, rounded once where stored.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "heads.h"

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

// With halves 1 and 2 of each row of D:  y1 = x1 * cos1 - x2 * sin1,  y2 = x2 * cos2 + x1 * sin2; or, transposed, what
// gives dx from dy:  y1 = x1 * cos1 + x2 * sin2,  y2 = x2 * cos2 - x1 * sin1
struct Rotary {
  Heads x, y;
  const void* cos;  // [B, T, D], `angle_batch` apart: 0 where one is for all
  const void* sin;
  int64_t angle_batch;
  bool transposed;
  int64_t B, H, T, D;
  DType dtype;
  int num_threads;
};

// One instruction set's build of the kernels, which never run out of memory: all return true.
struct DecoderKernels {
  bool (*rms_norm_fwd)(const RmsNormFwd&);
  bool (*rms_norm_bwd)(const RmsNormBwd&);
  bool (*swiglu_fwd)(const SwigluFwd&);
  bool (*swiglu_bwd)(const SwigluBwd&);
  bool (*rotary)(const Rotary&);
};

}  // namespace lora_kernels::cpu
