// The low-rank products of lora_linear, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
//
// All are the same register tile,  out[i, j] += Σ_p a[i, p] b[p, j],  fed from fp32 blocks in cache:
//   h       [m, r] = Σ_k x̃[m, k]  lora_a[r, k]        dh      [m, r] = Σ_n dy[m, n] lora_b[n, r]
//   dlora_a [k, r] = Σ_m x̃[m, k]  dh[m, r]            dlora_b [n, r] = Σ_m dy[m, n] h[m, r]
// b is always packed in "panels": columns in groups of at most kTileCols, each group [P, width] contiguous.
// Scalings are folded into the panels or applied in the last reduction. Each thread has a fixed range of rows and
// gradients are reduced in thread order, so a result depends on num_threads but never on timing.
#include "lora_linear.h"
#include "tile.h"

namespace lora_kernels::cpu {
namespace {

constexpr int64_t kBlockRows = 96;
constexpr int64_t kBlockCols = 256;
// One cache line more than a power of two: a column of the block must not fall into one cache set.
constexpr int64_t kBlockStride = kBlockCols + 16;
// A sum over a block is made of sums of so many terms each: of hundreds, added one by one, every addition would round
// all that came before. It costs up to 7 % of these kernels' time, and the error falls to a half.
constexpr int64_t kPieceDepth = 16;

// Panels of a [P, J] matrix, its columns padded with zeros to a multiple of `pad`: kLanes or kTileCols.
struct Panels {
  int64_t P, J;
  int64_t pad = kLanes;
  LK_INLINE int64_t padded() const { return round_up(J, pad); }
  LK_INLINE int64_t count() const { return (J + kTileCols - 1) / kTileCols; }
  LK_INLINE int64_t size() const { return P * padded(); }
  LK_INLINE int64_t start(int64_t panel) const { return panel * kTileCols * P; }
  LK_INLINE int width(int64_t panel) const { return (int)min64(kTileCols, padded() - panel * kTileCols); }
};

LK_INLINE int product_threads(int requested, int64_t M, int64_t cols, int64_t R) {
  return thread_count(requested, (M + kTileRows - 1) / kTileRows, M * cols * R, kMinMultiplyAdds);
}

// Panels of scale · src, where element (p, j) is src[p * stride_p + j * stride_j]. Columns past J are zero.
template <class T>
void pack_panel(const T* src, int64_t stride_p, int64_t stride_j, float scale, Panels shape, int64_t panel,
                float* dst) {
  const int width = shape.width(panel);
  const int64_t j0 = panel * kTileCols, cols = min64(width, shape.J - j0);
  dst += shape.start(panel);
  if (cols < width) memset(dst, 0, shape.P * width * sizeof(float));
  if (stride_j == 1) {
    for (int64_t p = 0; p < shape.P; ++p)
      for (int64_t j = 0; j < cols; ++j) dst[p * width + j] = scale * to_float(src + p * stride_p + j0 + j);
  } else {
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t p = 0; p < shape.P; ++p)
        dst[p * width + j] = scale * to_float(src + p * stride_p + (j0 + j) * stride_j);
  }
}

void pack(const void* src, DType dtype, int64_t stride_p, int64_t stride_j, float scale, Panels shape, float* dst,
          int num_threads) {
  const int threads = thread_count(num_threads, shape.count(), shape.size(), kMinMoves);
  with_type(dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t panel = 0; panel < shape.count(); ++panel)
      pack_panel((const T*)src, stride_p, stride_j, scale, shape, panel, dst);
  });
}

// out[i, :] += Σ_p a(i, p) b[p, :] for one panel b; out is laid out as a panel too.
template <bool kTransposed>
void accumulate(const float* a, int64_t lda, int64_t rows, const float* b, int64_t P, int width, float* out) {
  auto run = [&](auto cols) {
    constexpr int kCols = decltype(cols)::value;
    for_row_tiles(rows, [&](auto tile, int64_t i) {
      constexpr int kRows = decltype(tile)::value;
      vf total[kRows][kCols] = {};
      auto piece = [&](int64_t p, int64_t depth) {
        vf acc[kRows][kCols];
        multiply<kRows, kCols, kTransposed>(a + (kTransposed ? i + p * lda : i * lda + p), lda, b + p * kCols * kLanes,
                                            kCols * kLanes, depth, acc);
#pragma GCC unroll 16
        for (int ii = 0; ii < kRows; ++ii)
#pragma GCC unroll 2
          for (int j = 0; j < kCols; ++j) total[ii][j] += acc[ii][j];
      };
      int64_t p = 0;
      for (; p + kPieceDepth <= P; p += kPieceDepth) piece(p, kPieceDepth);
      if (p < P) piece(p, P - p);
      for (int ii = 0; ii < kRows; ++ii)
        for (int j = 0; j < kCols; ++j) {
          float* o = out + ((i + ii) * kCols + j) * kLanes;
          store(o, load(o) + total[ii][j]);
        }
    });
  };
  if (width == kTileCols)
    run(Int<kVecs>{});
  else
    run(Int<1>{});
}

