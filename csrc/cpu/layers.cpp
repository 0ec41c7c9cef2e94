// What a pass of a layer is made of, by whichever instruction set's kernels.
#include "layers.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "scratch.h"

namespace lora_kernels::cpu {
namespace {

// Elements of x, or dx, that are held in another type at a time.
constexpr int64_t kConverted = 1 << 23;
constexpr int64_t kLeastRows = 512;

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const void* row(const void* data, DType dtype, int64_t elements) {
  return (const char*)data + elements * size_of(dtype);
}
void* row(void* data, DType dtype, int64_t elements) { return (char*)data + elements * size_of(dtype); }

// Scratch memory for a matrix of any type.
struct Matrix : Buffer {
  Matrix(DType dtype, int64_t size) : Buffer((size * size_of(dtype) + 3) / 4) {}
};

// How a pass is cut into rows, and by what it is multiplied.
struct Pass {
  const Isa& isa;
  DType x_dtype, product_dtype;
  int64_t M, K;
  int num_threads;

  bool converts() const { return x_dtype != product_dtype; }
  int64_t rows_at_once() const {
    return x_dtype == DType::kFloat32 ? M : std::min(M, std::max(kLeastRows, kConverted / K));
  }
  void convert(const void* in, DType in_dtype, int64_t ld, void* out, DType out_dtype, int64_t rows,
               int64_t cols) const {
    isa.product->convert({in, in_dtype, ld, out, out_dtype, rows, cols, num_threads});
  }
};

Weight dense(const void* data, DType dtype, int64_t rows, int64_t cols) { return {{}, data, dtype, cols, rows, cols}; }

// out [M,R] = in ∘ e, whose rows are ld_in apart. out may be `in`.
void scale_columns(const float* in, int64_t ld_in, const float* e, int64_t M, int64_t R, float* out) {
  for (int64_t m = 0; m < M; ++m)
    for (int64_t r = 0; r < R; ++r) out[m * R + r] = in[m * ld_in + r] * e[r];
}

void copy_columns(const float* from, int64_t ld_from, int64_t M, int64_t R, float* to, int64_t ld_to) {
  for (int64_t m = 0; m < M; ++m) memcpy(to + m * ld_to, from + m * ld_from, R * sizeof(float));
}

template <class P>
int64_t total_rank(const P& p) {
  int64_t R = 0;
  for (int i = 0; i < p.count; ++i) R += p.layers[i]->R;
  return R;
}

// The layers' lora_a below each other: of one layer itself, of several in float32.
struct LoraA {
  const void* data;
  DType dtype;
};
template <class P>
LoraA all_lora_a(const Pass& pass, const P& p, float* scratch) {
  if (p.count == 1) return {p.layers[0]->lora_a, p.layers[0]->lora_a_dtype};
  float* next = scratch;
  for (int i = 0; i < p.count; ++i) {
    const Layer& layer = *p.layers[i];
    if (layer.R) pass.convert(layer.lora_a, layer.lora_a_dtype, p.K, next, DType::kFloat32, layer.R, p.K);
    next += layer.R * p.K;
  }
  return {scratch, DType::kFloat32};
}

// The mask of a pass, drawn.
struct DrawnMask : Buffer {
  explicit DrawnMask(const Dropout& dropout, int64_t M, int64_t K)
      : Buffer(dropout.threshold ? (M * stride_of(K) + 3) / 4 + 1 : 0),
        kept{dropout.threshold ? (const uint8_t*)data : nullptr, stride_of(K), keep_scale(dropout)} {}
  const Kept kept;

