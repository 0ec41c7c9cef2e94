// The kernels of attention.h, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
//
// A thread has a key/value head at a time, in the panels that the register tile reads, and goes through blocks of
// kBlock rows of its query heads. Where keys are later than rows, whole tiles are left out, also inside a block, and
// the depth of the products with p and ds ends (or begins) at the diagonal.
#include <math.h>

#include "attention.h"
#include "tile.h"

namespace lora_kernels::cpu {
namespace {

// Rows, and keys, of a block: whole tiles either way.
constexpr int64_t kBlock = 96;
static_assert(kBlock % kTileRows == 0 && kBlock % kTileCols == 0);
// Pieces of work there should be, if need be by cutting a key/value head's query rows into several, and the
// multiplications and additions from which another one is worth packing the keys and values again.
constexpr int64_t kPieces = 12, kMinPiece = 1 << 19;

struct Sizes {
  AttentionShape shape;
  int64_t group, blocks, keys, cols, ld, slices;
  explicit Sizes(const AttentionShape& s)
      : shape(s),
        group(s.H / s.KV),
        blocks((s.T + kBlock - 1) / kBlock),
        keys(round_up(round_up(s.T, kTileRows), kTileCols)),
        cols(round_up(s.D, kTileCols)),
        ld(cols + 16),  // rows of a block must not fall into one cache set
        slices(min64(min64(group * blocks, 1 + group * s.T * s.T * s.D / kMinPiece),
                     (kPieces + s.B * s.KV - 1) / (s.B * s.KV))) {}
  int64_t pieces() const { return shape.B * shape.KV * slices; }
  int64_t rows_of(int64_t i) const { return min64(kBlock, shape.T - i * kBlock); }

  // Item i of a key/value head is row block i % blocks of query head i / blocks. The first one of a slice: slices take
  // equal areas of the triangles under the diagonals.
  int64_t first_item(int64_t slice) const {
    const double heads = (double)(group * slice) / (double)slices;
    const int64_t whole = group * slice / slices;
    return whole * blocks + (int64_t)lround(sqrt(heads - (double)whole) * (double)blocks);
  }
};

// out [padded, ld] = scale · rows [rows, D] of x, with zeros around them.
template <class T>
LK_INLINE void pack_rows(const T* x, int64_t ld_x, int64_t rows, int64_t padded, int64_t D, float scale, float* out,
                         int64_t ld) {
  for (int64_t r = 0; r < padded; ++r, out += ld) {
    if (r < rows)
      for_each_vector(D, [&](int64_t d, auto read, auto) { store(out + d, scale * read(x + r * ld_x + d)); });
    for (int64_t d = r < rows ? round_up(D, kLanes) : 0; d < ld; d += kLanes) store(out + d, vf{});
  }
}

// Panels [D, kTileCols] of `count` rows of x, with zeros to the end of the tiles that have them as rows or as columns.
template <class T>
LK_INLINE void pack_panels(const Sizes& z, const T* x, int64_t ld_x, int64_t count, float* line, float* panels) {
  for (int64_t key = 0; key < round_up(count, kTileRows); key += kTileCols) {
    pack_rows(x + key * ld_x, ld_x, min64(kTileCols, count - key), kTileCols, z.shape.D, 1.0f, line, z.ld);
    turn_round(line, z.ld * sizeof(float), z.shape.D, panels + key * z.cols);
  }
}

template <class T>
LK_INLINE void write_row(const float* row, float scale, int64_t D, T* out) {
  for_each_vector(D, [&](int64_t d, auto, auto write) { write(out + d, scale * load(row + d)); });
}

// All ones in the lanes that row r may see, of keys from `key` on.
LK_INLINE vu32 visible(int64_t key, int64_t row) {
  vi32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return (vu32)(lane <= (int32_t)(row - key) - vi32{});
}

// sum [kRows, kTileCols] += acc
template <int kRows>
LK_INLINE void accumulate(const vf (&acc)[kRows][kVecs], float* sum, int64_t ld) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* const to = sum + i * ld + v * kLanes;
      store(to, load(to) + acc[i][v]);
    }
}