// The fp32 block [rows, cols] of src, zero where the mask, which starts at the block, is clear.
template <class T>
void load_block(const T* src, int64_t ld, int64_t rows, int64_t cols, Mask mask, float* block) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* s = src + i * ld;
    const uint8_t* bits = mask.row(i);
    float* d = block + i * kBlockStride;
    int64_t j = 0;
    auto put = [&](vf v) { store(d + j, bits ? (vf)((vu32)v & expand_bits(bits, j)) : v); };
    for (; j + kLanes <= cols; j += kLanes) put(load(s + j));
    if (j < cols) {
      T tail[kLanes] = {};
      memcpy(tail, s + j, (cols - j) * sizeof(T));
      put(load(tail));
    }
  }
}

// A float32 block that the tile reads: src itself, or what load_block makes of it. Its rows are ld apart.
struct Block {
  const float* data;
  int64_t ld;
};
template <class T>
LK_INLINE Block block_of(const T* src, int64_t ld, int64_t rows, int64_t cols, Mask mask, float* block) {
  if constexpr (sizeof(T) == sizeof(float))
    if (!mask.bits) return {src, ld};
  load_block(src, ld, rows, cols, mask, block);
  return {block, kBlockStride};
}

// The panels of src [P, J].
void pack_rows(const float* src, Panels shape, float* dst) {
  for (int64_t panel = 0; panel < shape.count(); ++panel) pack_panel(src, shape.J, 1, 1.0f, shape, panel, dst);
}

void unpack_rows(const float* panels, Panels shape, float* dst) {
  for (int64_t panel = 0; panel < shape.count(); ++panel) {
    const int width = shape.width(panel);
    const int64_t j0 = panel * kTileCols, cols = min64(width, shape.J - j0);
    for (int64_t i = 0; i < shape.P; ++i)
      memcpy(dst + i * shape.J + j0, panels + shape.start(panel) + i * width, cols * sizeof(float));
  }
}

// dst(i, j) = scale · Σ_part partial[part](i, j), parts in order; dst is [P, J], or [J, P] when kTransposed.
template <bool kTransposed>
void reduce_partials(const float* partials, Panels shape, int parts, float scale, float* dst, int num_threads) {
  constexpr int64_t kChunk = 64;
  const int64_t chunks = (shape.P + kChunk - 1) / kChunk;
  const int threads = thread_count(num_threads, chunks, parts * shape.size(), kMinMoves);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kChunk, last = min64(shape.P, first + kChunk);
    for (int64_t panel = 0; panel < shape.count(); ++panel) {
      const int width = shape.width(panel);
      const int64_t j0 = panel * kTileCols, cols = min64(width, shape.J - j0);
      for (int64_t i = first; i < last; ++i) {
        float sum[kTileCols] = {};
        for (int part = 0; part < parts; ++part) {
          const float* p = partials + part * shape.size() + shape.start(panel) + i * width;
          for (int j = 0; j < width; j += kLanes) store(sum + j, load(sum + j) + load(p + j));
        }
        for (int64_t j = 0; j < cols; ++j)
          dst[kTransposed ? (j0 + j) * shape.P + i : i * shape.J + j0 + j] = scale * sum[j];
      }
    }
  }
}

// Per thread: the fp32 block, and its rows of h or dh as panels, going in and coming out.
struct Scratch {
  int64_t R;
  LK_INLINE int64_t block_size() const { return kBlockRows * kBlockStride; }
  LK_INLINE int64_t h_size() const { return kBlockRows * round_up(R, kLanes); }
  LK_INLINE int64_t size() const { return round_up(block_size() + 2 * h_size(), 16); }
  LK_INLINE float* block(float* base) const { return base; }
  LK_INLINE float* h_in(float* base) const { return base + block_size(); }
  LK_INLINE float* h_out(float* base) const { return h_in(base) + h_size(); }
};

