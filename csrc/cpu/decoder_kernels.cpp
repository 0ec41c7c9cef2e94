// The kernels of decoder.h, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
#include <math.h>

#include "common.h"
#include "decoder.h"

namespace lora_kernels::cpu {
namespace {

// A piece of a flat tensor, small enough to balance the threads.
constexpr int64_t kChunk = 1 << 13;
// Terms of a sum, which are added one by one in each lane, before the next sum begins: the longer, the more it loses.
constexpr int64_t kTerms = 1 << 11;

// Lanes of what `combine` makes of the terms that f(i, read) gives, and of `neutral`, which changes nothing. Four
// chains hide the latency of combining.
template <class F, class C>
LK_INLINE vf fold(int64_t size, float neutral, F f, C combine) {
  vf parts[4] = {splat(neutral), splat(neutral), splat(neutral), splat(neutral)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes)
    for (int s = 0; s < 4; ++s) parts[s] = combine(f(i + s * kLanes, [](const auto* p) { return load(p); }), parts[s]);
  for (; i < size; i += kLanes) {
    const int64_t left = min64(kLanes, size - i);
    vf terms = f(i, [=](const auto* p) { return load_some(p, left); });
    for (int64_t lane = left; lane < kLanes; ++lane) terms[lane] = neutral;
    parts[0] = combine(terms, parts[0]);
  }
  return combine(combine(parts[0], parts[1]), combine(parts[2], parts[3]));
}

template <class F>
LK_INLINE float sum_over(int64_t size, F f) {
  return sum_of_lanes(fold(size, 0.0f, f, [](vf a, vf b) { return a + b; }));
}

// Passes over a NaN.
template <class F>
LK_INLINE float largest_of(int64_t size, F f) {
  const vf lanes = fold(size, -INFINITY, f, [](vf a, vf b) { return larger(a, b); });
  float largest = lanes[0];
  for (int i = 1; i < kLanes; ++i) largest = fmaxf(largest, lanes[i]);
  return largest;
}

LK_INLINE vf sigmoid(vf v) {
  // Beyond 87, exp(-v) is so large that the result is 0 within 1e-38. A NaN stays one.
  const vf x = (vf)select((vu32)(v < splat(-87.0f)), (vu32)splat(87.0f), (vu32)-v);
  return splat(1.0f) / (splat(1.0f) + exponential(x));
}

template <class T>
void rms_norm_fwd_row(const RmsNormFwd& p, int64_t m) {
  const T *x = (const T*)p.x + m * p.K, *weight = (const T*)p.weight;
  T* y = (T*)p.y + m * p.K;
  const float squares = sum_over(p.K, [&](int64_t k, auto read) {
    const vf v = read(x + k);
    return v * v;
  });
  // An error of rstd is one of the whole row, so it is rounded only once.
  const float rstd = (float)(1.0 / sqrt((double)squares / (double)p.K + (double)p.eps));
  for_each_vector(p.K, [&](int64_t k, auto read, auto write) {
    write(y + k, read(x + k) * splat(rstd) * (splat(p.offset) + read(weight + k)));
  });
  p.rstd[m] = rstd;
}

template <class T>
void rms_norm_bwd_row(const RmsNormBwd& p, int64_t m) {
  const T *dy = (const T*)p.dy + m * p.K, *x = (const T*)p.x + m * p.K, *weight = (const T*)p.weight;
  T* dx = (T*)p.dx + m * p.K;
  const float rstd = p.rstd[m];
  // x enters as x * rstd, of size 1, so that nothing overflows for a tiny x.
  const float sum = sum_over(p.K, [&](int64_t k, auto read) {
    return read(dy + k) * (splat(p.offset) + read(weight + k)) * (read(x + k) * splat(rstd));
  });
  const float mean = sum / (float)p.K;
  for_each_vector(p.K, [&](int64_t k, auto read, auto write) {
    const vf g = read(dy + k) * (splat(p.offset) + read(weight + k));
    write(dx + k, splat(rstd) * (g - read(x + k) * splat(rstd) * splat(mean)));
  });
}

template <class T>
void swiglu_fwd_chunk(const SwigluFwd& p, int64_t first) {
  const T *gate = (const T*)p.gate + first, *up = (const T*)p.up + first;
  T* y = (T*)p.y + first;
  for_each_vector(min64(kChunk, p.size - first), [&](int64_t i, auto read, auto write) {
    const vf g = read(gate + i);
    write(y + i, g * sigmoid(g) * read(up + i));
  });
}

template <class T>
void swiglu_bwd_chunk(const SwigluBwd& p, int64_t first) {
  const T *dy = (const T*)p.dy + first, *gate = (const T*)p.gate + first, *up = (const T*)p.up + first;
  T *dgate = (T*)p.dgate + first, *dup = (T*)p.dup + first;
  for_each_vector(min64(kChunk, p.size - first), [&](int64_t i, auto read, auto write) {
    const vf d = read(dy + i), g = read(gate + i), s = sigmoid(g);
    write(dgate + i, d * read(up + i) * s * (splat(1.0f) + g * (splat(1.0f) - s)));
    write(dup + i, d * g * s);
  });
}

// All heads of position i % T of batch i / T.
template <class T>
void rotary_position(const Rotary& p, int64_t i) {
  const int64_t b = i / p.T, t = i % p.T, half = p.D / 2;
  const T *cos = (const T*)p.cos + b * p.angle_batch + t * p.D, *sin = (const T*)p.sin + b * p.angle_batch + t * p.D;
  for (int64_t h = 0; h < p.H; ++h) {
    const T* x = row_of<T>(p.x, b, h, t);
    T* y = row_of<T>(p.y, b, h, t);
    for_each_vector(half, [&](int64_t d, auto read, auto write) {
      const vf x1 = read(x + d), x2 = read(x + half + d), sin1 = read(sin + d), sin2 = read(sin + half + d);
      write(y + d, x1 * read(cos + d) + (p.transposed ? x2 * sin2 : -x2 * sin1));
      write(y + half + d, x2 * read(cos + half + d) + (p.transposed ? -x1 * sin1 : x1 * sin2));
    });
  }
}

// The row stays in the second cache from pass to pass. A NaN or +infinity among the logits makes the sum a NaN, and
// that all results of the row.
template <class T>
void cross_entropy_row(const CrossEntropy& p, int64_t m) {
  T *logits = (T*)p.logits + m * p.V, *target = logits + p.target[m];
  // The logit whose z is the largest. Less that and then scaled, z is 0 there, whatever the compiler fuses.
  const float sign = copysignf(1.0f, p.scale);
  const float base = sign * largest_of(p.V, [&](int64_t v, auto read) { return splat(sign) * read(logits + v); });
  const auto power = [&](vf logit) { return exponential((logit - splat(base)) * splat(p.scale)); };
  double sum = 0.0;
  for (int64_t first = 0; first < p.V; first += kTerms)
    sum += sum_over(min64(kTerms, p.V - first), [&](int64_t v, auto read) { return power(read(logits + first + v)); });
  const float nll = logf((float)sum) - (to_float(target) - base) * p.scale;
  p.nll[m] = nll;
  if (!p.with_gradient) return;
  const vf factor = splat(p.scale / (float)sum);
  for_each_vector(p.V, [&](int64_t v, auto read, auto write) { write(logits + v, power(read(logits + v)) * factor); });
  // softmax - 1, of which nothing is lost where the softmax is close to 1.
  from_float(target, p.scale * expm1f(-nll));
}

// work(i, type) for i = 0, step, 2 step... below `size`.
template <class P, class F>
bool parallel(const P& p, int64_t size, int64_t step, int64_t elements, F work) {
  const int threads = thread_count(p.num_threads, (size + step - 1) / step, elements, kMinMoves);
  with_type(p.dtype, [&](auto* type) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < size; i += step) work(i, type);
  });
  return true;
}

