// Conversions, guarded loads of eight elements, and the dropout mask.
#pragma once

#include "dtype.cuh"
#include "launch.cuh"
#include "rank_parts.h"

#ifndef LK_SIMT
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lora_kernels::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ __forceinline__ uint32_t bits_of(__half v) { return __half_as_ushort(v); }

// Two elements as tensor cores take them, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(T low, T high) {
  return bits_of(low) | bits_of(high) << 16;
}
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return pack(from_float<T>(low), from_float<T>(high));
}
template <class T>
__device__ __forceinline__ void unpack(float& low, float& high, uint32_t pair);
template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(float& low, float& high, uint32_t pair) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}
template <>
__device__ __forceinline__ void unpack<__half>(float& low, float& high, uint32_t pair) {
  low = __half2float(__ushort_as_half(uint16_t(pair)));
  high = __half2float(__ushort_as_half(uint16_t(pair >> 16)));
}

template <class T>
__device__ __forceinline__ uint4 pack8(const float (&e)[8]) {
  return make_uint4(pack<T>(e[0], e[1]), pack<T>(e[2], e[3]), pack<T>(e[4], e[5]), pack<T>(e[6], e[7]));
}

template <class T>
__device__ __forceinline__ void unpack8(float (&e)[8], uint4 v) {
  unpack<T>(e[0], e[1], v.x);
  unpack<T>(e[2], e[3], v.y);
  unpack<T>(e[4], e[5], v.z);
  unpack<T>(e[6], e[7], v.w);
}

// Element i of a float32 tensor or one of T.
template <class T>
__device__ __forceinline__ float load_any(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kFloat32 ? static_cast<const float*>(data)[i] : to_float(static_cast<const T*>(data)[i]);
}
template <class T>
__device__ __forceinline__ void store_any(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(data)[i] = value;
  else
    static_cast<T*>(data)[i] = from_float<T>(value);
}

// h[m, r] and following, zeros from the count-th on: the parts added up in order; kept, in h.sum, where `keep`.
template <int kRanks>
__device__ __forceinline__ void load_h(float (&e)[kRanks], const RankParts& h, int M, int R, int m, int r, int count,
                                       bool keep) {
  const int64_t first = int64_t(m) * R + r, size = int64_t(M) * R;
#pragma unroll
  for (int i = 0; i < kRanks; ++i) e[i] = 0;
  // Eight loads at once, predicated, since a loop over what is left of the parts would wait for each.
  constexpr int kBatch = 8 / kRanks;
#pragma unroll 1
  for (int part = 0; part < h.splits; part += kBatch) {
    float more[kBatch][kRanks];
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
#pragma unroll
      for (int i = 0; i < kRanks; ++i)
        more[j][i] = part + j < h.splits && i < count ? h.parts[(part + j) * size + first + i] : 0.f;
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
#pragma unroll
      for (int i = 0; i < kRanks; ++i) e[i] += more[j][i];
  }
  if (!keep || h.sum == nullptr) return;
#pragma unroll
  for (int i = 0; i < kRanks; ++i)
    if (i < count) h.sum[first + i] = e[i];
}

// Elements `column` to column + 7 of a row of 16-bit values that ends at `columns`, zeros beyond. kAligned: row and
// columns are multiples of 8 elements, so that one 16-byte load serves.
template <bool kAligned, class T>
__device__ __forceinline__ uint4 load8(const T* row, int column, int columns) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if constexpr (kAligned) {
    if (column < columns) v = *reinterpret_cast<const uint4*>(row + column);
  } else {
    T e[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) e[i] = column + i < columns ? row[column + i] : from_float<T>(0);
    v = make_uint4(pack(e[0], e[1]), pack(e[2], e[3]), pack(e[4], e[5]), pack(e[6], e[7]));
  }
  return v;
}

// The same from a row of float32, rounded to T.
template <class T, bool kAligned>
__device__ __forceinline__ uint4 load8_float(const float* row, int column, int columns) {
  float e[8];
  if constexpr (kAligned) {
    if (column >= columns) return make_uint4(0, 0, 0, 0);
    *reinterpret_cast<float4*>(e) = *reinterpret_cast<const float4*>(row + column);
    *reinterpret_cast<float4*>(e + 4) = *reinterpret_cast<const float4*>(row + column + 4);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) e[i] = column + i < columns ? row[column + i] : 0.f;
  }
  return pack8<T>(e);
}

// lora_kernels.reference.keep_mask: Philox4x32 with seven rounds, one call for eight neighbours of a row.
class KeepMask {
 public:
  // rng: (seed, offset) in device memory, or null where threshold is 0 and nothing is dropped.
  __device__ __forceinline__ KeepMask(const int64_t* rng, uint32_t threshold) : threshold_(threshold) {
    if (threshold == 0) return;
    seed_ = static_cast<uint64_t>(rng[0]);
    offset_ = static_cast<uint64_t>(rng[1]);
  }

  __device__ __forceinline__ bool drops() const { return threshold_ != 0; }

  // Bit j: whether element 8 group + j of row m is kept.
  __device__ __forceinline__ uint32_t bits(uint32_t group, uint32_t m) const {
    uint32_t c0 = group, c1 = m, c2 = static_cast<uint32_t>(offset_), c3 = static_cast<uint32_t>(offset_ >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint32_t hi0 = __umulhi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
      const uint32_t hi1 = __umulhi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
      c0 = hi1 ^ c1 ^ k0;
      c1 = lo1;
      c2 = hi0 ^ c3 ^ k1;
      c3 = lo0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint32_t words[4] = {c0, c1, c2, c3};
    uint32_t result = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      result |= static_cast<uint32_t>((words[j] & 0xffff) >= threshold_) << j;
      result |= static_cast<uint32_t>((words[j] >> 16) >= threshold_) << (j + 4);
    }
    return result;
  }

  // Zeros where elements 8 group to 8 group + 7 of row m are dropped.
  __device__ __forceinline__ uint4 apply(uint4 v, uint32_t group, uint32_t m) const {
    const uint32_t keep = bits(group, m);
    return make_uint4(v.x & pair_mask(keep), v.y & pair_mask(keep >> 2), v.z & pair_mask(keep >> 4),
                      v.w & pair_mask(keep >> 6));
  }

 private:
  __device__ __forceinline__ static uint32_t pair_mask(uint32_t keep) {
    return (keep & 1) * 0xffffu | (keep >> 1 & 1) * 0xffff0000u;
  }

  uint32_t threshold_;
  uint64_t seed_ = 0, offset_ = 0;
};

}  // namespace lora_kernels::cuda
