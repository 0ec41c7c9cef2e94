// Vectors of kLanes floats, their loads and stores from each storage type, and Philox, for one instruction set.
// Everything is in an unnamed namespace and inlined: a weak symbol built for AVX-512 must never be
// the one the linker keeps for the generic build.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LK_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = LK_LANES;

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vu16 __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class V>
LK_INLINE V load_raw(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
LK_INLINE void store_raw(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}

LK_INLINE vf splat(float v) { return v - vf{}; }
LK_INLINE vu32 splat_u32(uint32_t v) { return v - vu32{}; }
LK_INLINE vu32 select(vu32 mask, vu32 a, vu32 b) { return (mask & a) | (~mask & b); }
// b where one is a NaN.
LK_INLINE vf larger(vf a, vf b) { return (vf)select((vu32)(a > b), (vu32)a, (vu32)b); }
LK_INLINE vu32 widen(vu16 v) { return __builtin_convertvector(v, vu32); }
LK_INLINE vu16 narrow(vu32 v) { return __builtin_convertvector(v, vu16); }

LK_INLINE vf load(const float* p) { return load_raw<vf>(p); }
LK_INLINE void store(float* p, vf v) { store_raw(p, v); }

LK_INLINE vf load(const bf16* p) { return (vf)(widen(load_raw<vu16>(p)) << 16); }

LK_INLINE void store(bf16* p, vf v) {
  const vu32 u = (vu32)v;
  const vu32 nan = (vu32)(v != v) & 0x7fc00000;  // a NaN must not round to infinity or wrap to zero
  store_raw(p, narrow(((u + 0x7fff + ((u >> 16) & 1)) | nan) >> 16));
}

#if defined(__AVX512F__) && LK_LANES == 16
LK_INLINE vf load(const fp16* p) { return (vf)_mm512_cvtph_ps(load_raw<__m256i>(p)); }
LK_INLINE void store(fp16* p, vf v) {
  store_raw(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__) && LK_LANES == 8
LK_INLINE vf load(const fp16* p) { return (vf)_mm256_cvtph_ps(load_raw<__m128i>(p)); }
LK_INLINE void store(fp16* p, vf v) {
  store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
LK_INLINE vf load(const fp16* p) {
  const vu32 h = widen(load_raw<vu16>(p));
  const vu32 magnitude = (h & 0x7fff) << 13;
  // The exponent moves from bias 15 to 127 by a multiplication, which also normalises subnormals.
  const vu32 scaled = (vu32)((vf)magnitude * 0x1p112f);
  const vu32 inf_or_nan = (vu32)(magnitude >= (0x7c00u << 13)) & 0x7f800000;
  return (vf)(scaled | inf_or_nan | ((h & 0x8000) << 16));
}
LK_INLINE void store(fp16* p, vf v) {
  const vu32 u = (vu32)v;
  const vu32 magnitude = u & 0x7fffffff;
  // 0.5f has the exponent at which one unit in the last place of a float is fp16's smallest subnormal.
  const vu32 subnormal = (vu32)((vf)magnitude + 0.5f) - 0x3f000000;
  const vu32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const vu32 is_nan = (vu32)(magnitude > 0x7f800000);
  const vu32 special = 0x7c00 | (is_nan & 0x0200);
  vu32 h = select((vu32)(magnitude < (113u << 23)), subnormal, normal);
  h = select((vu32)(magnitude >= (143u << 23)), special, h);
  store_raw(p, narrow(h | ((u >> 16) & 0x8000)));
}
#endif

// exp(v) for v up to 88: by Cody and Waite's reduction to |r| <= ln 2 / 2 and the terms of its series to r^7 / 7!.
// Below -87, where it would soon be subnormal, 0. A NaN stays one.
LK_INLINE vf exponential(vf v) {
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
  const vf shifted = v * splat(1.44269504f) + splat(0x1.8p23f);
  const vf n = shifted - splat(0x1.8p23f);
  const vf r = (v - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  vf p = splat(1.0f / 5040);
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  const vf power = (vf)(((vu32)shifted << 23) + 0x3f800000);
  return (vf)((vu32)(p * power) & ~(vu32)(v < splat(-87.0f)));
}

// Lane i of the result is all ones where bit (column + i) of `bits` is set. column is a multiple of kLanes. Reads up
// to four bytes, which the processor broadcasts from memory.
LK_INLINE vu32 expand_bits(const uint8_t* bits, int64_t column) {
  uint32_t word;
  memcpy(&word, bits + column / 8, 4);
  vu32 lane_bit;
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1u << i;
  vu32 words = splat_u32(word);
  if (kLanes < 8) words >>= (uint32_t)(column % 8);
  return (vu32)((words & lane_bit) != 0);
}

// Philox works in 64-bit lanes of the widest register that multiplies 32x32 -> 64: the upper halves of the counters
// may hold anything, since the multiplication ignores them.
#if defined(__AVX512F__)
constexpr int kPhiloxLanes = 8;
#elif defined(__AVX2__)
constexpr int kPhiloxLanes = 4;
#else
constexpr int kPhiloxLanes = 2;
#endif
typedef uint64_t vu64 __attribute__((vector_size(kPhiloxLanes * 8)));
typedef uint16_t vlane16 __attribute__((vector_size(kPhiloxLanes * 8)));

LK_INLINE vu64 mul_lo32(vu64 a, uint64_t b) {
#if defined(__AVX512F__)
  return (vu64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (vu64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// Where 16-bit lane >= threshold, in every 16-bit lane.
LK_INLINE vu64 at_least(vu64 v, uint16_t threshold) { return (vu64)((vlane16)v >= (vlane16)(threshold - vlane16{})); }

// Elements that one step of keep_bits covers.
constexpr int64_t kKeepStep = 4 * kPhiloxLanes * 8;

// Keep bits of row m of x: byte g holds those of elements 8 g to 8 g + 7, lowest first. Writes `count` / 8 bytes; count
// is a multiple of kKeepStep.
LK_INLINE void keep_bits(uint64_t seed, uint64_t offset, uint32_t threshold, int64_t m, int64_t count, uint8_t* bytes) {
  vu64 lane;
  for (int i = 0; i < kPhiloxLanes; ++i) lane[i] = 4 * i;
  for (int64_t group = 0; group < count / 8; group += kKeepStep / 8) {
    // Lane i of vector v is counter 4 i + v, so that each lane collects four neighbouring bytes.
    vu64 collected = {};
    for (int v = 0; v < 4; v += 2) {
      vu64 c0[2], c1[2], c2[2], c3[2];  // two chains hide the latency of the multiplications
      for (int u = 0; u < 2; ++u) {
        c0[u] = lane + (uint64_t)(group + v + u);
        c1[u] = (uint64_t)(uint32_t)m - vu64{};
        c2[u] = (uint64_t)(uint32_t)offset - vu64{};
        c3[u] = (offset >> 32) - vu64{};
      }
      uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 7
      for (int round = 0; round < 7; ++round) {
        for (int u = 0; u < 2; ++u) {
          const vu64 p0 = mul_lo32(c0[u], 0xD2511F53u), p1 = mul_lo32(c2[u], 0xCD9E8D57u);
          c0[u] = (p1 >> 32) ^ c1[u] ^ (uint64_t)k0;
          c2[u] = (p0 >> 32) ^ c3[u] ^ (uint64_t)k1;
          c1[u] = p1;
          c3[u] = p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      for (int u = 0; u < 2; ++u) {
        const vu64 bits = (at_least(c0[u], threshold) & 0x00100001u) | (at_least(c1[u], threshold) & 0x00200002u) |
                          (at_least(c2[u], threshold) & 0x00400004u) | (at_least(c3[u], threshold) & 0x00800008u);
        collected |= ((bits | (bits >> 16)) & 0xff) << (8 * (v + u));
      }
    }
    typedef uint32_t vhalf __attribute__((vector_size(kPhiloxLanes * 4)));
    store_raw(bytes + group, __builtin_convertvector(collected, vhalf));
  }
}

}  // namespace
