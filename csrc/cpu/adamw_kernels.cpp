// The AdamW step of adamw.h, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
//
// Tensors are cut into chunks that the threads share. The norm is summed in fp32 over kSquares elements and in double
// beyond, in a fixed order. All arithmetic on elements is fp32; the scalars of a tensor are computed in double.
#include <math.h>

#include "adamw.h"
#include "common.h"

namespace lora_kernels::cpu {
namespace {

constexpr int64_t kChunk = 1 << 13;
constexpr int64_t kSquares = 1 << 10;

struct Chunk {
  const AdamWTensor* tensor;
  int64_t first, size;
  double sum_of_squares;
};

struct Chunks {
  explicit Chunks(const AdamWStep& p) {
    for (int64_t i = 0; i < p.count; ++i) {
      count += (p.tensors[i].numel + kChunk - 1) / kChunk;
      elements += p.tensors[i].numel;
    }
    data = (Chunk*)malloc((count + 1) * sizeof(Chunk));
    if (!data) return;
    Chunk* chunk = data;
    for (const AdamWTensor* t = p.tensors; t < p.tensors + p.count; ++t)
      for (int64_t first = 0; first < t->numel; first += kChunk)
        *chunk++ = {t, first, min64(kChunk, t->numel - first), 0.0};
  }
  ~Chunks() { free(data); }
  Chunks(const Chunks&) = delete;
  Chunk* data;
  int64_t count = 0, elements = 0;
};

LK_INLINE vf square_root(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) lanes[i] = sqrtf(lanes[i]);
  return load(lanes);
}

template <class T>
LK_INLINE vf rounded_to(vf v) {
  T lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}
template <>
LK_INLINE vf rounded_to<float>(vf v) {
  return v;
}

template <class T>
double sum_of_squares(const T* grad, int64_t count) {
  constexpr int kSums = 4;
  double sum = 0.0;
  for (int64_t first = 0; first < count; first += kSquares) {
    const int64_t last = min64(count, first + kSquares);
    vf sums[kSums] = {};
    int64_t i = first;
    for (; i + kSums * kLanes <= last; i += kSums * kLanes)
      for (int s = 0; s < kSums; ++s) {
        const vf g = load(grad + i + s * kLanes);
        sums[s] += g * g;
      }
    for (; i < last; i += kLanes) {
      const vf g = load_some(grad + i, min64(kLanes, last - i));
      sums[0] += g * g;
    }
    const vf all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < kLanes; ++lane) sum += all[lane];
  }
  return sum;
}

struct Scalars {
  float clip, decay, weight1, beta2, weight2, step_size, inv_sqrt_correction2, eps;
  Scalars(const AdamWGroup& g, double step, double clip)
      : clip((float)clip),
        decay((float)(1.0 - g.lr * g.weight_decay)),
        weight1((float)(1.0 - g.beta1)),
        beta2((float)g.beta2),
        weight2((float)(1.0 - g.beta2)),
        step_size((float)(g.lr / (1.0 - pow(g.beta1, step)))),
        inv_sqrt_correction2((float)(1.0 / sqrt(1.0 - pow(g.beta2, step)))),
        eps((float)g.eps) {}
};

LK_INLINE void update(const Scalars& s, vf grad, vf& param, vf& exp_avg, vf& exp_avg_sq) {
  grad *= splat(s.clip);
  exp_avg += splat(s.weight1) * (grad - exp_avg);
  exp_avg_sq = splat(s.beta2) * exp_avg_sq + splat(s.weight2) * grad * grad;
  const vf denominator = square_root(exp_avg_sq) * splat(s.inv_sqrt_correction2) + splat(s.eps);
  param = splat(s.decay) * param - splat(s.step_size) * exp_avg / denominator;
}

template <class TParam, class TGrad>
void step_chunk(const Chunk& chunk, const Scalars& scalars) {
  constexpr bool kHasMaster = sizeof(TParam) < sizeof(float);
  const AdamWTensor& t = *chunk.tensor;
  TParam* param = (TParam*)t.param + chunk.first;
  float* master = kHasMaster ? t.master + chunk.first : nullptr;
  const TGrad* grad = (const TGrad*)t.grad + chunk.first;
  float *exp_avg = t.exp_avg + chunk.first, *exp_avg_sq = t.exp_avg_sq + chunk.first;

  for_each_vector(chunk.size, [&](int64_t i, auto read, auto write) {
    vf p = read(param + i), m = read(exp_avg + i), v = read(exp_avg_sq + i);
    if (kHasMaster) {
      const vf exact = read(master + i);
      // A parameter that isn't its rounded master any more was set from outside, and that value counts.
      p = (vf)select((vu32)(rounded_to<TParam>(exact) == p), (vu32)exact, (vu32)p);
    }
    update(scalars, read(grad + i), p, m, v);
    write(param + i, p);
    if (kHasMaster) write(master + i, p);
    write(exp_avg + i, m);
    write(exp_avg_sq + i, v);
  });
}

bool step(const AdamWStep& p) {
  Chunks chunks(p);
  if (!chunks.data) return false;
  const int threads = thread_count(p.num_threads, chunks.count, chunks.elements, kMinMoves);

  double clip = 1.0;
  if (p.grad_norm) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < chunks.count; ++i) {
      Chunk& chunk = chunks.data[i];
      with_type(chunk.tensor->grad_dtype, [&](auto* type) {
        chunk.sum_of_squares = sum_of_squares((__typeof__(type))chunk.tensor->grad + chunk.first, chunk.size);
      });
    }
    double sum = 0.0;
    for (int64_t i = 0; i < chunks.count; ++i) sum += chunks.data[i].sum_of_squares;
    const double norm = sqrt(sum);
    *p.grad_norm = (float)norm;
    if (!(norm < INFINITY)) return true;
    clip = fmin(1.0, p.max_grad_norm / (norm + 1e-6));
  }

  // Backwards: the last gradients of the first pass are still in cache.
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = chunks.count - 1; i >= 0; --i) {
    const Chunk& chunk = chunks.data[i];
    const AdamWTensor& t = *chunk.tensor;
    const Scalars scalars(p.groups[t.group], *t.step + 1.0, clip);
    with_type(t.param_dtype, [&](auto* param) {
      with_type(t.grad_dtype, [&](auto* grad) { step_chunk<__typeof__(*param), __typeof__(*grad)>(chunk, scalars); });
    });
  }
  for (int64_t i = 0; i < p.count; ++i) *p.tensors[i].step += 1.0f;
  return true;
}

}  // namespace

extern const AdamWKernels LK_CONCAT(adamw_, LK_ISA);
const AdamWKernels LK_CONCAT(adamw_, LK_ISA) = {step};

}  // namespace lora_kernels::cpu
