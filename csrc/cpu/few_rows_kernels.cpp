// Products with few rows in x, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
//
// A row of the weight is converted in registers and used for every row of x before the next one.
#include "few_rows.h"
#include "weight_rows.h"

namespace lora_kernels::cpu {
namespace {

// Orders of columns in which a weight is read, and x must then be: as they are, or such that values come out of a
// register with fewer instructions.
enum Order { kInOrder, kStretches, kPairs, kOrders };

LK_INLINE Order order_of(const Weight& w) {
  if (!w.dense) return Stretches::fit(w.nf4) ? kStretches : kInOrder;
  return w.dense_dtype == DType::kBFloat16 ? kPairs : kInOrder;
}

// f(weight) with its rows in `order_of` it.
template <class F>
void with_ordered(const Weight& w, F f) {
  switch (order_of(w)) {
    case kStretches:
      return f(Stretches{w.nf4});
    case kPairs:
      return f(Pairs{{(const bf16*)w.dense, w.ld_dense}});
    default:
      return with_weight(w, f);
  }
}

// out = `rows` rows of x in an order. Columns after the last whole group stay.
void reorder(Order order, const float* x, int64_t rows, int64_t K, float* out) {
  const int group = order == kStretches ? kStretch : kChunk;
  for (int64_t m = 0; m < rows; ++m, x += K, out += K) {
    int64_t k = 0;
    for (; k + group <= K; k += group)
      for (int i = 0; i < group; ++i)
        out[k + i] = x[k + (order == kStretches ? kStretchOrder.element[i] : pairs_order(i))];
    for (; k < K; ++k) out[k] = x[k];
  }
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
  for (int i = 0; i < 4; ++i) sums[i] = sum_of_lanes(v[i]);
}
#endif

// A sum over columns is made of sums of so many: added one by one, thousands would round all that came before.
constexpr int64_t kPieceColumns = 1024;

// sums[m] = Σ_k W[n, k] x[m, k] + Σ_r b[r] h[m, r] for kRows rows m and one n, with the weight's row straight from
// registers. R is a multiple of kLanes.
template <int kRows, class W>
LK_INLINE void dot_rows(const W& weight, int64_t n, const float* x, int64_t K, const float* b, const float* h,
                        int64_t R, float (&sums)[kFewRows]) {
  vf total[(kRows + 3) / 4 * 4] = {};
  float rest[kRows] = {};
  for (int64_t first = 0; first < K; first += kPieceColumns) {
    vf acc[kRows] = {};
    for_row(
        weight, n, first, min64(first + kPieceColumns, K),
        [&](int64_t k, const vf(&codes)[kChunkVecs], vf scale) {
          // For few rows the sums are scaled, which makes shorter chains of additions; for more, the values once for
          // all.
          constexpr bool kScaleSums = kRows <= 4;
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
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) total[m] += acc[m];
  }
  for (int64_t r = 0; r < R; r += kLanes)
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) total[m] += load(b + r) * load(h + m * R + r);
  for (int m = 0; m < kRows; m += 4) sum_lanes(total + m, sums + m);
  for (int m = 0; m < kRows; ++m) sums[m] += rest[m];
}

// out = `count` elements of src, from number `first` on, as floats.
LK_INLINE void widen_row(const void* src, DType dtype, int64_t first, int64_t count, float* out) {
  with_dense(src, dtype, 0, [&](const auto& row) { convert_row(row, 1.0f, 0, first, count, out); });
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
  bool needed[kOrders] = {};
  for (int i = 0; i < p.count; ++i) {
    const Layer& layer = *p.layers[i];
    const int64_t R = round_up(layer.R, kLanes);
    low_rank[i] = {nullptr, nullptr, R, layer.R != R || layer.lora_b_dtype != DType::kFloat32};
    size += kRows * R + (low_rank[i].widen_b ? layer.weight.N * R : 0);
    columns += layer.weight.N;
    // Decoding an element takes as long as two multiplications.
    work += (kRows + (layer.weight.dense ? 0 : 2)) * layer.weight.N * K;
    needed[order_of(layer.weight)] = true;
  }
  Buffer scratch(size + (needed[kStretches] + needed[kPairs]) * kRows * K);
  if (!scratch.data) return false;
  float *x = scratch.data, *next = x + kRows * K;
  memset(x + p.M * K, 0, (kRows - p.M) * K * sizeof(float));
  for (int64_t m = 0; m < p.M; ++m) widen_row(p.x, p.x_dtype, m * p.ld_x, K, x + m * K);
  const float* ordered_x[kOrders] = {x};
  for (int order = kInOrder + 1; order < kOrders; ++order)
    if (needed[order]) {
      reorder((Order)order, x, kRows, K, next);
      ordered_x[order] = next, next += kRows * K;
    }

  for (int i = 0; i < p.count; ++i) {
    const Layer& layer = *p.layers[i];
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
        float sums[kFewRows], e = 1;
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
    const Layer& layer = *p.layers[i];
    const LowRank& low = low_rank[i];
    const int64_t N = layer.weight.N;
    const float* const own_x = ordered_x[order_of(layer.weight)];
    with_ordered(layer.weight, [&](const auto& weight) {
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < N; ++n) {
        float sums[kFewRows];
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

// With the smallest number of rows that covers M.
bool few_rows_layers_forward(const LayersForward& p) {
  return p.M <= 1   ? layers_forward<1>(p)
         : p.M <= 2 ? layers_forward<2>(p)
         : p.M <= 4 ? layers_forward<4>(p)
                    : layers_forward<kFewRows>(p);
}

}  // namespace

extern const FewRowsKernels LK_CONCAT(few_rows_, LK_ISA);
const FewRowsKernels LK_CONCAT(few_rows_, LK_ISA) = {few_rows_layers_forward};

}  // namespace lora_kernels::cpu
