#include <type_traits>

#include "../nf4_format.h"
#include "dispatch.cuh"
#include "few_rows.cuh"
#include "nf4.h"
#include "numeric.cuh"

namespace lora_kernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// i is a constant wherever this is called.
__host__ __device__ constexpr float nf4_code(int i) {
  constexpr float values[16] = {LK_NF4_CODE};
  return values[i];
}

__constant__ float kNf4Code[16] = {LK_NF4_CODE};

// code[0..15] = the values: lanes look up different ones, which constant memory would serve one after the other. The
// caller synchronises.
__device__ __forceinline__ void fill_code(float* code) {
  if (threadIdx.x < 16) code[threadIdx.x] = kNf4Code[threadIdx.x];
}

// Scale of block `block`.
__device__ __forceinline__ float absmax_at(const Nf4Weight& w, int64_t block) {
  if (w.absmax_scale == nullptr) return static_cast<const float*>(w.absmax)[block];
  const float code = w.absmax_code[static_cast<const uint8_t*>(w.absmax)[block]];
  // Rounded twice, as the format says: no fused multiply-add.
  return __fadd_rn(__fmul_rn(code, w.absmax_scale[block / kAbsmaxBlock]), *w.absmax_offset);
}

// Element e of the eight in a word of packed values: the high half of a byte comes first.
__device__ __forceinline__ int code_in(uint32_t word, int e) { return word >> (e / 2 * 8 + (1 - e % 2) * 4) & 15; }

template <class T>
__device__ __forceinline__ void load_floats(float (&v)[8], const T* source, int64_t i, int64_t size) {
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = i + e < size ? to_float(source[i + e]) : 0.f;
}

// As bits, magnitudes compare as integers, and a NaN is larger than infinity: it is never lost.
__device__ __forceinline__ uint32_t magnitude(const float (&v)[8]) {
  uint32_t largest = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) largest = max(largest, __float_as_uint(v[e]) & 0x7fffffffu);
  return largest;
}

__device__ __forceinline__ uint32_t largest_of(uint32_t value, int lanes) {
  for (int step = 1; step < lanes; step *= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

__device__ __forceinline__ float reciprocal(float absmax) { return __fdiv_rn(1.f, fmaxf(absmax, kSmallestAbsmax)); }

// A warp takes 256 elements at a time, 8 a lane: several blocks of the weight, or a part of one, which it reads twice.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(Nf4Quantize p) {
  const int lane = threadIdx.x % 32, block_size = 1 << p.block_shift;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t span = max(block_size, 256), first = warp * span;
  const T* weight = static_cast<const T*>(p.weight);
  float v[8];
  uint32_t bits = 0;
  for (int64_t i = first + 8 * lane; i < first + span; i += 256) {
    load_floats(v, weight, i, p.size);
    bits = max(bits, magnitude(v));
  }
  const int lanes = min(block_size / 8, 32);
  const float absmax = __uint_as_float(largest_of(bits, lanes));
  const int64_t own = first + 8 * lane;
  if (lane % lanes == 0 && own < p.size) p.absmax[own >> p.block_shift] = absmax;

  const float inverse = reciprocal(absmax);
  for (int64_t i = own; i < first + span; i += 256) {
    if (span > 256) load_floats(v, weight, i, p.size);
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float scaled = __fmul_rn(v[e], inverse);
      uint32_t code = 0;
#pragma unroll
      for (int c = 0; c < 15; ++c) code += scaled > (nf4_code(c) + nf4_code(c + 1)) / 2;
      word |= code << (e / 2 * 8 + (1 - e % 2) * 4);
    }
    if (i + 8 <= p.size) {
      *reinterpret_cast<uint32_t*>(p.packed + i / 2) = word;
    } else {
      for (int64_t byte = i / 2; byte < (p.size + 1) / 2; ++byte, word >>= 8) p.packed[byte] = uint8_t(word);
    }
  }
}

// One warp for 256 scales.
__global__ void __launch_bounds__(kThreads) quantize_absmax_kernel(Nf4QuantizeAbsmax p) {
  const int lane = threadIdx.x % 32;
  const int64_t block = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, i = block * kAbsmaxBlock + 8 * lane;
  float v[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = i + e < p.blocks ? __fsub_rn(p.absmax[i + e], *p.absmax_offset) : 0.f;
  const float absmax = __uint_as_float(largest_of(magnitude(v), 32));
  if (lane == 0 && i < p.blocks) p.absmax_scale[block] = absmax;
  const float inverse = reciprocal(absmax);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float scaled = __fmul_rn(v[e], inverse);
    int code = 0;  // how many midpoints between neighbours lie below
    for (int step = 128; step > 0; step /= 2) {
      const int middle = code + step;
      if (scaled > __fmul_rn(__fadd_rn(p.absmax_code[middle - 1], p.absmax_code[middle]), 0.5f)) code = middle;
    }
    if (i + e < p.blocks) p.codes[i + e] = uint8_t(code);
  }
}

