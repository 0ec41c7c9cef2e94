// The products of product.h, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
//
// For some columns of the result, a piece of the weight is converted into panels [depth, kTileCols] that the register
// tile reads from cache, and is used for up to kBlockRows rows of the input before the next one. So the weight is read
// once for that many rows, in the form it is stored in, and never exists as a float32 [N, K].
#include "product.h"
#include "tile.h"
#include "weight_rows.h"

namespace lora_kernels::cpu {
namespace {

// Depth of a piece: its panel of kTileCols columns takes 16 KiB of the first cache with 8 lanes.
constexpr int64_t kPieceDepth = 256;
// One cache line more than a power of two: rows, or panels, of a piece must not fall into one cache set.
constexpr int64_t kPieceStride = kPieceDepth + 16;
constexpr int64_t kBlockCols = 256;
constexpr int64_t kBlockTiles = kBlockCols / kTileCols;
// Rows of the input whose piece stays in the second cache, and those whose sums wait for the next piece: whole tiles,
// so that a row is in a tile of the same size however the rows are shared out, and its result has the same bits.
constexpr int64_t kInnerRows = 192;
constexpr int64_t kBlockRows = 5 * kInnerRows;
static_assert(kInnerRows % kTileRows == 0);
// Rows of the input that take as long as converting the weight.
constexpr int64_t kConvertRows = 16;

constexpr int64_t kPanelSize = kPieceStride * kTileCols;

// Panels, kPanelSize apart, of `depth` steps from p0 on and `cols` columns of the result from j0 on. What is in the
// last one beyond these columns is not used. `rows` has room for kTileCols rows of a piece.
template <class W>
LK_INLINE void make_panels(const W& weight, float scale, bool transposed, int64_t p0, int64_t depth, int64_t j0,
                           int64_t cols, float* rows, float* panels) {
  const int64_t tiles = (cols + kTileCols - 1) / kTileCols;
  if (!transposed) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * kTileCols, width = min64(kTileCols, cols - first);
      for (int64_t j = 0; j < width; ++j)
        convert_row(weight, scale, j0 + first + j, p0, depth, rows + j * kPieceStride);
      turn_round(rows, kPieceStride, depth, panels + tile * kPanelSize);
    }
    return;
  }
  for (int64_t p = 0; p < depth; ++p) {
    convert_row(weight, scale, p0 + p, j0, cols, rows);
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int v = 0; v < kVecs; ++v)
        store(panels + tile * kPanelSize + p * kTileCols + v * kLanes, load(rows + tile * kTileCols + v * kLanes));
  }
}

// From the first column of a tile on; null where there is none.
struct Epilogue {
  const float *column_scale, *bias;
};

// sums [M, kTileCols] (+)= a times a panel, over one piece; out [M, :width] gets the sums of the last one, finished.
template <class T>
LK_INLINE void multiply_piece(const float* a, int64_t lda, int64_t M, const float* panel, int64_t depth, bool first,
                              bool last, float* sums, Epilogue epilogue, T* out, int64_t ld_out, int64_t width) {
  for_row_tiles(M, [&](auto tile, int64_t m) {
    constexpr int kRows = decltype(tile)::value;
    vf acc[kRows][kVecs];
    float* const so_far = sums + m * kTileCols;
    multiply<kRows, kVecs, false>(a + m * lda, lda, panel, kTileCols, depth, acc);
    if (!first)
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) acc[i][v] += load(so_far + (i * kVecs + v) * kLanes);
    if (!last) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) store(so_far + (i * kVecs + v) * kLanes, acc[i][v]);
      return;
    }
    auto finish = [&](int i, T* to) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        vf value = acc[i][v];
        if (epilogue.column_scale) value *= load(epilogue.column_scale + v * kLanes);
        if (epilogue.bias) value += load(epilogue.bias + v * kLanes);
        store(to + v * kLanes, value);
      }
    };
    T* const to = out + m * ld_out;
    if (width == kTileCols) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) finish(i, to + i * ld_out);
    } else {
      for (int i = 0; i < kRows; ++i) {
        T whole[kTileCols];
        finish(i, whole);
        memcpy(to + i * ld_out, whole, width * sizeof(T));
      }
    }
  });
}

// Rows and columns of a grid of threads.
struct Grid {
  int rows, cols;
};

