#include <cmath>
#include <type_traits>

#include "adamw.h"
#include "numeric.cuh"

namespace lora_kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Up to four elements at i as float32, zeros beyond `count`; one load where `whole`.
template <class T>
__device__ __forceinline__ void load4(float (&v)[4], const T* data, int64_t i, int count, bool whole) {
  if (whole) {
    if constexpr (sizeof(T) == 4) {
      const float4 four = *reinterpret_cast<const float4*>(data + i);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      const uint2 four = *reinterpret_cast<const uint2*>(data + i);
      unpack<T>(v[0], v[1], four.x);
      unpack<T>(v[2], v[3], four.y);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] = e < count ? to_float(data[i + e]) : 0.f;
}

template <class T>
__device__ __forceinline__ void store4(T* data, const float (&v)[4], int64_t i, int count, bool whole) {
  if (whole) {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float4*>(data + i) = make_float4(v[0], v[1], v[2], v[3]);
    else
      *reinterpret_cast<uint2*>(data + i) = make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (e < count) data[i + e] = from_float<T>(v[e]);
}

// fn(pointer of the right type)
template <class Fn>
__device__ __forceinline__ void with_type(void* data, int64_t dtype, Fn fn) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
      return fn(static_cast<float*>(data));
    case DType::kBFloat16:
      return fn(static_cast<__nv_bfloat16*>(data));
    case DType::kFloat16:
      return fn(static_cast<__half*>(data));
  }
}

// The sum of every thread's value, in an order that doesn't vary, for all of them. sums: [kThreads].
template <class Float>
__device__ __forceinline__ Float block_sum(Float value, Float* sums) {
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

__device__ __forceinline__ double power(double base, uint32_t exponent) {
  double result = 1;
  for (; exponent != 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

__device__ __forceinline__ bool is_aligned(const AdamWTensor& t) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad) |
                              reinterpret_cast<uintptr_t>(t.exp_avg) | reinterpret_cast<uintptr_t>(t.exp_avg_sq) |
                              reinterpret_cast<uintptr_t>(t.master);
  return addresses % 16 == 0;
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(AdamWStep p) {
  const AdamWChunk chunk = p.chunks[blockIdx.x];
  const AdamWTensor t = p.tensors[chunk.tensor];
  if (p.partials != nullptr) {
    const int64_t end = min(chunk.start + kAdamWChunk, t.numel);
    const bool aligned = is_aligned(t);
    float sum = 0;
    for (int64_t i = chunk.start + 4 * threadIdx.x; i < end; i += 4 * kThreads) {
      const int count = int(min(end - i, int64_t(4)));
      float grad[4];
      with_type(t.grad, t.grad_dtype, [&](auto* data) { load4(grad, data, i, count, aligned && count == 4); });
#pragma unroll
      for (int e = 0; e < 4; ++e) sum += grad[e] * grad[e];
    }
    sum = block_sum(sum, dynamic_shared<float>());
    if (threadIdx.x == 0) p.partials[blockIdx.x] = sum;
  }
  if (chunk.start == 0 && threadIdx.x == 0) {
    const float step = *t.step + 1;
    *t.step = step;
    const AdamWGroup group = p.groups[t.group];
    AdamWScalars s;
    s.decay = float(1 - group.lr * group.weight_decay);
    s.weight1 = float(1 - group.beta1);
    s.beta2 = float(group.beta2);
    s.weight2 = float(1 - group.beta2);
    s.step_size = float(group.lr / (1 - power(group.beta1, uint32_t(step))));
    s.inv_sqrt_correction2 = float(sqrt(1 / (1 - power(group.beta2, uint32_t(step)))));
    s.eps = float(group.eps);
    p.scalars[chunk.tensor] = s;
  }
}

__global__ void __launch_bounds__(kThreads) step_kernel(AdamWStep p) {
  const AdamWChunk chunk = p.chunks[blockIdx.x];
  const AdamWTensor t = p.tensors[chunk.tensor];
  float clip = 1;
  if (p.partials != nullptr) {
    // Every block adds up all partial sums, in the same order: cheaper than a launch of its own.
    double sum = 0;
    for (int i = threadIdx.x; i < p.count; i += kThreads) sum += p.partials[i];
    const double norm = sqrt(block_sum(sum, dynamic_shared<double>()));
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.grad_norm = float(norm);
    if (!(norm < INFINITY)) {
      if (chunk.start == 0 && threadIdx.x == 0) *t.step -= 1;
      return;
    }
    clip = float(fmin(*p.max_grad_norm / (norm + 1e-6), 1.0));
  }

  const AdamWScalars s = p.scalars[chunk.tensor];
  const int64_t end = min(chunk.start + kAdamWChunk, t.numel);
  const bool aligned = is_aligned(t);
  for (int64_t i = chunk.start + 4 * threadIdx.x; i < end; i += 4 * kThreads) {
    const int count = int(min(end - i, int64_t(4)));
    const bool whole = aligned && count == 4;
    float param[4], grad[4], exp_avg[4], exp_avg_sq[4];
    with_type(t.grad, t.grad_dtype, [&](auto* data) { load4(grad, data, i, count, whole); });
    load4(exp_avg, t.exp_avg, i, count, whole);
    load4(exp_avg_sq, t.exp_avg_sq, i, count, whole);
    with_type(t.param, t.param_dtype, [&](auto* data) {
      load4(param, data, i, count, whole);
      if (t.master == nullptr) return;
      // A parameter that isn't its rounded master any more was set from outside, and that value counts.
      float master[4];
      load4(master, t.master, i, count, whole);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (to_float(from_float<std::remove_pointer_t<decltype(data)>>(master[e])) == param[e]) param[e] = master[e];
    });
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float g = grad[e] * clip;
      exp_avg[e] += s.weight1 * (g - exp_avg[e]);
      exp_avg_sq[e] = s.beta2 * exp_avg_sq[e] + s.weight2 * g * g;
      const float denominator = sqrtf(exp_avg_sq[e]) * s.inv_sqrt_correction2 + s.eps;
      param[e] = s.decay * param[e] - s.step_size * exp_avg[e] / denominator;
    }
    with_type(t.param, t.param_dtype, [&](auto* data) { store4(data, param, i, count, whole); });
    if (t.master != nullptr) store4(t.master, param, i, count, whole);
    store4(t.exp_avg, exp_avg, i, count, whole);
    store4(t.exp_avg_sq, exp_avg_sq, i, count, whole);
  }
}

}  // namespace

cudaError_t adamw_prepare(const AdamWStep& p, cudaStream_t stream) {
  return launch(prepare_kernel, dim3(p.count), dim3(kThreads), sizeof(float) * kThreads, stream, p);
}

cudaError_t adamw_step(const AdamWStep& p, cudaStream_t stream) {
  return launch(step_kernel, dim3(p.count), dim3(kThreads), sizeof(double) * kThreads, stream, p);
}

}  // namespace lora_kernels::cuda
