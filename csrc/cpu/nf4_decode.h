// NF4 values from packed bytes, for one instruction set.
#pragma once

#include "../nf4_format.h"
#include "common.h"
#include "nf4.h"

namespace lora_kernels::cpu {
namespace {

constexpr float kCode[16] = {LK_NF4_CODE};
constexpr int kChunk = 32;  // elements that are decoded at once, from 16 bytes
constexpr int kChunkVecs = kChunk / kLanes;

// A stretch of 64 elements decodes in fewer instructions where the order of the values doesn't matter, as in a sum:
// decode_half<h> gives 32 of them, of which number i is the element kStretchOrder.element[32 h + i].
constexpr int kStretch = 64;

// decode: the values of the 32 elements in 16 bytes, in their order, without their scale.
#if defined(__AVX512F__) && LK_LANES == 16
LK_INLINE void decode(const uint8_t* packed, vf (&out)[kChunkVecs]) {
  const __m128i bytes = load_raw<__m128i>(packed), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), odd = _mm_and_si128(bytes, low);
  const __m512 code = load_raw<__m512>(kCode);
  out[0] = (vf)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)), code);
  out[1] = (vf)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd)), code);
}

// The permutation takes a code from the lowest four bits of a lane, whatever is above: each 32 bits of the stretch, in
// both halves of a register, are shifted until all of their eight codes have been there.
template <int kHalf>
LK_INLINE void decode_half(const uint8_t* packed, vf (&out)[kChunkVecs]) {
  const __m512i words = _mm512_broadcast_i64x4(load_raw<__m256i>(packed));
  const __m512i first = _mm512_set_epi64(0x400000004, 0x400000004, 0x400000004, 0x400000004, 0, 0, 0, 0);
  const __m512i codes = _mm512_srlv_epi32(words, first);
  const __m512 code = load_raw<__m512>(kCode);
  out[0] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 16 * kHalf), code);
  out[1] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 16 * kHalf + 8), code);
}
constexpr int stretch_order(int i) {
  const int lane = i % 16, code = 2 * (i / 16) + lane / 8;  // code: which of the eight in 32 bits, from the lowest
  return 8 * (lane % 8) + (code ^ 1);
}
#elif defined(__AVX2__) && LK_LANES == 8
// A byte shuffle looks up 16 entries where a float permutation knows only 8: one for each of a float's four bytes.
struct BytePlanes {
  alignas(16) uint8_t byte[4][16];
  constexpr BytePlanes() : byte() {
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, kCode[i]);
      for (int b = 0; b < 4; ++b) byte[b][i] = (uint8_t)(bits >> (8 * b));
    }
  }
};
constexpr BytePlanes kPlanes;

// The floats at 32 indices. Vector v has those of bytes 4 v to 4 v + 3 in each half of the index.
LK_INLINE void look_up(__m256i index, vf (&out)[kChunkVecs]) {
  __m256i plane[4];
  for (int b = 0; b < 4; ++b)
    plane[b] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_raw<__m128i>(kPlanes.byte[b])), index);
  const __m256i low_lo = _mm256_unpacklo_epi8(plane[0], plane[1]), high_lo = _mm256_unpacklo_epi8(plane[2], plane[3]);
  const __m256i low_hi = _mm256_unpackhi_epi8(plane[0], plane[1]), high_hi = _mm256_unpackhi_epi8(plane[2], plane[3]);
  out[0] = (vf)_mm256_unpacklo_epi16(low_lo, high_lo);
  out[1] = (vf)_mm256_unpackhi_epi16(low_lo, high_lo);
  out[2] = (vf)_mm256_unpacklo_epi16(low_hi, high_hi);
  out[3] = (vf)_mm256_unpackhi_epi16(low_hi, high_hi);
}

LK_INLINE void decode(const uint8_t* packed, vf (&out)[kChunkVecs]) {
  const __m128i bytes = load_raw<__m128i>(packed), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), odd = _mm_and_si128(bytes, low);
  const __m128 first = (__m128)_mm_unpacklo_epi8(even, odd), second = (__m128)_mm_unpackhi_epi8(even, odd);
  // Every second group of four goes to the upper half, so that look_up ends in the right order.
  look_up(_mm256_setr_m128i((__m128i)_mm_shuffle_ps(first, second, 0x88), (__m128i)_mm_shuffle_ps(first, second, 0xdd)),
          out);
}

