#include <type_traits>

#include "../nf4_format.h"
#include "dispatch.cuh"
#include "nf4.h"
#include "numeric.cuh"
#include "ptx.cuh"

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

constexpr int kRows = 16;

template <int kTokens>
constexpr size_t linear_shared_bytes() {
  return sizeof(float) * (16 + kWarps * kRows * kTokens);
}

// Elements k to k + 7 of row n, rounded to T, zeros beyond the row: for rows that don't begin with a block.
template <class T>
__device__ __forceinline__ uint4 decode_any(const Nf4Weight& w, const float* code, int64_t n, int k) {
  float v[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    v[e] = 0;
    if (n < w.N && k + e < w.K) {
      const int64_t i = n * w.K + k + e;
      v[e] = __fmul_rn(code[w.packed[i / 2] >> (1 - i % 2) * 4 & 15], absmax_at(w, i >> w.block_shift));
    }
  }
  return pack8<T>(v);
}

// A block makes kRows columns of y for all tokens; its warps divide K. The weight is the A operand, so that one product
// serves 8 tokens. As in h_kernel, the order of the sum is free: a lane takes 32 neighbours of a row, 16 bytes of
// packed values in one block of the weight. kAligned: K is a multiple of 32.
template <class T, int kTokens, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) linear_kernel(Nf4Linear p) {
  float* code = dynamic_shared<float>();
  float* sums = code + 16;  // [kWarps, kTokens, kRows]
  fill_code(code);
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64_t n0 = int64_t(blockIdx.x) * kRows;
  const Nf4Weight& w = p.weight;
  const int K = int(w.K);

  auto load_weight = [&](int k, uint4(&words)[2], float (&absmax)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = n0 + 8 * half + g, i = n * K + k;
      const bool valid = n < w.N && k < K;
      words[half] = valid ? *reinterpret_cast<const uint4*>(w.packed + i / 2) : make_uint4(0, 0, 0, 0);
      absmax[half] = valid ? absmax_at(w, i >> w.block_shift) : 0.f;
    }
  };

  float acc[kTokens / 8][4] = {};
  uint4 words[2], next_words[2];
  float absmax[2], next_absmax[2];
  if constexpr (kAligned) load_weight(128 * warp + 32 * q, next_words, next_absmax);
  for (int k0 = 128 * warp; k0 < K; k0 += 128 * kWarps) {
    const int k = k0 + 32 * q;
    if constexpr (kAligned) {
#pragma unroll
      for (int half = 0; half < 2; ++half) words[half] = next_words[half], absmax[half] = next_absmax[half];
      load_weight(k + 128 * kWarps, next_words, next_absmax);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint4 a[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kAligned) {
          const uint32_t word = c == 0   ? words[half].x
                                : c == 1 ? words[half].y
                                : c == 2 ? words[half].z
                                         : words[half].w;
          float v[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] = __fmul_rn(code[code_in(word, e)], absmax[half]);
          a[half] = pack8<T>(v);
        } else {
          a[half] = decode_any<T>(w, code, n0 + 8 * half + g, k + 8 * c);
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens / 8; ++t) {
        const int m = 8 * t + g;
        const uint4 x = load8<kAligned>(static_cast<const T*>(p.x) + m * p.ld_x, k + 8 * c, m < p.M ? K : 0);
        mma_m16n8k16(acc[t], {a[0].x, a[1].x, a[0].y, a[1].y}, {x.x, x.y}, (T*)nullptr);
        mma_m16n8k16(acc[t], {a[0].z, a[1].z, a[0].w, a[1].w}, {x.z, x.w}, (T*)nullptr);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens / 8; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[(warp * kTokens + 8 * t + 2 * q + e % 2) * kRows + e / 2 * 8 + g] = acc[t][e];
  __syncthreads();

  const int m = threadIdx.x / kRows;
  const int64_t n = n0 + threadIdx.x % kRows;
  if (m >= p.M || n >= w.N) return;
  float y = 0;
  for (int i = 0; i < kWarps; ++i) y += sums[i * kTokens * kRows + threadIdx.x];
  float low_rank = 0;
  for (int r = 0; r < p.R; ++r) {
    float h = p.h[int64_t(m) * p.R + r];
    if (p.lora_e != nullptr) h *= load_any<T>(p.lora_e, p.lora_e_dtype, r);
    low_rank += h * load_any<T>(p.lora_b, p.lora_b_dtype, n * p.R + r);
  }
  y += p.scaling * low_rank;
  if (p.column_scale != nullptr) y *= p.column_scale[n];
  if (p.bias != nullptr) y += to_float(static_cast<const T*>(p.bias)[n]);
  static_cast<T*>(p.y)[m * w.N + n] = from_float<T>(y);
}

static_assert(kThreads >= kRows * kNf4MaxTokens, "one thread for each element of y");

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

cudaError_t nf4_linear(const Nf4Linear& p, cudaStream_t stream) {
  if (p.M > kNf4MaxTokens) return cudaErrorInvalidValue;
  const bool is_aligned = aligned(p.x) && aligned(p.weight.packed) && p.ld_x % 8 == 0 && p.weight.K % 32 == 0;
  const dim3 grid(ceil_div(p.weight.N, int64_t(kRows)));
  return dispatch(p.dtype, is_aligned, [&](auto type, auto flag) {
    using T = typename decltype(type)::type;
    constexpr bool kAligned = decltype(flag)::value;
    return p.M <= 8
               ? launch(linear_kernel<T, 8, kAligned>, grid, dim3(kThreads), linear_shared_bytes<8>(), stream, p)
               : launch(linear_kernel<T, 16, kAligned>, grid, dim3(kThreads), linear_shared_bytes<16>(), stream, p);
  });
}

}  // namespace lora_kernels::cuda