void draw_mask(const DrawMask& p) {
  static_assert(kKeptUnit % kKeepStep == 0);
  const Dropout& d = p.dropout;
  const int threads = thread_count(p.num_threads, p.M, p.M * p.stride * 8, kMinMoves);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t m = 0; m < p.M; ++m) keep_bits(d.seed, d.offset, d.threshold, m, p.stride * 8, p.bits + m * p.stride);
}

bool lora_a_fwd(const LoraAFwd& p) {
  const int threads = product_threads(p.num_threads, p.M, p.K, p.R);
  const Panels a_shape{p.K, p.R};
  const Scratch scratch{p.R};
  Buffer a_panels(a_shape.size()), work(threads * scratch.size());
  if (!a_panels.data || !work.data) return false;
  pack(p.lora_a, p.lora_a_dtype, 1, p.K, p.kept.scale, a_shape, a_panels.data, p.num_threads);

  with_type(p.x_dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
      float* base = work.data + part * scratch.size();
      float *block = scratch.block(base), *h = scratch.h_out(base);
      const Range own = share(p.M, kTileRows, part, threads);
      for (int64_t row = own.first; row < own.last; row += kBlockRows) {
        const int64_t rows = min64(kBlockRows, own.last - row);
        const Panels h_shape{rows, p.R};
        memset(h, 0, h_shape.size() * sizeof(float));
        for (int64_t col = 0; col < p.K; col += kBlockCols) {
          const int64_t cols = min64(kBlockCols, p.K - col);
          const Block x =
              block_of((const T*)p.x + row * p.ld_x + col, p.ld_x, rows, cols, mask_at(p.kept, row, col), block);
          for (int64_t panel = 0; panel < a_shape.count(); ++panel) {
            const int width = a_shape.width(panel);
            accumulate<false>(x.data, x.ld, rows, a_panels.data + a_shape.start(panel) + col * width, cols, width,
                              h + h_shape.start(panel));
          }
        }
        unpack_rows(h, h_shape, p.h + row * p.R);
      }
    }
  });
  return true;
}
bool lora_b_bwd(const LoraBBwd& p) {
  const int threads = product_threads(p.num_threads, p.M, p.N, p.R);
  const Panels b_shape{p.N, p.R};
  const Scratch scratch{p.R};
  Buffer b_panels(p.dh ? b_shape.size() : 0), partials(p.dlora_b ? threads * b_shape.size() : 0);
  Buffer work(threads * scratch.size());
  if (!b_panels.data || !partials.data || !work.data) return false;
  if (p.dh) pack(p.lora_b, p.lora_b_dtype, p.R, 1, p.scaling, b_shape, b_panels.data, p.num_threads);

  with_type(p.dy_dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
      float* base = work.data + part * scratch.size();
      float *block = scratch.block(base), *h = scratch.h_in(base), *dh = scratch.h_out(base);
      float* partial = partials.data + (p.dlora_b ? part * b_shape.size() : 0);
      if (p.dlora_b) memset(partial, 0, b_shape.size() * sizeof(float));
      const Range own = share(p.M, kTileRows, part, threads);
      for (int64_t row = own.first; row < own.last; row += kBlockRows) {
        const int64_t rows = min64(kBlockRows, own.last - row);
        const Panels h_shape{rows, p.R};
        memset(dh, 0, h_shape.size() * sizeof(float));
        if (p.dlora_b) pack_rows(p.h + row * p.R, h_shape, h);
        for (int64_t col = 0; col < p.N; col += kBlockCols) {
          const int64_t cols = min64(kBlockCols, p.N - col);
          const Block dy = block_of((const T*)p.dy + row * p.ld_dy + col, p.ld_dy, rows, cols, {}, block);
          for (int64_t panel = 0; panel < b_shape.count(); ++panel) {
            const int width = b_shape.width(panel);
            const int64_t at = b_shape.start(panel) + col * width;
            if (p.dh)
              accumulate<false>(dy.data, dy.ld, rows, b_panels.data + at, cols, width, dh + h_shape.start(panel));
            if (p.dlora_b) accumulate<true>(dy.data, dy.ld, cols, h + h_shape.start(panel), rows, width, partial + at);
          }
        }
        if (p.dh) unpack_rows(dh, h_shape, p.dh + row * p.R);
      }
    }
  });
  if (p.dlora_b) reduce_partials<false>(partials.data, b_shape, threads, p.scaling, p.dlora_b, p.num_threads);
  return true;
}

