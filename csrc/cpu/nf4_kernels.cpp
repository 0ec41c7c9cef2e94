// NF4 kernels, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
//
// The products decode a small piece of the weight into cache and use it for every row of x or dy before the next one:
// the weight is read once, as 4 bits an element, and never exists as a dense [N, K].
#include <utility>

#include "nf4.h"
#include "tile.h"

namespace lora_kernels::cpu {
namespace {

constexpr float kCode[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
constexpr float kSmallestAbsmax = 1e-38f;
constexpr int64_t kAbsmaxBlock = 256;
constexpr int kChunk = 32;  // elements that are decoded at once, from 16 bytes
constexpr int kChunkVecs = kChunk / kLanes;

// The values of the 32 elements in 16 bytes, in their order, without their scale.
#if defined(__AVX512F__) && LK_LANES == 16
LK_INLINE void decode(const uint8_t* packed, vf (&out)[kChunkVecs]) {
  const __m128i bytes = load_raw<__m128i>(packed), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), odd = _mm_and_si128(bytes, low);
  const __m512 code = load_raw<__m512>(kCode);
  out[0] = (vf)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)), code);
  out[1] = (vf)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd)), code);
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

LK_INLINE void decode(const uint8_t* packed, vf (&out)[kChunkVecs]) {
  const __m128i bytes = load_raw<__m128i>(packed), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), odd = _mm_and_si128(bytes, low);
  const __m128 first = (__m128)_mm_unpacklo_epi8(even, odd), second = (__m128)_mm_unpackhi_epi8(even, odd);
  // Every second group of four goes to the upper half: the unpacking below then ends in the right order.
  const __m256i index =
      _mm256_setr_m128i((__m128i)_mm_shuffle_ps(first, second, 0x88), (__m128i)_mm_shuffle_ps(first, second, 0xdd));
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
#else
LK_INLINE void decode(const uint8_t* packed, vf (&out)[kChunkVecs]) {
  float values[kChunk];
  for (int j = 0; j < kChunk / 2; ++j) {
    values[2 * j] = kCode[packed[j] >> 4];
    values[2 * j + 1] = kCode[packed[j] & 15];
  }
  for (int v = 0; v < kChunkVecs; ++v) out[v] = load(values + v * kLanes);
}
#endif

