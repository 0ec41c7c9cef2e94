// CUDA's short vectors and pairs. Copying one checks that both addresses are aligned to its size, as the device does.
#pragma once

#include "engine.h"
#include "half.h"

#define LK_CHECK_ALIGNMENT(name)                                                       \
  void check(const name& other, lora_kernels::simt::Site site) const {                 \
    lora_kernels::simt::check_alignment(&other, sizeof(name), "load of " #name, site); \
    lora_kernels::simt::check_alignment(this, sizeof(name), "store of " #name, site);  \
  }

#define LK_VECTOR2(name, T)                                       \
  struct alignas(2 * sizeof(T)) name {                            \
    T x, y;                                                       \
    name() = default;                                             \
    name(T x, T y) : x(x), y(y) {}                                \
    name(const name& other, lora_kernels::simt::Site site = {}) { \
      check(other, site);                                         \
      x = other.x, y = other.y;                                   \
    }                                                             \
    name& operator=(const name& other) {                          \
      check(other, {});                                           \
      x = other.x, y = other.y;                                   \
      return *this;                                               \
    }                                                             \
    LK_CHECK_ALIGNMENT(name)                                      \
  };                                                              \
  inline name make_##name(T x, T y) { return {x, y}; }

#define LK_VECTOR4(name, T)                                       \
  struct alignas(4 * sizeof(T)) name {                            \
    T x, y, z, w;                                                 \
    name() = default;                                             \
    name(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}          \
    name(const name& other, lora_kernels::simt::Site site = {}) { \
      check(other, site);                                         \
      x = other.x, y = other.y, z = other.z, w = other.w;         \
    }                                                             \
    name& operator=(const name& other) {                          \
      check(other, {});                                           \
      x = other.x, y = other.y, z = other.z, w = other.w;         \
      return *this;                                               \
    }                                                             \
    LK_CHECK_ALIGNMENT(name)                                      \
  };                                                              \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

LK_VECTOR2(uchar2, unsigned char)
LK_VECTOR4(uchar4, unsigned char)
LK_VECTOR2(ushort2, unsigned short)
LK_VECTOR4(ushort4, unsigned short)
LK_VECTOR2(int2, int)
LK_VECTOR4(int4, int)
LK_VECTOR2(uint2, unsigned)
LK_VECTOR4(uint4, unsigned)
LK_VECTOR2(float2, float)
LK_VECTOR4(float4, float)
LK_VECTOR2(__nv_bfloat162, __nv_bfloat16)
LK_VECTOR2(__half2, __half)

#undef LK_CHECK_ALIGNMENT
#undef LK_VECTOR2
#undef LK_VECTOR4

inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