// Scores [rows, keys] of a block become exp(score - largest so far); `rescale` is what earlier sums are multiplied by.
LK_INLINE void softmax_block(float* s, int64_t rows, bool diagonal, float* largest, float* sum, float* rescale) {
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    const int64_t count = min64(kLanes, rows - r0);
    vf lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = r0 + i;
      float* const row = s + r * kBlock;
      if (diagonal) {
        // To the end of what the products read, which is that of the row's tile.
        const int64_t end = r / kTileRows * kTileRows + kTileRows;
        for (int64_t c = r / kLanes * kLanes; c < end; c += kLanes)
          store(row + c, (vf)select(visible(c, r), (vu32)load(row + c), (vu32)splat(-INFINITY)));
      }
      vf most = load(row);
      for (int64_t c = kLanes; c < (diagonal ? r + 1 : kBlock); c += kLanes) most = larger(most, load(row + c));
      lanes[i] = most;
    }
    transpose(lanes);
    const vf before = load(largest + r0);
    vf now = before;
    for (int i = 0; i < kLanes; ++i) now = larger(lanes[i], now);
    const vf factor = exponential(before - now);
    store(largest + r0, now);
    store(rescale + r0, factor);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = r0 + i;
      float* const row = s + r * kBlock;
      const int64_t end = diagonal ? r / kTileRows * kTileRows + kTileRows : kBlock;
      const vf base = splat(largest[r]);
      vf total = {};
      for (int64_t c = 0; c < end; c += kLanes) {
        const vf p = exponential(load(row + c) - base);
        store(row + c, p);
        total += p;
      }
      lanes[i] = total;
    }
    transpose(lanes);
    vf total = load(sum + r0) * factor;
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    store(sum + r0, total);
  }
}

// Calls f(column, first row) for the tiles of scores of a block of `rows` rows that reach under the diagonal.
template <class F>
LK_INLINE void for_score_tiles(int64_t rows, bool diagonal, F f) {
  for (int64_t c = 0; c < (diagonal ? rows : kBlock); c += kTileCols)
    for (int64_t r = diagonal ? c / kTileRows * kTileRows : 0; r < rows; r += kTileRows) f(c, r);
}

struct FwdWork {
  float *line, *k, *v, *q, *s, *o, *largest, *sum, *rescale;
  static int64_t size(const Sizes& z) {
    return kTileCols * z.ld + z.keys * (z.cols + z.ld) + kBlock * (z.ld + z.cols + kBlock + 3);
  }
  FwdWork(const Sizes& z, float* data)
      : line(data),
        k(line + kTileCols * z.ld),
        v(k + z.keys * z.cols),
        q(v + z.keys * z.ld),
        s(q + kBlock * z.ld),
        o(s + kBlock * kBlock),
        largest(o + kBlock * z.cols),
        sum(largest + kBlock),
        rescale(sum + kBlock) {}
};

template <class T>
void fwd_block(const AttentionFwd& p, const Sizes& z, const FwdWork& w, int64_t b, int64_t h, int64_t block) {
  const int64_t D = p.shape.D, q0 = block * kBlock, rows = z.rows_of(block), padded = round_up(rows, kTileRows);
  pack_rows(row_of<T>(p.q, b, h, q0), p.q.row, rows, padded, D, p.shape.scale, w.q, z.ld);
  memset(w.o, 0, padded * z.cols * sizeof(float));
  memset(w.sum, 0, kBlock * sizeof(float));
  for (int64_t r = 0; r < kBlock; ++r) w.largest[r] = -INFINITY;
  for (int64_t k0 = 0; k0 <= q0; k0 += kBlock) {
    const bool diagonal = k0 == q0;
    for_score_tiles(padded, diagonal, [&](int64_t c, int64_t r) {
      vf acc[kTileRows][kVecs];
      multiply<kTileRows, kVecs, false>(w.q + r * z.ld, z.ld, w.k + (k0 + c) * z.cols, kTileCols, D, acc);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) store(w.s + (r + i) * kBlock + c + v * kLanes, acc[i][v]);
    });
    softmax_block(w.s, padded, diagonal, w.largest, w.sum, w.rescale);
    for (int64_t d = 0; d < D; d += kTileCols)
      for (int64_t r = 0; r < padded; r += kTileRows) {
        vf acc[kTileRows][kVecs];
        multiply<kTileRows, kVecs, false>(w.s + r * kBlock, kBlock, w.v + k0 * z.ld + d, z.ld,
                                          diagonal ? r + kTileRows : kBlock, acc);
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) {
            float* const to = w.o + (r + i) * z.cols + d + v * kLanes;
            store(to, splat(w.rescale[r + i]) * load(to) + acc[i][v]);
          }
      }
  }
  for (int64_t r = 0; r < rows; ++r) {
    write_row(w.o + r * z.cols, 1.0f / w.sum[r], D, row_of<T>(p.o, b, h, q0 + r));
    p.lse[(b * p.shape.H + h) * p.shape.T + q0 + r] = w.largest[r] + logf(w.sum[r]);
  }
}

// The keys that some row of items [first, last) sees.
LK_INLINE int64_t seen_keys(const Sizes& z, int64_t first, int64_t last) {
  const int64_t block =
      last - first >= z.blocks || first / z.blocks != (last - 1) / z.blocks ? z.blocks - 1 : (last - 1) % z.blocks;
  return min64(z.shape.T, (block + 1) * kBlock);
}