LK_INLINE float code_at(const uint8_t* packed, int64_t i) {
  return kCode[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

LK_INLINE float scale_of(const Nf4Weight& w, int64_t block) {
  if (!w.absmax_scale) return ((const float*)w.absmax)[block];
  float scale = w.absmax_code[((const uint8_t*)w.absmax)[block]] * w.absmax_scale[block / kAbsmaxBlock];
  // The format rounds the product before the sum: hide it from the compiler, which would fuse the two.
  __asm__("" : "+m"(scale));
  return scale + w.absmax_offset;
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

// The sums over the lanes of four vectors.
#if defined(__AVX2__)
LK_INLINE void sum_lanes(const vf (&v)[4], float (&sums)[4]) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
    float lanes[kLanes];
    store(lanes, v[i]);
    half[i] = load_raw<__m256>(lanes);
    if (kLanes == 16) half[i] += load_raw<__m256>(lanes + kLanes / 2);
  }
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  store_raw(sums, _mm256_castps256_ps128(pairs) + _mm256_extractf128_ps(pairs, 1));
}
#else
LK_INLINE void sum_lanes(const vf (&v)[4], float (&sums)[4]) {
  for (int i = 0; i < 4; ++i) {
    sums[i] = 0;
    for (int lane = 0; lane < kLanes; ++lane) sums[i] += v[i][lane];
  }
}
#endif

template <class T>
float quantize_block(const T* weight, int64_t size, uint8_t* packed) {
  // Largest magnitude by bits: NaN is above infinity, which is above all others.
  vi32 most = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const vi32 bits = (vi32)load(weight + i) & 0x7fffffff;
    most = (vi32)select((vu32)(bits > most), (vu32)bits, (vu32)most);
  }
  T tail[kLanes] = {};
  if (i < size) {
    memcpy(tail, weight + i, (size - i) * sizeof(T));
    const vi32 bits = (vi32)load(tail) & 0x7fffffff;
    most = (vi32)select((vu32)(bits > most), (vu32)bits, (vu32)most);
  }
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  float absmax;
  memcpy(&absmax, &largest, 4);
  const vf inverse = splat(1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax));

  auto codes_of = [&](vf v, uint8_t* codes) {
    const vf scaled = v * inverse;
    vi32 code = {};
#pragma GCC unroll 15
    for (int t = 0; t < 15; ++t) code -= (vi32)(scaled > splat((kCode[t] + kCode[t + 1]) / 2));
    typedef uint8_t vu8 __attribute__((vector_size(kLanes)));
    store_raw(codes, __builtin_convertvector(code, vu8));
  };
  for (int64_t first = 0; first < size; first += kChunk) {
    uint8_t codes[kChunk];
    const int64_t count = min64(kChunk, size - first);
    if (count == kChunk) {
      for (int v = 0; v < kChunkVecs; ++v) codes_of(load(weight + first + v * kLanes), codes + v * kLanes);
    } else {
      // Zeros follow the last element, as in the other implementations: an odd size leaves half a byte.
      T rest[kChunk] = {};
      memcpy(rest, weight + first, count * sizeof(T));
      for (int v = 0; v < kChunkVecs; ++v) codes_of(load(rest + v * kLanes), codes + v * kLanes);
    }
    uint8_t bytes[kChunk / 2];
    for (int j = 0; j < kChunk / 2; ++j) bytes[j] = (uint8_t)(codes[2 * j] << 4 | codes[2 * j + 1]);
    memcpy(packed + first / 2, bytes, (count + 1) / 2);
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

// y[m, n] for kRows rows m and one n, with the weight's row straight from registers.
template <int kRows>
LK_INLINE void forward_from_registers(const Nf4Forward& p, int64_t n) {
  const int64_t K = p.weight.K;
  vf acc[4] = {};
  float rest[kRows] = {};
  for_row(
      p.weight, n, 0, K,
      [&](int64_t k, const vf(&values)[kChunkVecs], vf scale) {
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const float* x = p.x + m * K + k;
          vf sum = values[0] * load(x);
#pragma GCC unroll 8
          for (int v = 1; v < kChunkVecs; ++v) sum += values[v] * load(x + v * kLanes);
          acc[m] += scale * sum;
        }
      },
      [&](int64_t k, float value) {
        for (int m = 0; m < kRows; ++m) rest[m] += value * p.x[m * K + k];
      });
  float sums[4];
  sum_lanes(acc, sums);
  for (int m = 0; m < kRows; ++m) p.y[m * p.weight.N + n] = sums[m] + rest[m];
}

// Rows of x up to which a decoded vector is used at once instead of being stored.
constexpr int kRegisterRows = 4;
// A piece of kTileCols rows of the weight, decoded and turned round, fits the first cache.
constexpr int64_t kPieceK = 256;
// One cache line more than a power of two: the rows of a piece must not fall into one cache set.
constexpr int64_t kPieceStride = kPieceK + 16;

// Half of the lanes of a and half of b's: those whose number has bit kStep clear, or set when kHigh, side by side.
template <int kStep, bool kHigh, size_t... kLane>
LK_INLINE vf exchange(vf a, vf b, std::index_sequence<kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b,
                                 (int)(kHigh           ? kLane & kStep ? kLane + kLanes : kLane + kStep
                                       : kLane & kStep ? kLane - kStep + kLanes
                                                       : kLane)...);
#else
  return __builtin_shuffle(a, b,
                           vi32{(int)(kHigh           ? kLane & kStep ? kLane + kLanes : kLane + kStep
                                      : kLane & kStep ? kLane - kStep + kLanes
                                                      : kLane)...});
#endif
}

// Lane i of v[j] and lane j of v[i] change places.
template <int kStep = 1>
LK_INLINE void transpose(vf (&v)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & kStep)) {
        const vf a = v[i], b = v[i + kStep];
        v[i] = exchange<kStep, false>(a, b, std::make_index_sequence<kLanes>());
        v[i + kStep] = exchange<kStep, true>(a, b, std::make_index_sequence<kLanes>());
      }
    transpose<2 * kStep>(v);
  }
}

// panel [K, kTileCols] = rows [kTileCols, K] turned round; up to kLanes - 1 rows more are written.
LK_INLINE void turn_round(const float* rows, int64_t K, float* panel) {
  for (int64_t k = 0; k < K; k += kLanes)
    for (int part = 0; part < kVecs; ++part) {
      vf v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = load(rows + (part * kLanes + i) * kPieceStride + k);
      transpose(v);
      for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kTileCols + part * kLanes, v[i]);
    }
}

