// The elementwise parts of a decoder: RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), rotary position embedding
// (Su et al. 2021) and the cross-entropy of its logits. All tensors but Heads are contiguous and, unless they have
// another type, all are of one dtype. Arithmetic is fp32, rounded once where stored.
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

// With z = scale * logits:  nll[m] = log sum_v exp z[m, v] - z[m, target[m]]  and, if asked for, its gradient in place:
// logits = scale * (softmax(z) - onehot(target))
struct CrossEntropy {
  void* logits;           // [M, V]
  const int64_t* target;  // each from 0 to V - 1
  float scale;
  bool with_gradient;
  float* nll;
  int64_t M, V;
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
  bool (*cross_entropy)(const CrossEntropy&);
};

}  // namespace lora_kernels::cpu
