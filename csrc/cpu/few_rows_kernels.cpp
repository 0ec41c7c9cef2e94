// Products with few rows in x, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
//
// A small piece of the weight is converted into cache and used for every row of x or dy before the next one: the weight
// is read once, in the form it is stored in, and never exists as a float32 [N, K].
#include <utility>

#include "few_rows.h"
#include "nf4_decode.h"
#include "tile.h"

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

// Whether `with_any_order` gives the weight in the order of kStretchOrder, which x must have then.
LK_INLINE bool is_turned(const Weight& w) { return !w.dense && Stretches::fit(w.nf4); }

template <class F>
void with_any_order(const Weight& w, F f) {
  if (is_turned(w))
    f(Stretches{w.nf4});
  else
    with_weight(w, f);
}

// The sums over the lanes of four vectors.
#if defined(__AVX2__)
LK_INLINE void sum_lanes(const vf* v, float* sums) {
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
LK_INLINE void sum_lanes(const vf* v, float* sums) {
  for (int i = 0; i < 4; ++i) {
    sums[i] = 0;
    for (int lane = 0; lane < kLanes; ++lane) sums[i] += v[i][lane];
  }
}
#endif

// sums[m] = Σ_k W[n, k] x[m, k] + Σ_r b[r] h[m, r] for kRows rows m and one n, with the weight's row straight from
// registers. R is a multiple of kLanes.
template <int kRows, class W>
LK_INLINE void dot_rows(const W& weight, int64_t n, const float* x, int64_t K, const float* b, const float* h,
                        int64_t R, float (&sums)[kLayerRows]) {
  vf acc[(kRows + 3) / 4 * 4] = {};
  float rest[kRows] = {};
  for_row(
      weight, n, 0, K,
      [&](int64_t k, const vf(&codes)[kChunkVecs], vf scale) {
        // For few rows the sums are scaled, which makes shorter chains of additions; for more, the values once for all.
        constexpr bool kScaleSums = kRows <= 2;
        vf values[kChunkVecs];
        for (int v = 0; v < kChunkVecs; ++v) values[v] = kScaleSums ? codes[v] : scale * codes[v];
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const float* row = x + m * K + k;
          vf sum = values[0] * load(row);
          if (!kScaleSums) sum += acc[m];
#pragma GCC unroll 8
          for (int v = 1; v < kChunkVecs; ++v) sum += values[v] * load(row + v * kLanes);
          acc[m] = kScaleSums ? acc[m] + scale * sum : sum;
        }
      },
      [&](int64_t k, float value) {
        for (int m = 0; m < kRows; ++m) rest[m] += value * x[m * K + k];
      });
  for (int64_t r = 0; r < R; r += kLanes)
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) acc[m] += load(b + r) * load(h + m * R + r);
  for (int m = 0; m < kRows; m += 4) sum_lanes(acc + m, sums + m);
  for (int m = 0; m < kRows; ++m) sums[m] += rest[m];
}

// out = `count` elements of src, from number `first` on, as floats.
LK_INLINE void widen_row(const void* src, DType dtype, int64_t first, int64_t count, float* out) {
  with_type(dtype, [&](auto* type) {
    using T = __typeof__(*type);
    const T* from = (const T*)src + first;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
    for (; i < count; ++i) out[i] = to_float(from + i);
  });
}