bool rms_norm_fwd(const RmsNormFwd& p) {
  return parallel(p, p.M, 1, p.M * p.K, [&](int64_t m, auto* t) { rms_norm_fwd_row<__typeof__(*t)>(p, m); });
}
bool rms_norm_bwd(const RmsNormBwd& p) {
  return parallel(p, p.M, 1, p.M * p.K, [&](int64_t m, auto* t) { rms_norm_bwd_row<__typeof__(*t)>(p, m); });
}
bool swiglu_fwd(const SwigluFwd& p) {
  return parallel(p, p.size, kChunk, p.size, [&](int64_t i, auto* t) { swiglu_fwd_chunk<__typeof__(*t)>(p, i); });
}
bool swiglu_bwd(const SwigluBwd& p) {
  return parallel(p, p.size, kChunk, p.size, [&](int64_t i, auto* t) { swiglu_bwd_chunk<__typeof__(*t)>(p, i); });
}
bool rotary(const Rotary& p) {
  const int64_t rows = p.B * p.T;
  return parallel(p, rows, 1, rows * p.H * p.D, [&](int64_t i, auto* t) { rotary_position<__typeof__(*t)>(p, i); });
}
bool cross_entropy(const CrossEntropy& p) {
  return parallel(p, p.M, 1, p.M * p.V, [&](int64_t m, auto* t) { cross_entropy_row<__typeof__(*t)>(p, m); });
}

}  // namespace

extern const DecoderKernels LK_CONCAT(decoder_, LK_ISA);
const DecoderKernels LK_CONCAT(decoder_, LK_ISA) = {rms_norm_fwd, rms_norm_bwd, swiglu_fwd,
                                                    swiglu_bwd,   rotary,       cross_entropy};

}  // namespace lora_kernels::cpu
