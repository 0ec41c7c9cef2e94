// __nv_bfloat16, __half, their pairs, and the conversions, rounded to nearest even as the device's. Conversions are
// explicit and there is no arithmetic: what compiles here means the same in CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "engine.h"

namespace lora_kernels::simt {

inline uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
inline float bits_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

inline uint16_t bfloat16_bits(float v) {
  const uint32_t bits = float_bits(v);
  if (v != v) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float bfloat16_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

inline uint16_t half_bits(float v) {
  const uint32_t bits = float_bits(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000)                         // below 2^-14: the sum's last bit is worth 2^-24
    return sign | (float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f));
  const uint32_t rebased = magnitude - (112u << 23);  // exponent bias 127 to 15
  return sign | ((rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}
inline float half_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return bits_float(sign | float_bits(fraction * 0x1p-24f));
  return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace lora_kernels::simt

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) : bits(lora_kernels::simt::bfloat16_bits(v)) {}
  explicit operator float() const { return lora_kernels::simt::bfloat16_float(bits); }
};

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float v) : bits(lora_kernels::simt::half_bits(v)) {}
  explicit operator float() const { return lora_kernels::simt::half_float(bits); }
};

using nv_bfloat16 = __nv_bfloat16;
using half = __half;

inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return static_cast<float>(v); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 v;
  v.bits = bits;
  return v;
}

inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline float __half2float(__half v) { return static_cast<float>(v); }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half v;
  v.bits = bits;
  return v;
}
