// What the *_kernels.cpp share beside their vectors: scratch memory, thread counts, dispatch on storage types.
#pragma once

#include <cstdlib>
#include <cstring>

#include "dtype.h"
#include "scratch.h"
#include "threads.h"
#include "vec.h"

#define LK_CONCAT_(a, b) a##b
#define LK_CONCAT(a, b) LK_CONCAT_(a, b)

namespace lora_kernels::cpu {
namespace {

// Waking a thread costs some microseconds, and far more on a busy machine.
constexpr int64_t kMinMultiplyAdds = 1 << 18;
constexpr int64_t kMinMoves = 1 << 15;

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

LK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LK_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class F>
LK_INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f((float*)nullptr);
    case DType::kBFloat16:
      return f((bf16*)nullptr);
    case DType::kFloat16:
      return f((fp16*)nullptr);
  }
}

template <class T>
LK_INLINE float to_float(const T* p) {
  T lanes[kLanes] = {*p};
  return load(lanes)[0];
}
template <>
LK_INLINE float to_float(const float* p) {
  return *p;
}

template <>
LK_INLINE float to_float(const bf16* p) {
  const uint32_t bits = (uint32_t)p->bits << 16;
  return load_raw<float>(&bits);
}

template <class T>
LK_INLINE void from_float(T* p, float value) {
  T lanes[kLanes];
  store(lanes, splat(value));
  *p = lanes[0];
}
template <>
LK_INLINE void from_float(float* p, float value) {
  *p = value;
}
template <>
LK_INLINE void from_float(bf16* p, float value) {
  const uint32_t u = load_raw<uint32_t>(&value), nan = value != value ? 0x7fc00000 : 0;
  p->bits = (uint16_t)(((u + 0x7fff + ((u >> 16) & 1)) | nan) >> 16);
}

// The first `count` lanes, zeros after them.
template <class T>
LK_INLINE vf load_some(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}
template <class T>
LK_INLINE void store_some(T* p, vf v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, count * sizeof(T));
}

// In pairs: of sixteen lanes added one by one, most would be rounded more often than all that came before them.
LK_INLINE float sum_of_lanes(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// f(i, read, write) for every vector of `size` elements, the last one possibly short.
template <class F>
LK_INLINE void for_each_vector(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    f(i, [](const auto* p) { return load(p); }, [](auto* p, vf v) { store(p, v); });
  if (const int64_t left = size - i)
    f(i, [=](const auto* p) { return load_some(p, left); }, [=](auto* p, vf v) { store_some(p, v, left); });
}

}  // namespace
}  // namespace lora_kernels::cpu