template <int kRows>
bool layers_forward(const LayersForward& p) {
  const int64_t K = p.K;
  // A layer's h and lora_b in float32, zeros after their last columns; rows of zeros follow the last ones of x and h.
  struct LowRank {
    float *h, *b;
    int64_t R;
    bool widen_b;
  } low_rank[kMaxLayers];
  int64_t size = kRows * K, columns = 0, work = 0;
  bool turned = false;
  for (int i = 0; i < p.count; ++i) {
    const FewRowsLayer& layer = *p.layers[i];
    const int64_t R = round_up(layer.R, kLanes);
    low_rank[i] = {nullptr, nullptr, R, layer.R != R || layer.lora_b_dtype != DType::kFloat32};
    size += kRows * R + (low_rank[i].widen_b ? layer.weight.N * R : 0);
    columns += layer.weight.N;
    // Decoding an element takes as long as two multiplications.
    work += (kRows + (layer.weight.dense ? 0 : 2)) * layer.weight.N * K;
    turned |= is_turned(layer.weight);
  }
  Buffer scratch(size + turned * kRows * K);
  if (!scratch.data) return false;
  float *x = scratch.data, *next = x + kRows * K;
  memset(x + p.M * K, 0, (kRows - p.M) * K * sizeof(float));
  for (int64_t m = 0; m < p.M; ++m) widen_row(p.x, p.x_dtype, m * p.ld_x, K, x + m * K);
  float* const turned_x = next;
  if (turned) {
    next += kRows * K;
    for (int64_t k = 0; k < kRows * K; k += kStretch)
      for (int i = 0; i < kStretch; ++i) turned_x[k + i] = x[k + kStretchOrder.element[i]];
  }

  for (int i = 0; i < p.count; ++i) {
    const FewRowsLayer& layer = *p.layers[i];
    auto& [h, b, R, widen_b] = low_rank[i];
    h = next, next += kRows * R;
    memset(h, 0, kRows * R * sizeof(float));
    b = (float*)layer.lora_b;
    if (widen_b) {
      b = next, next += layer.weight.N * R;
      memset(b, 0, layer.weight.N * R * sizeof(float));
      for (int64_t n = 0; n < layer.weight.N; ++n)
        widen_row(layer.lora_b, layer.lora_b_dtype, n * layer.R, layer.R, b + n * R);
    }
    with_dense(layer.lora_a, layer.lora_a_dtype, K, [&](const auto& lora_a) {
      for (int64_t r = 0; r < layer.R; ++r) {
        float sums[kLayerRows], e = 1;
        dot_rows<kRows>(lora_a, r, x, K, nullptr, nullptr, 0, sums);
        if (layer.lora_e) widen_row(layer.lora_e, layer.lora_e_dtype, r, 1, &e);
        for (int64_t m = 0; m < p.M; ++m) {
          if (p.h[i]) p.h[i][m * layer.R + r] = sums[m];
          low_rank[i].h[m * low_rank[i].R + r] = layer.scaling * e * sums[m];
        }
      }
    });
  }

  const int threads = thread_count(p.num_threads, columns, work, kMinMultiplyAdds);
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int i = 0; i < p.count; ++i) {
    const FewRowsLayer& layer = *p.layers[i];
    const LowRank& low = low_rank[i];
    const int64_t N = layer.weight.N;
    const float* const own_x = is_turned(layer.weight) ? turned_x : x;
    with_any_order(layer.weight, [&](const auto& weight) {
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < N; ++n) {
        float sums[kLayerRows];
        dot_rows<kRows>(weight, n, own_x, K, low.b + n * low.R, low.h, low.R, sums);
        with_type(p.x_dtype, [&](auto* type) {
          using T = __typeof__(*type);
          const float bias = layer.bias ? to_float((const T*)layer.bias + n) : 0.0f;
          for (int64_t m = 0; m < p.M; ++m) {
            const float value = layer.column_scale ? layer.column_scale[n] * sums[m] : sums[m];
            from_float((T*)p.y[i] + m * N + n, value + bias);
          }
        });
      }
    });
  }
  return true;
}

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

template <class W>
bool forward(const W& weight, const FewRowsForward& p) {
  const int64_t N = p.weight.N, K = p.weight.K, tiles = (N + kTileCols - 1) / kTileCols;
  const int threads = thread_count(p.num_threads, tiles, p.M * N * K, kMinMultiplyAdds);
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
        for (int64_t j = 0; j < width; ++j) decode_row(weight, n + j, k, k + size, rows + j * kPieceStride);
        turn_round(rows, size, panel);
        multiply_panel(p.x + k, K, p.M, panel, kTileCols, size, k == 0, p.y + n, N, width);
      }
    }
  }
  return true;
}

constexpr int64_t kSlabCols = 128;
constexpr int64_t kSlabRows = 48;

template <class W>
bool backward(const W& weight, const FewRowsBackward& p) {
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
        for (int64_t i = 0; i < rows; ++i) decode_row(weight, n + i, k, k + cols, slab + i * kSlabCols);
        for (int64_t j = 0; j < cols; j += kTileCols)
          multiply_panel(p.dy + n, N, p.M, slab + j, kSlabCols, rows, n == 0, p.dx + k + j, K,
                         min64(kTileCols, cols - j));
      }
    }
  }
  return true;
}

// With the smallest number of rows that covers M.
bool few_rows_layers_forward(const LayersForward& p) {
  return p.M <= 1   ? layers_forward<1>(p)
         : p.M <= 2 ? layers_forward<2>(p)
         : p.M <= 4 ? layers_forward<4>(p)
                    : layers_forward<kLayerRows>(p);
}

bool few_rows_forward(const FewRowsForward& p) {
  bool done = false;
  with_weight(p.weight, [&](const auto& weight) { done = forward(weight, p); });
  return done;
}

bool few_rows_backward(const FewRowsBackward& p) {
  bool done = false;
  with_weight(p.weight, [&](const auto& weight) { done = backward(weight, p); });
  return done;
}

}  // namespace

extern const FewRowsKernels LK_CONCAT(few_rows_, LK_ISA);
const FewRowsKernels LK_CONCAT(few_rows_, LK_ISA) = {few_rows_layers_forward, few_rows_forward, few_rows_backward};

}  // namespace lora_kernels::cpu