// The higher half of every byte, then the lower one.
template <int kHalf>
LK_INLINE void decode_half(const uint8_t* packed, vf (&out)[kChunkVecs]) {
  const __m256i bytes = load_raw<__m256i>(packed);
  look_up(_mm256_and_si256(kHalf ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15)), out);
}
constexpr int stretch_order(int i) {
  const int half = i / 32, vector = i % 32 / 8, lane = i % 8;
  return 2 * (16 * (lane / 4) + 4 * vector + lane % 4) + half;
}
#else
LK_INLINE void decode(const uint8_t* packed, vf (&out)[kChunkVecs]) {
  float values[kChunk];
  for (int j = 0; j < kChunk / 2; ++j) {
    values[2 * j] = kCode[packed[j] >> 4];
    values[2 * j + 1] = kCode[packed[j] & 15];
  }
  for (int v = 0; v < kChunkVecs; ++v) out[v] = load(values + v * kLanes);
}

template <int kHalf>
LK_INLINE void decode_half(const uint8_t* packed, vf (&out)[kChunkVecs]) {
  decode(packed + kHalf * kChunk / 2, out);
}
constexpr int stretch_order(int i) { return i; }
#endif

LK_INLINE float code_at(const uint8_t* packed, int64_t i) {
  return kCode[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

LK_INLINE float scale_of(const Nf4Weight& w, int64_t block) {
  if (!w.absmax_scale) return ((const float*)w.absmax)[block];
  float scale = w.absmax_code[((const uint8_t*)w.absmax)[block]] * w.absmax_scale[block / kAbsmaxBlock];
  // The format rounds the product before the sum: hide it from the compiler, which would fuse the two.
  __asm__("" : "+m"(scale));
  return scale + *w.absmax_offset;
}

// Calls chunk(k, vectors, scale) or one(k, value) for all columns k in [first, last) of row n, in order.
template <class Chunk, class One>
LK_INLINE void for_row(const Nf4Weight& w, int64_t n, int64_t first, int64_t last, Chunk chunk, One one) {
  const int shift = __builtin_ctzll(w.block_size);
  const int64_t start = n * w.K;
  for (int64_t i = start + first, end = start + last; i < end;) {
    const int64_t block = i >> shift, stop = min64(end, (block + 1) << shift);
    const float scale = scale_of(w, block);
    if (i % 2) {
      one(i - start, scale * code_at(w.packed, i));
      ++i;
    }
    for (; i + kChunk <= stop; i += kChunk) {
      vf values[kChunkVecs];
      decode(w.packed + i / 2, values);
      chunk(i - start, values, splat(scale));
    }
    for (; i < stop; ++i) one(i - start, scale * code_at(w.packed, i));
  }
}

struct StretchOrder {
  uint8_t element[kStretch];
  constexpr StretchOrder() : element() {
    for (int i = 0; i < kStretch; ++i) element[i] = stretch_order(i);
  }
};
constexpr StretchOrder kStretchOrder;

// A weight whose rows are whole stretches, each in one block. Values come in the order of kStretchOrder.
struct Stretches {
  const Nf4Weight& weight;

  static bool fit(const Nf4Weight& w) { return w.block_size >= kStretch && w.K % kStretch == 0; }
};

template <class Chunk, class One>
LK_INLINE void for_row(const Stretches& w, int64_t n, int64_t first, int64_t last, Chunk chunk, One) {
  const int shift = __builtin_ctzll(w.weight.block_size);
  const int64_t start = n * w.weight.K;
  for (int64_t i = start + first, end = start + last; i < end;) {
    const int64_t block = i >> shift, stop = min64(end, (block + 1) << shift);
    const vf scale = splat(scale_of(w.weight, block));
    for (; i < stop; i += kStretch) {
      vf values[kChunkVecs];
      decode_half<0>(w.weight.packed + i / 2, values);
      chunk(i - start, values, scale);
      decode_half<1>(w.weight.packed + i / 2, values);
      chunk(i - start + kChunk, values, scale);
    }
  }
}

// Writes columns [first, last) of row n to out.
template <class T>
LK_INLINE void decode_row(const Nf4Weight& w, int64_t n, int64_t first, int64_t last, T* out) {
  for_row(
      w, n, first, last,
      [&](int64_t k, const vf(&values)[kChunkVecs], vf scale) {
        for (int v = 0; v < kChunkVecs; ++v) store(out + (k - first) + v * kLanes, scale * values[v]);
      },
      [&](int64_t k, float value) { from_float(out + (k - first), value); });
}

}  // namespace
}  // namespace lora_kernels::cpu
