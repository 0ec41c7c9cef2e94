// Rows of a Weight as floats, for one instruction set.
#pragma once

#include "nf4_decode.h"
#include "weight.h"

namespace lora_kernels::cpu {
namespace {

template <class T>
struct Dense {
  const T* data;
  int64_t ld;
};

// As for an NF4 weight, with a scale of 1.
template <class T, class Chunk, class One>
LK_INLINE void for_row(const Dense<T>& w, int64_t n, int64_t first, int64_t last, Chunk chunk, One one) {
  const T* row = w.data + n * w.ld;
  int64_t k = first;
  for (; k + kChunk <= last; k += kChunk) {
    vf values[kChunkVecs];
    for (int v = 0; v < kChunkVecs; ++v) values[v] = load(row + k + v * kLanes);
    chunk(k, values, splat(1.0f));
  }
  for (; k < last; ++k) one(k, to_float(row + k));
}

// out = scale times columns [first, first + count) of row n, as floats. An NF4 weight has the scale 1.
LK_INLINE void convert_row(const Nf4Weight& w, float, int64_t n, int64_t first, int64_t count, float* out) {
  decode_row(w, n, first, first + count, out);
}
template <class T>
LK_INLINE void convert_row(const Dense<T>& w, float scale, int64_t n, int64_t first, int64_t count, float* out) {
  const T* row = w.data + n * w.ld + first;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, scale * load(row + i));
  for (; i < count; ++i) out[i] = scale * to_float(row + i);
}

template <class F>
void with_dense(const void* data, DType dtype, int64_t ld, F f) {
  with_type(dtype, [&](auto* type) {
    using T = __typeof__(*type);
    f(Dense<T>{(const T*)data, ld});
  });
}

template <class F>
void with_weight(const Weight& w, F f) {
  if (w.dense)
    with_dense(w.dense, w.dense_dtype, w.ld_dense, f);
  else
    f(w.nf4);
}

}  // namespace
}  // namespace lora_kernels::cpu