template <class T>
void fwd_piece(const AttentionFwd& p, const Sizes& z, const FwdWork& w, int64_t piece) {
  const int64_t head = piece / z.slices, b = head / p.shape.KV, kv = head % p.shape.KV;
  const int64_t first = z.first_item(piece % z.slices), last = z.first_item(piece % z.slices + 1);
  if (first == last) return;
  const int64_t keys = seen_keys(z, first, last);
  pack_panels(z, row_of<T>(p.k, b, kv, 0), p.k.row, keys, w.line, w.k);
  pack_rows(row_of<T>(p.v, b, kv, 0), p.v.row, keys, round_up(keys, kTileRows), p.shape.D, 1.0f, w.v, z.ld);
  for (int64_t i = first; i < last; ++i) fwd_block<T>(p, z, w, b, kv * z.group + i / z.blocks, i % z.blocks);
}

struct BwdWork {
  float *line, *kt, *vt, *k, *q, *dout, *p, *ds, *dq, *lse, *delta;
  static int64_t size(const Sizes& z) {
    return kTileCols * z.ld + z.keys * (2 * z.cols + z.ld) + kBlock * (2 * z.ld + z.cols + 2 * kBlock + 2);
  }
  BwdWork(const Sizes& z, float* data)
      : line(data),
        kt(line + kTileCols * z.ld),
        vt(kt + z.keys * z.cols),
        k(vt + z.keys * z.cols),
        q(k + z.keys * z.ld),
        dout(q + kBlock * z.ld),
        p(dout + kBlock * z.ld),
        ds(p + kBlock * kBlock),
        dq(ds + kBlock * kBlock),
        lse(dq + kBlock * z.cols),
        delta(lse + kBlock) {}
};

template <class T>
LK_INLINE float dot(const T* a, const T* b, int64_t D) {
  vf sum = {};
  for_each_vector(D, [&](int64_t d, auto read, auto) { sum += read(a + d) * read(b + d); });
  return sum_of_lanes(sum);
}

// Adds to dk and dv [keys, cols], of q that is scaled already.
template <class T>
void bwd_block(const AttentionBwd& p, const Sizes& z, const BwdWork& w, int64_t b, int64_t h, int64_t block, float* dk,
               float* dv) {
  const int64_t D = p.shape.D, q0 = block * kBlock, rows = z.rows_of(block), padded = round_up(rows, kTileRows);
  pack_rows(row_of<T>(p.q, b, h, q0), p.q.row, rows, padded, D, p.shape.scale, w.q, z.ld);
  pack_rows(row_of<T>(p.dout, b, h, q0), p.dout.row, rows, padded, D, 1.0f, w.dout, z.ld);
  memset(w.dq, 0, padded * z.cols * sizeof(float));
  for (int64_t r = 0; r < padded; ++r) {
    // Rows of padding have the score 0 and add nothing, since their q and dout are zeros.
    w.lse[r] = r < rows ? p.lse[(b * p.shape.H + h) * p.shape.T + q0 + r] : 0.0f;
    w.delta[r] = r < rows ? dot(row_of<T>(p.dout, b, h, q0 + r), row_of<T>(p.o, b, h, q0 + r), D) : 0.0f;
  }
  for (int64_t k0 = 0; k0 <= q0; k0 += kBlock) {
    const bool diagonal = k0 == q0;
    for_score_tiles(padded, diagonal, [&](int64_t c, int64_t r) {
      vf acc[kTileRows][kVecs];
      multiply<kTileRows, kVecs, false>(w.q + r * z.ld, z.ld, w.kt + (k0 + c) * z.cols, kTileCols, D, acc);
      for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          vf value = exponential(acc[i][v] - splat(w.lse[r + i]));
          if (diagonal) value = (vf)((vu32)value & visible(c + v * kLanes, r + i));
          store(w.p + (r + i) * kBlock + c + v * kLanes, value);
        }
      multiply<kTileRows, kVecs, false>(w.dout + r * z.ld, z.ld, w.vt + (k0 + c) * z.cols, kTileCols, D, acc);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          const int64_t at = (r + i) * kBlock + c + v * kLanes;
          store(w.ds + at, load(w.p + at) * (acc[i][v] - splat(w.delta[r + i])));
        }
    });
    for (int64_t c = 0; c < (diagonal ? padded : kBlock); c += kTileRows) {
      const int64_t first = diagonal ? c : 0;
      for (int64_t d = 0; d < D; d += kTileCols) {
        vf acc[kTileRows][kVecs];
        multiply<kTileRows, kVecs, true>(w.p + first * kBlock + c, kBlock, w.dout + first * z.ld + d, z.ld,
                                         padded - first, acc);
        accumulate(acc, dv + (k0 + c) * z.cols + d, z.cols);
        multiply<kTileRows, kVecs, true>(w.ds + first * kBlock + c, kBlock, w.q + first * z.ld + d, z.ld,
                                         padded - first, acc);
        accumulate(acc, dk + (k0 + c) * z.cols + d, z.cols);
      }
    }
    for (int64_t d = 0; d < D; d += kTileCols)
      for (int64_t r = 0; r < padded; r += kTileRows) {
        vf acc[kTileRows][kVecs];
        multiply<kTileRows, kVecs, false>(w.ds + r * kBlock, kBlock, w.k + k0 * z.ld + d, z.ld,
                                          diagonal ? r + kTileRows : kBlock, acc);
        accumulate(acc, w.dq + r * z.cols + d, z.cols);
      }
  }
  for (int64_t r = 0; r < rows; ++r) write_row(w.dq + r * z.cols, p.shape.scale, D, row_of<T>(p.dq, b, h, q0 + r));
}