bool lora_a_bwd(const LoraABwd& p) {
  const int threads = product_threads(p.num_threads, p.M, p.K, p.R);
  const Panels a_shape{p.K, p.R};
  const Scratch scratch{p.R};
  Buffer partials(threads * a_shape.size()), work(threads * scratch.size());
  if (!partials.data || !work.data) return false;

  with_type(p.x_dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
      float* base = work.data + part * scratch.size();
      float *block = scratch.block(base), *dh = scratch.h_in(base);
      float* partial = partials.data + part * a_shape.size();
      memset(partial, 0, a_shape.size() * sizeof(float));
      const Range own = share(p.M, kTileRows, part, threads);
      for (int64_t row = own.first; row < own.last; row += kBlockRows) {
        const int64_t rows = min64(kBlockRows, own.last - row);
        const Panels h_shape{rows, p.R};
        pack_rows(p.dh + row * p.R, h_shape, dh);
        for (int64_t col = 0; col < p.K; col += kBlockCols) {
          const int64_t cols = min64(kBlockCols, p.K - col);
          const Block x =
              block_of((const T*)p.x + row * p.ld_x + col, p.ld_x, rows, cols, mask_at(p.kept, row, col), block);
          for (int64_t panel = 0; panel < a_shape.count(); ++panel) {
            const int width = a_shape.width(panel);
            accumulate<true>(x.data, x.ld, cols, dh + h_shape.start(panel), rows, width,
                             partial + a_shape.start(panel) + col * width);
          }
        }
      }
    }
  });
  reduce_partials<true>(partials.data, a_shape, threads, p.kept.scale, p.dlora_a, p.num_threads);
  return true;
}

bool column_scale_bwd(const ColumnScaleBwd& p) {
  const int threads = thread_count(p.num_threads, p.M, p.M * p.N, kMinMoves);
  const PaddedColumns scale(p.column_scale, p.N), bias(p.bias, p.N);
  const int64_t width = round_up(p.N, kTileCols);
  // Each thread's sums, and those of the last kPieceDepth rows.
  Buffer partials(p.total ? threads * 2 * width : 0);
  if (!scale.buffer.data || !bias.buffer.data || !partials.data) return false;

  with_type(p.dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
      float* const total = p.total ? partials.data + part * 2 * width : nullptr;
      float* const piece = total ? total + width : nullptr;
      if (total) memset(total, 0, 2 * width * sizeof(float));
      const Range own = share(p.M, kTileRows, part, threads);
      for (int64_t row = own.first; row < own.last; ++row) {
        const T *dy = (const T*)p.dy + row * p.ld_dy, *y = p.y ? (const T*)p.y + row * p.ld_y : nullptr;
        T* dz = (T*)p.dz + row * p.N;
        auto step = [&](int64_t n, const T* from, const T* result, T* to) {
          const vf slope = load(from);
          store(to, slope * load(scale.data + n));
          if (!total) return;
          vf value = load(result);
          if (bias.data) value -= load(bias.data + n);
          store(piece + n, load(piece + n) + slope * value);
        };
        int64_t n = 0;
        for (; n + kLanes <= p.N; n += kLanes) step(n, dy + n, y ? y + n : nullptr, dz + n);
        if (n < p.N) {
          const int64_t left = (p.N - n) * sizeof(T);
          T from[kLanes] = {}, result[kLanes] = {}, to[kLanes];
          memcpy(from, dy + n, left);
          if (y) memcpy(result, y + n, left);
          step(n, from, result, to);
          memcpy(dz + n, to, left);
        }
        if (total && (row + 1 == own.last || (row - own.first) % kPieceDepth == kPieceDepth - 1)) {
          for (int64_t i = 0; i < width; i += kLanes) store(total + i, load(total + i) + load(piece + i));
          memset(piece, 0, width * sizeof(float));
        }
      }
    }
  });
  for (int64_t n = 0; p.total && n < p.N; ++n) {
    p.total[n] = 0;
    for (int part = 0; part < threads; ++part) p.total[n] += partials.data[part * 2 * width + n];
  }
  return true;
}

}  // namespace

extern const LoraLinearKernels LK_CONCAT(lora_linear_, LK_ISA);
const LoraLinearKernels LK_CONCAT(lora_linear_, LK_ISA) = {draw_mask, lora_a_fwd, lora_b_bwd, lora_a_bwd,
                                                           column_scale_bwd};

}  // namespace lora_kernels::cpu