// Eight elements a thread, which one block of the weight holds.
template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(Nf4Dequantize p) {
  float* code = dynamic_shared<float>();
  fill_code(code);
  __syncthreads();
  const int64_t size = p.weight.N * p.weight.K, i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= size) return;
  const float absmax = absmax_at(p.weight, i >> p.weight.block_shift);
  T* out = static_cast<T*>(p.out) + i;
  if (i + 8 <= size) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(p.weight.packed + i / 2);
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = __fmul_rn(code[code_in(word, e)], absmax);
    if constexpr (std::is_same_v<T, float>) {
      reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
      *reinterpret_cast<uint4*>(out) = pack8<T>(v);
    }
  } else {
    for (int e = 0; e < size - i; ++e)
      out[e] = from_float<T>(__fmul_rn(code[p.weight.packed[(i + e) / 2] >> (1 - e % 2) * 4 & 15], absmax));
  }
}

// For few_rows_kernel: a lane's 32 columns of W are neighbours.
class Nf4Source {
 public:
  using Weight = Nf4Weight;
  static constexpr int kSharedFloats = 16, kBlocks = 3;

  __device__ __forceinline__ Nf4Source(const Nf4Weight& weight, float* shared) : w_(weight), code_(shared) {
    fill_code(shared);
    __syncthreads();
  }
  __device__ __forceinline__ static int column(int q, int c) { return 32 * q + 8 * c; }

 protected:
  const Nf4Weight& w_;
  const float* code_;
};

// For rows that are multiples of 32 elements: a lane's columns are 16 bytes of packed values in one block of the
// weight.
template <class T>
class Nf4Words : public Nf4Source {
 public:
  using Nf4Source::Nf4Source;
  static constexpr bool kAligned = true;
  struct Loaded {
    uint4 words;
    float absmax;
  };

  __device__ __forceinline__ Loaded load(int64_t n, int k, int q) const {
    const int K = int(w_.K);
    const int64_t i = n * K + k + 32 * q;
    if (n >= w_.N || k + 32 * q >= K) return {make_uint4(0, 0, 0, 0), 0.f};
    return {*reinterpret_cast<const uint4*>(w_.packed + i / 2), absmax_at(w_, i >> w_.block_shift)};
  }

  __device__ __forceinline__ uint4 chunk(const Loaded& from, int c) const {
    const uint4& words = from.words;
    const uint32_t word = c == 0 ? words.x : c == 1 ? words.y : c == 2 ? words.z : words.w;
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = __fmul_rn(code_[code_in(word, e)], from.absmax);
    return pack8<T>(v);
  }
};

// For rows that don't begin with a block: element by element, and only when a chunk is wanted.
template <class T>
class Nf4Elements : public Nf4Source {
 public:
  using Nf4Source::Nf4Source;
  static constexpr bool kAligned = false;
  struct Loaded {
    int64_t n;
    int k;
  };

  __device__ __forceinline__ Loaded load(int64_t n, int k, int q) const { return {n, k + 32 * q}; }

  __device__ __forceinline__ uint4 chunk(const Loaded& from, int c) const {
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int k = from.k + 8 * c + e;
      v[e] = 0;
      if (from.n < w_.N && k < w_.K) {
        const int64_t i = from.n * w_.K + k;
        v[e] = __fmul_rn(code_[w_.packed[i / 2] >> (1 - i % 2) * 4 & 15], absmax_at(w_, i >> w_.block_shift));
      }
    }
    return pack8<T>(v);
  }
};

}  // namespace

cudaError_t nf4_quantize(const Nf4Quantize& p, cudaStream_t stream) {
  const int64_t span = max(int64_t(1) << p.block_shift, int64_t(256)) * kWarps;
  const dim3 grid(ceil_div(p.size, span));
  switch (p.dtype) {
    case DType::kFloat32:
      return launch(quantize_kernel<float>, grid, dim3(kThreads), 0, stream, p);
    case DType::kBFloat16:
      return launch(quantize_kernel<__nv_bfloat16>, grid, dim3(kThreads), 0, stream, p);
    case DType::kFloat16:
      return launch(quantize_kernel<__half>, grid, dim3(kThreads), 0, stream, p);
  }
  return cudaErrorInvalidValue;
}

cudaError_t nf4_quantize_absmax(const Nf4QuantizeAbsmax& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.blocks, int64_t(kAbsmaxBlock * kWarps)));
  return launch(quantize_absmax_kernel, grid, dim3(kThreads), 0, stream, p);
}

cudaError_t nf4_dequantize(const Nf4Dequantize& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.weight.N * p.weight.K, int64_t(8 * kThreads)));
  const size_t shared = sizeof(float) * 16;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch(dequantize_kernel<float>, grid, dim3(kThreads), shared, stream, p);
    case DType::kBFloat16:
      return launch(dequantize_kernel<__nv_bfloat16>, grid, dim3(kThreads), shared, stream, p);
    case DType::kFloat16:
      return launch(dequantize_kernel<__half>, grid, dim3(kThreads), shared, stream, p);
  }
  return cudaErrorInvalidValue;
}

cudaError_t nf4_few_rows(const LoraFewRows<Nf4Weight>& p, cudaStream_t stream) {
  const bool is_aligned = aligned(p.x) && aligned(p.weight.packed) && p.ld_x % 8 == 0 && p.weight.K % 32 == 0;
  return dispatch(p.dtype, is_aligned, [&](auto type, auto flag) {
    using T = typename decltype(type)::type;
    using Source = std::conditional_t<decltype(flag)::value, Nf4Words<T>, Nf4Elements<T>>;
    return launch_few_rows<Source, T>(p, stream);
  });
}

}  // namespace lora_kernels::cuda