// dk and dv of a key/value head are the sums of its slices, `stride` floats apart, in their order.
template <class T>
void write_sums(const AttentionBwd& p, const Sizes& z, int64_t head, float* sums, int64_t stride) {
  const int64_t b = head / p.shape.KV, kv = head % p.shape.KV;
  for (int64_t t = 0; t < p.shape.T; ++t)
    for (int which = 0; which < 2; ++which) {
      float* const sum = sums + (which * z.keys + t) * z.cols;
      for (int64_t slice = 1; slice < z.slices; ++slice)
        for (int64_t d = 0; d < z.cols; d += kLanes) store(sum + d, load(sum + d) + load(sum + slice * stride + d));
      write_row(sum, 1.0f, p.shape.D, row_of<T>(which ? p.dv : p.dk, b, kv, t));
    }
}

template <class T>
void bwd_piece(const AttentionBwd& p, const Sizes& z, const BwdWork& w, int64_t piece, float* sums) {
  const int64_t head = piece / z.slices, b = head / p.shape.KV, kv = head % p.shape.KV;
  const int64_t first = z.first_item(piece % z.slices), last = z.first_item(piece % z.slices + 1);
  memset(sums, 0, 2 * z.keys * z.cols * sizeof(float));
  if (first == last) return;
  const int64_t keys = seen_keys(z, first, last);
  pack_panels(z, row_of<T>(p.k, b, kv, 0), p.k.row, keys, w.line, w.kt);
  pack_panels(z, row_of<T>(p.v, b, kv, 0), p.v.row, keys, w.line, w.vt);
  pack_rows(row_of<T>(p.k, b, kv, 0), p.k.row, keys, round_up(keys, kTileRows), p.shape.D, 1.0f, w.k, z.ld);
  for (int64_t i = first; i < last; ++i)
    bwd_block<T>(p, z, w, b, kv * z.group + i / z.blocks, i % z.blocks, sums, sums + z.keys * z.cols);
}

bool forward(const AttentionFwd& p) {
  const Sizes z(p.shape);
  const AttentionShape& s = p.shape;
  const int threads = thread_count(s.num_threads, z.pieces(), s.B * s.H * s.T * s.T * s.D, kMinMultiplyAdds);
  const int64_t size = FwdWork::size(z);
  Buffer work(threads * size);
  if (!work.data) return false;
  with_type(s.dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
      const Range own = share(z.pieces(), 1, part, threads);
      for (int64_t i = own.first; i < own.last; ++i) fwd_piece<T>(p, z, FwdWork(z, work.data + part * size), i);
    }
  });
  return true;
}

bool backward(const AttentionBwd& p) {
  const Sizes z(p.shape);
  const AttentionShape& s = p.shape;
  const int threads = thread_count(s.num_threads, z.pieces(), 2 * s.B * s.H * s.T * s.T * s.D, kMinMultiplyAdds);
  const int64_t size = BwdWork::size(z), sum_size = 2 * z.keys * z.cols;
  const bool sliced = z.slices > 1;
  Buffer work(threads * size), sums((sliced ? z.pieces() : threads) * sum_size);
  if (!work.data || !sums.data) return false;
  with_type(s.dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
      const Range own = share(z.pieces(), 1, part, threads);
      for (int64_t i = own.first; i < own.last; ++i) {
        float* const own_sums = sums.data + (sliced ? i : part) * sum_size;
        bwd_piece<T>(p, z, BwdWork(z, work.data + part * size), i, own_sums);
        if (!sliced) write_sums<T>(p, z, i, own_sums, sum_size);
      }
    }
    if (sliced)
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
      for (int64_t head = 0; head < s.B * s.KV; ++head)
        write_sums<T>(p, z, head, sums.data + head * z.slices * sum_size, sum_size);
  });
  return true;
}

}  // namespace

extern const AttentionKernels LK_CONCAT(attention_, LK_ISA);
const AttentionKernels LK_CONCAT(attention_, LK_ISA) = {forward, backward};

}  // namespace lora_kernels::cpu
