// Rows of a Weight as floats, for one instruction set.
#pragma once

#include <type_traits>

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

// Rows of bfloat16 in pairs of vectors, which take a shift and a mask of one load: those of even columns, then those of
// odd ones.
struct Pairs {
  Dense<bf16> weight;
};
constexpr int pairs_order(int i) { return i / (2 * kLanes) * 2 * kLanes + i % kLanes * 2 + i / kLanes % 2; }

template <class Chunk, class One>
LK_INLINE void for_row(const Pairs& w, int64_t n, int64_t first, int64_t last, Chunk chunk, One one) {
  const bf16* row = w.weight.data + n * w.weight.ld;
  int64_t k = first;
  for (; k + kChunk <= last; k += kChunk) {
    vf values[kChunkVecs];
    for (int v = 0; v < kChunkVecs; v += 2) {
      const vu32 pairs = load_raw<vu32>(row + k + v * kLanes);
      values[v] = (vf)(pairs << 16);
      values[v + 1] = (vf)(pairs & 0xffff0000);
    }
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

// The same in bfloat16.
template <class W>
LK_INLINE void narrow_row(const W& w, float scale, int64_t n, int64_t first, int64_t count, bf16* out) {
  if constexpr (std::is_same_v<W, Dense<bf16>>)
    if (scale == 1.0f) {
      memcpy(out, w.data + n * w.ld + first, count * sizeof(bf16));
      return;
    }
  constexpr int64_t kFloats = 256;
  float values[kFloats];
  for (int64_t i = 0; i < count; i += kFloats) {
    const int64_t size = min64(kFloats, count - i);
    convert_row(w, scale, n, first + i, size, values);
    for_each_vector(size, [&](int64_t j, auto read, auto write) { write(out + i + j, read(values + j)); });
  }
}
#if defined(__AVX512F__) && LK_LANES == 16
// NF4: of a block of one scale, the sixteen values are rounded once and then looked up.
LK_INLINE void narrow_row(const Nf4Weight& w, float, int64_t n, int64_t first, int64_t count, bf16* out) {
  const int shift = __builtin_ctzll(w.block_size);
  const int64_t begin = n * w.K + first, end = begin + count;
  for (int64_t i = begin; i < end;) {
    const int64_t block = i >> shift, stop = min64(end, (block + 1) << shift);
    bf16 values[32];
    store(values, splat(scale_of(w, block)) * load(kCode));
    memcpy(values + 16, values, 16 * sizeof(bf16));
    const __m512i table = load_raw<__m512i>(values);
    if (i % 2) {
      out[i - begin] = values[w.packed[i / 2] & 15];
      ++i;
    }
    for (; i + 32 <= stop; i += 32) {
      // Of the two codes in a byte the higher one comes first. The permutation takes the lowest five bits of 16, and
      // the table holds its values twice.
      const __m512i bytes = _mm512_cvtepu8_epi32(load_raw<__m128i>(w.packed + i / 2));
      const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
      store_raw(out + (i - begin), _mm512_permutexvar_epi16(codes, table));
    }
    for (; i < stop; ++i) out[i - begin] = values[i % 2 ? w.packed[i / 2] & 15 : w.packed[i / 2] >> 4];
  }
}
#endif

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