// The grid with the least work for the busiest thread.
Grid make_grid(int threads, int64_t M, int64_t tiles) {
  Grid best{1, 1};
  int64_t least = INT64_MAX;
  for (int rows = 1; rows <= threads; ++rows) {
    const int cols = (int)min64(threads / rows, tiles);
    const int64_t own_rows = round_up((M + rows - 1) / rows, kTileRows) + kConvertRows;
    const int64_t work = own_rows * ((tiles + cols - 1) / cols);
    if (work < least) least = work, best = {rows, cols};
  }
  return best;
}

// The rows and columns of one thread, up to block_rows at a time.
template <class T>
void own_part(const Product& p, const PaddedColumns& column_scale, const PaddedColumns& bias, Range rows, Range cols,
              int64_t block_rows, float* work) {
  float *const line = work, *const panels = line + kTileCols * kPieceStride;
  float* const sums = panels + kBlockTiles * kPanelSize;
  memset(line, 0, kTileCols * kPieceStride * sizeof(float));
  for (int64_t m0 = rows.first; m0 < rows.last; m0 += block_rows) {
    const int64_t m1 = min64(m0 + block_rows, rows.last);
    for (int64_t j0 = cols.first; j0 < cols.last; j0 += kBlockCols) {
      const int64_t block_cols = min64(kBlockCols, cols.last - j0);
      for (int t = 0; t < p.count; ++t) {
        const ProductTerm& term = p.terms[t];
        const int64_t P = p.transposed ? term.weight.N : term.weight.K;
        const int64_t pieces = (P + kPieceDepth - 1) / kPieceDepth, step = round_up((P + pieces - 1) / pieces, kLanes);
        for (int64_t p0 = 0; p0 < P; p0 += step) {
          const int64_t depth = min64(step, P - p0);
          const bool first = t == 0 && p0 == 0, last = t == p.count - 1 && p0 + depth == P;
          with_weight(term.weight, [&](const auto& weight) {
            make_panels(weight, term.scale, p.transposed, p0, depth, j0, block_cols, line, panels);
          });
          for (int64_t m = m0; m < m1; m += kInnerRows)
            for (int64_t j = 0; j < block_cols; j += kTileCols) {
              const int64_t tile = j / kTileCols;
              multiply_piece(term.in + m * term.ld + p0, term.ld, min64(kInnerRows, m1 - m), panels + tile * kPanelSize,
                             depth, first, last, sums + (tile * block_rows + m - m0) * kTileCols,
                             {column_scale.at(j0 + j), bias.at(j0 + j)}, (T*)p.out + m * p.ld_out + j0 + j, p.ld_out,
                             min64(kTileCols, block_cols - j));
            }
        }
      }
    }
  }
}

bool product(const Product& p) {
  const PaddedColumns column_scale(p.column_scale, p.J), bias(p.bias, p.J);
  if (!column_scale.buffer.data || !bias.buffer.data) return false;
  int64_t depth = 0;
  for (int t = 0; t < p.count; ++t) depth += p.transposed ? p.terms[t].weight.N : p.terms[t].weight.K;
  const int64_t tiles = (p.J + kTileCols - 1) / kTileCols, row_tiles = (p.M + kTileRows - 1) / kTileRows;
  const Grid grid =
      make_grid(thread_count(p.num_threads, row_tiles * tiles, p.M * p.J * depth, kMinMultiplyAdds), p.M, tiles);
  const int threads = grid.rows * grid.cols;
  const int64_t block_rows = min64(kBlockRows, round_up((p.M + grid.rows - 1) / grid.rows, kTileRows));
  const int64_t size = kTileCols * kPieceStride + kBlockTiles * (kPanelSize + block_rows * kTileCols);
  Buffer work(threads * size);
  if (!work.data) return false;
  with_type(p.out_dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; ++part)
      own_part<T>(p, column_scale, bias, share(p.M, kTileRows, part / grid.cols, grid.rows),
                  share(p.J, kTileCols, part % grid.cols, grid.cols), block_rows, work.data + part * size);
  });
  return true;
}

}  // namespace

extern const ProductKernels LK_CONCAT(product_, LK_ISA);
const ProductKernels LK_CONCAT(product_, LK_ISA) = {product};

}  // namespace lora_kernels::cpu