// out[m, :width] (+)= Σ_p a[m, p] b[p, :]: the tile product of both directions.
LK_INLINE void multiply_panel(const float* a, int64_t lda, int64_t M, const float* b, int64_t ldb, int64_t P,
                              bool first, float* out, int64_t ld_out, int64_t width) {
  for_row_tiles(M, [&](auto tile, int64_t m) {
    constexpr int kRows = decltype(tile)::value;
    vf acc[kRows][kVecs];
    multiply<kRows, kVecs, false>(a + m * lda, lda, b, ldb, P, acc);
    for (int i = 0; i < kRows; ++i) {
      float* o = out + (m + i) * ld_out;
      float sums[kTileCols];
      for (int v = 0; v < kVecs; ++v) store(sums + v * kLanes, acc[i][v]);
      if (width == kTileCols)
        for (int c = 0; c < kTileCols; ++c) o[c] = first ? sums[c] : o[c] + sums[c];
      else
        for (int64_t c = 0; c < width; ++c) o[c] = first ? sums[c] : o[c] + sums[c];
    }
  });
}

bool forward(const Nf4Forward& p) {
  const int64_t N = p.weight.N, K = p.weight.K, tiles = (N + kTileCols - 1) / kTileCols;
  const int threads = thread_count(p.num_threads, tiles, p.M * N * K, kMinMultiplyAdds);
  if (p.M <= kRegisterRows) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < N; ++n) switch (p.M) {
        case 1:
          forward_from_registers<1>(p, n);
          break;
        case 2:
          forward_from_registers<2>(p, n);
          break;
        case 3:
          forward_from_registers<3>(p, n);
          break;
        default:
          forward_from_registers<kRegisterRows>(p, n);
      }
    return true;
  }
  constexpr int64_t kRowsSize = kTileCols * kPieceStride, kPanelSize = kPieceK * kTileCols;
  Buffer pieces(threads * (kRowsSize + kPanelSize));
  if (!pieces.data) return false;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    float* rows = pieces.data + part * (kRowsSize + kPanelSize);
    float* panel = rows + kRowsSize;
    memset(rows, 0, kRowsSize * sizeof(float));
    const int64_t last = min64(N, tiles * (part + 1) / threads * kTileCols);
    // All rows of the weight for one piece of K before the next: these columns of x stay in cache.
    for (int64_t k = 0; k < K; k += kPieceK) {
      const int64_t size = min64(kPieceK, K - k);
      for (int64_t n = tiles * part / threads * kTileCols; n < last; n += kTileCols) {
        const int64_t width = min64(kTileCols, last - n);
        for (int64_t j = 0; j < width; ++j) decode_row(p.weight, n + j, k, k + size, rows + j * kPieceStride);
        turn_round(rows, size, panel);
        multiply_panel(p.x + k, K, p.M, panel, kTileCols, size, k == 0, p.y + n, N, width);
      }
    }
  }
  return true;
}

constexpr int64_t kSlabCols = 128;
constexpr int64_t kSlabRows = 48;

bool backward(const Nf4Backward& p) {
  const int64_t N = p.weight.N, K = p.weight.K, tiles = (K + kTileCols - 1) / kTileCols;
  const int threads = thread_count(p.num_threads, tiles, p.M * N * K, kMinMultiplyAdds);
  Buffer slabs(threads * kSlabRows * kSlabCols);
  if (!slabs.data) return false;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    float* slab = slabs.data + part * kSlabRows * kSlabCols;
    // Columns past K are zero and stay so; those of an earlier slab may remain in them, and are not stored.
    memset(slab, 0, kSlabRows * kSlabCols * sizeof(float));
    const int64_t last = min64(K, tiles * (part + 1) / threads * kTileCols);
    for (int64_t k = tiles * part / threads * kTileCols; k < last; k += kSlabCols) {
      const int64_t cols = min64(kSlabCols, last - k);
      for (int64_t n = 0; n < N; n += kSlabRows) {
        const int64_t rows = min64(kSlabRows, N - n);
        for (int64_t i = 0; i < rows; ++i) decode_row(p.weight, n + i, k, k + cols, slab + i * kSlabCols);
        for (int64_t j = 0; j < cols; j += kTileCols)
          multiply_panel(p.dy + n, N, p.M, slab + j, kSlabCols, rows, n == 0, p.dx + k + j, K,
                         min64(kTileCols, cols - j));
      }
    }
  }
  return true;
}

}  // namespace

extern const Nf4Kernels LK_CONCAT(nf4_, LK_ISA);
const Nf4Kernels LK_CONCAT(nf4_, LK_ISA) = {quantize, quantize_absmax, dequantize, forward, backward};

}  // namespace lora_kernels::cpu
