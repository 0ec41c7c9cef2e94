// The NF4 codec, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
#include "nf4_decode.h"

namespace lora_kernels::cpu {
namespace {

// Where a code ends and the next one begins: the code of v is the number of them that v is above.
constexpr float threshold(int t) { return (kCode[t] + kCode[t + 1]) / 2; }

// The code of each lane, of a value scaled to [-1, 1]; 0 for NaN.
#if defined(__AVX2__) && (LK_LANES == 8 || (defined(__AVX512F__) && LK_LANES == 16))
LK_INLINE vf pick(const float* table, vi32 index) {
#if LK_LANES == 8
  return (vf)_mm256_permutevar8x32_ps(load_raw<__m256>(table), (__m256i)index);
#else
  return (vf)_mm512_permutexvar_ps((__m512i)index, load_raw<__m512>(table));
#endif
}

// A binary search: a permutation picks each lane's next threshold.
LK_INLINE vi32 codes_of(vf v) {
  constexpr float kSecond[kLanes] = {threshold(3), threshold(11)};
  constexpr float kThird[kLanes] = {threshold(1), threshold(5), threshold(9), threshold(13)};
  constexpr float kFourth[kLanes] = {threshold(0), threshold(2),  threshold(4),  threshold(6),
                                     threshold(8), threshold(10), threshold(12), threshold(14)};
  vi32 code = -(vi32)(v > splat(threshold(7)));
  code = code + code - (vi32)(v > pick(kSecond, code));
  code = code + code - (vi32)(v > pick(kThird, code));
  return code + code - (vi32)(v > pick(kFourth, code));
}

LK_INLINE void pack_codes(const vi32 (&codes)[kChunkVecs], uint8_t* packed) {
#if LK_LANES == 8
  const __m256i first = _mm256_packus_epi32((__m256i)codes[0], (__m256i)codes[1]);
  const __m256i second = _mm256_packus_epi32((__m256i)codes[2], (__m256i)codes[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order);
#else
  const __m256i bytes =
      _mm256_setr_m128i(_mm512_cvtepi32_epi8((__m512i)codes[0]), _mm512_cvtepi32_epi8((__m512i)codes[1]));
#endif
  // The first of two goes to the upper half of a byte.
  const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
  store_raw(packed, _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
#else
LK_INLINE vi32 codes_of(vf v) {
  vi32 code = {};
#pragma GCC unroll 15
  for (int t = 0; t < 15; ++t) code -= (vi32)(v > splat(threshold(t)));
  return code;
}

LK_INLINE void pack_codes(const vi32 (&codes)[kChunkVecs], uint8_t* packed) {
  int32_t each[kChunk];
  memcpy(each, codes, sizeof(each));
  for (int j = 0; j < kChunk / 2; ++j) packed[j] = (uint8_t)(each[2 * j] << 4 | each[2 * j + 1]);
}
#endif

template <class T>
float quantize_block(const T* weight, int64_t size, uint8_t* packed) {
  // Largest magnitude by bits: NaN is above infinity, which is above all others.
  vi32 most = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const vi32 bits = (vi32)load(weight + i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  T tail[kLanes] = {};
  if (i < size) {
    memcpy(tail, weight + i, (size - i) * sizeof(T));
    const vi32 bits = (vi32)load(tail) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  float absmax;
  memcpy(&absmax, &largest, 4);
  const vf inverse = splat(1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax));

  auto chunk = [&](const T* from, uint8_t* to) {
    vi32 codes[kChunkVecs];
    for (int v = 0; v < kChunkVecs; ++v) codes[v] = codes_of(load(from + v * kLanes) * inverse);
    pack_codes(codes, to);
  };
  int64_t first = 0;
  for (; first + kChunk <= size; first += kChunk) chunk(weight + first, packed + first / 2);
  if (first < size) {
    // Zeros follow the last element, as in the other implementations: an odd size leaves half a byte.
    T rest[kChunk] = {};
    uint8_t bytes[kChunk / 2];
    memcpy(rest, weight + first, (size - first) * sizeof(T));
    chunk(rest, bytes);
    memcpy(packed + first / 2, bytes, (size - first + 1) / 2);
  }
  return absmax;
}

bool quantize(const Nf4Quantize& p) {
  const int64_t blocks = (p.size + p.block_size - 1) / p.block_size;
  const int threads = thread_count(p.num_threads, blocks, p.size, kMinMoves);
  with_type(p.weight_dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * p.block_size;
      p.absmax[block] =
          quantize_block((const T*)p.weight + first, min64(p.block_size, p.size - first), p.packed + first / 2);
    }
  });
  return true;
}

bool quantize_absmax(const Nf4QuantizeAbsmax& p) {
  for (int64_t first = 0; first < p.blocks; first += kAbsmaxBlock) {
    const int64_t last = min64(p.blocks, first + kAbsmaxBlock);
    float largest = 0;
    for (int64_t i = first; i < last; ++i) {
      const float magnitude = __builtin_fabsf(p.absmax[i] - p.absmax_offset);
      largest = magnitude > largest ? magnitude : largest;
    }
    p.absmax_scale[first / kAbsmaxBlock] = largest;
    const float inverse = 1.0f / (largest < kSmallestAbsmax ? kSmallestAbsmax : largest);
    for (int64_t i = first; i < last; ++i) {
      const float scaled = (p.absmax[i] - p.absmax_offset) * inverse;
      int code = 0;  // the number of midpoints below `scaled`
      for (int step = 128; step; step /= 2)
        if (scaled > (p.absmax_code[code + step - 1] + p.absmax_code[code + step]) / 2) code += step;
      p.codes[i] = (uint8_t)code;
    }
  }
  return true;
}

bool dequantize(const Nf4Dequantize& p) {
  const int64_t cols = p.col_last - p.col_first, rows = p.row_last - p.row_first;
  const int threads = thread_count(p.num_threads, rows, rows * cols, kMinMoves);
  with_type(p.out_dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
      decode_row(p.weight, p.row_first + row, p.col_first, p.col_last, (T*)p.out + row * p.ld_out);
  });
  return true;
}

}  // namespace

extern const Nf4Kernels LK_CONCAT(nf4_, LK_ISA);
const Nf4Kernels LK_CONCAT(nf4_, LK_ISA) = {quantize, quantize_absmax, dequantize};

}  // namespace lora_kernels::cpu