  static int64_t stride_of(int64_t K) { return (K + kKeptUnit - 1) / kKeptUnit * (kKeptUnit / 8); }
  static float keep_scale(const Dropout& dropout) { return 65536.0f / (65536.0f - (float)dropout.threshold); }
  // From a row on.
  Kept from(int64_t first) const {
    return {kept.bits ? kept.bits + first * kept.stride : nullptr, kept.stride, kept.scale};
  }
};

}  // namespace

bool layers_forward(const Isa& isa, const LayersForward& p) {
  bool few = p.M <= kFewRows && !p.dropout.threshold;
  for (int i = 0; i < p.count; ++i) few &= !p.layers[i]->weight.turned;
  if (few) return isa.few_rows->layers_forward(p);
  const Pass pass{isa, p.x_dtype, p.product_dtype, p.M, p.K, p.num_threads};
  const int64_t R = total_rank(p), rows = pass.rows_at_once();
  const Buffer lora_a(p.count > 1 ? R * p.K : 0), all_h(p.count > 1 || !p.h[0] ? p.M * R : 0);
  if (!lora_a.data || !all_h.data) return false;
  float* const h = p.count > 1 || !p.h[0] ? all_h.data : p.h[0];
  if (R) {
    const LoraA a = all_lora_a(pass, p, lora_a.data);
    const DrawnMask mask(p.dropout, p.M, p.K);
    if (!mask.data) return false;
    if (p.dropout.threshold)
      isa.lora_linear->draw_mask({p.dropout, (uint8_t*)mask.data, mask.kept.stride, p.M, p.num_threads});
    if (!isa.lora_linear->lora_a_fwd(
            {p.x, p.x_dtype, p.ld_x, a.data, a.dtype, h, p.M, p.K, R, mask.kept, p.num_threads}))
      return false;
  }
  // What multiplies each lora_b, below each other.
  const Matrix he(p.product_dtype, p.M * R), x(p.product_dtype, pass.converts() ? rows * p.K : 0);
  if (!he.data || !x.data) return false;
  int64_t column = 0;
  for (int i = 0; i < p.count; ++i) {
    const Layer& layer = *p.layers[i];
    if (!layer.R) continue;
    const float* in = h + column;
    int64_t ld = R;
    if (p.h[i] && p.h[i] != h) copy_columns(in, R, p.M, layer.R, p.h[i], layer.R);
    const Buffer e(layer.lora_e ? layer.R : 0), scaled(layer.lora_e ? p.M * layer.R : 0);
    if (!e.data || !scaled.data) return false;
    if (layer.lora_e) {
      pass.convert(layer.lora_e, layer.lora_e_dtype, layer.R, e.data, DType::kFloat32, 1, layer.R);
      scale_columns(in, R, e.data, p.M, layer.R, scaled.data);
      in = scaled.data, ld = layer.R;
    }
    void* const own_he = row(he.data, p.product_dtype, p.M * column);
    pass.convert(in, DType::kFloat32, ld, own_he, p.product_dtype, p.M, layer.R);
    column += layer.R;
  }

  for (int64_t first = 0; first < p.M; first += rows) {
    const int64_t count = std::min(rows, p.M - first);
    const void* in = row(p.x, p.x_dtype, first * p.ld_x);
    int64_t ld = p.ld_x;
    if (pass.converts()) {
      pass.convert(in, p.x_dtype, p.ld_x, x.data, p.product_dtype, count, p.K);
      in = x.data, ld = p.K;
    }
    column = 0;
    for (int i = 0; i < p.count; ++i) {
      const Layer& layer = *p.layers[i];
      const int64_t N = layer.weight.N;
      const Buffer bias(layer.bias ? N : 0);
      if (!bias.data) return false;
      if (layer.bias) pass.convert(layer.bias, p.x_dtype, N, bias.data, DType::kFloat32, 1, N);
      const void* own_he = row(he.data, p.product_dtype, p.M * column + first * layer.R);
      const ProductTerm terms[] = {
          {layer.weight, in, ld, 1.0f},
          {dense(layer.lora_b, layer.lora_b_dtype, N, layer.R), own_he, layer.R, layer.scaling}};
      if (!isa.product->product({terms, layer.R ? 2 : 1, p.product_dtype, false, layer.column_scale,
                                 layer.bias ? bias.data : nullptr, row(p.y[i], p.x_dtype, first * N), p.x_dtype, N,
                                 count, N, p.num_threads}))
        return false;
      column += layer.R;
    }
  }
  return true;
}

bool layers_backward(const Isa& isa, const LayersBackward& p) {
  const Pass pass{isa, p.x_dtype, p.product_dtype, p.M, p.K, p.num_threads};
  const int64_t R = total_rank(p), rows = pass.rows_at_once();
  bool need_a = false;
  for (int i = 0; i < p.count; ++i) need_a |= p.dlora_a[i] && p.layers[i]->R;
  const bool need_dh = R && (p.dx || need_a);
  const Buffer dh(need_dh ? p.M * R : 0);
  if (!dh.data) return false;

  int64_t column = 0;
  for (int i = 0; i < p.count; ++i) {
    const Layer& layer = *p.layers[i];
    const int64_t N = layer.weight.N, own = p.M * layer.R;
    const bool need_e = p.dlora_e[i] && layer.lora_e, need_b = p.dlora_b[i];
    if (!layer.R || !(need_dh || need_e || need_b)) continue;
    const bool direct_b = layer.lora_b_dtype == DType::kFloat32;
    const Buffer e(layer.lora_e ? layer.R : 0), he(layer.lora_e ? own : 0), dhe(need_dh || need_e ? own : 0);
    const Buffer dlora_b(need_b && !direct_b ? N * layer.R : 0), dlora_e(need_e ? layer.R : 0);
    if (!e.data || !he.data || !dhe.data || !dlora_b.data || !dlora_e.data) return false;
    const float* h = p.h[i];
    if (layer.lora_e) {
      pass.convert(layer.lora_e, layer.lora_e_dtype, layer.R, e.data, DType::kFloat32, 1, layer.R);
      scale_columns(h, layer.R, e.data, p.M, layer.R, he.data);
      h = he.data;
    }
    float* const to = !need_b ? nullptr : direct_b ? (float*)p.dlora_b[i] : dlora_b.data;
    if (!isa.lora_linear->lora_b_bwd({p.dy[i], p.x_dtype, p.ld_dy[i], h, layer.lora_b, layer.lora_b_dtype,
                                      layer.scaling, need_dh || need_e ? dhe.data : nullptr, to, p.M, N, layer.R,
                                      p.num_threads}))
      return false;
    if (need_b && !direct_b) pass.convert(to, DType::kFloat32, layer.R, p.dlora_b[i], layer.lora_b_dtype, N, layer.R);
    if (need_e) {
      for (int64_t r = 0; r < layer.R; ++r) {
        double sum = 0;
        for (int64_t m = 0; m < p.M; ++m) sum += (double)p.h[i][m * layer.R + r] * dhe.data[m * layer.R + r];
        dlora_e.data[r] = (float)sum;
      }
      pass.convert(dlora_e.data, DType::kFloat32, layer.R, p.dlora_e[i], layer.lora_e_dtype, 1, layer.R);
    }
    if (need_dh) {
      if (layer.lora_e) scale_columns(dhe.data, layer.R, e.data, p.M, layer.R, dhe.data);
      copy_columns(dhe.data, layer.R, p.M, layer.R, dh.data + column, R);
    }
    column += layer.R;
  }
  if (!p.dx && !need_a) return true;

  const Buffer lora_a(p.count > 1 ? R * p.K : 0), dlora_a(need_a ? R * p.K : 0);
  const DrawnMask mask(p.dropout, R ? p.M : 0, p.K);
  if (!lora_a.data || !dlora_a.data || !mask.data) return false;
  if (p.dropout.threshold && R)
    isa.lora_linear->draw_mask({p.dropout, (uint8_t*)mask.data, mask.kept.stride, p.M, p.num_threads});
  if (need_a && !isa.lora_linear->lora_a_bwd(
                    {p.x, p.x_dtype, p.ld_x, dh.data, dlora_a.data, p.M, p.K, R, mask.kept, p.num_threads}))
    return false;

  const LoraA a = all_lora_a(pass, p, lora_a.data);
  int64_t N = 0;
  for (int i = 0; i < p.count; ++i) N += p.layers[i]->weight.N;
  const Matrix dy(p.product_dtype, p.dx && pass.converts() ? rows * N : 0);
  const bool narrow = p.product_dtype != DType::kFloat32;
  const Matrix narrow_dh(p.product_dtype, p.dx && narrow ? p.M * R : 0);
  if (!dy.data || !narrow_dh.data) return false;
  if (p.dx && R && narrow) pass.convert(dh.data, DType::kFloat32, R, narrow_dh.data, p.product_dtype, p.M, R);
  const void* const dh_in = narrow ? narrow_dh.data : dh.data;

  for (int64_t first = 0; p.dx && first < p.M; first += rows) {
    const int64_t count = std::min(rows, p.M - first);
    ProductTerm terms[kMaxLayers + 1];
    void* next = dy.data;
    for (int i = 0; i < p.count; ++i) {
      const Weight& weight = p.layers[i]->weight;
      const void* in = row(p.dy[i], p.x_dtype, first * p.ld_dy[i]);
      terms[i] = {weight, in, p.ld_dy[i], 1.0f};
      if (pass.converts()) {
        pass.convert(in, p.x_dtype, p.ld_dy[i], next, p.product_dtype, count, weight.N);
        terms[i].in = next, terms[i].ld = weight.N;
        next = row(next, p.product_dtype, count * weight.N);
      }
    }
    terms[p.count] = {dense(a.data, a.dtype, R, p.K), row(dh_in, p.product_dtype, first * R), R, mask.kept.scale,
                      mask.from(first)};
    if (!isa.product->product({terms, p.count + (R > 0), p.product_dtype, true, nullptr, nullptr,
                               row(p.dx, p.x_dtype, first * p.K), p.x_dtype, p.K, count, p.K, p.num_threads}))
      return false;
  }
  column = 0;
  for (int i = 0; i < p.count; ++i) {
    const Layer& layer = *p.layers[i];
    if (p.dlora_a[i] && layer.R)
      pass.convert(dlora_a.data + column * p.K, DType::kFloat32, p.K, p.dlora_a[i], layer.lora_a_dtype, layer.R, p.K);
    column += layer.R;
  }
  return true;
}

}  // namespace lora_kernels::cpu
