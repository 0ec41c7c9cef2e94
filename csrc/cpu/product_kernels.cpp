// The products of product.h, built once per instruction set (LK_ISA, LK_LANES; see setup.py).
//
// For some columns of the result, a piece of the weight is converted into panels [depth, kTileCols] that the register
// tile reads from cache, and is used for up to kBlockRows rows of the input before the next one. So the weight is read
// once for that many rows, in the form it is stored in, and never exists as a float32 [N, K].
#include <type_traits>

#include "bfloat16.h"
#include "product.h"
#include "tile.h"
#include "weight_rows.h"

// Builds whose registers the instructions take.
#if defined(__AVX512F__) && LK_LANES == 16
#if defined(LK_HAS_AVX512_BF16)
#define LK_DOTS
#endif
#if defined(LK_HAS_AMX)
#define LK_TILES
#endif
#endif

namespace lora_kernels::cpu {
namespace {

// How bfloat16 is multiplied: widened to float32; by AVX-512-BF16, two products and two additions of a lane at once; by
// AMX, matrices of 16 by 32.
enum class Bf16 { kWidened, kDots, kTiles };

// A panel [depth, kTileCols] has a float for each step of depth, or, of bfloat16, one for two steps: the pairs that the
// processor multiplies and adds up at once. Of a piece of the weight, panels are kPanelSize floats apart.
template <class In>
struct Layout;

template <>
struct Layout<float> {
  // Depth of a piece: its panel takes 16 KiB of the first cache with 8 lanes.
  static constexpr int64_t kDepth = 256;
  static constexpr int64_t kFloats = kDepth;
};

template <>
struct Layout<bf16> {
  static constexpr int64_t kDepth = 768;
  static constexpr int64_t kFloats = kDepth / 2;
};

// What the register tile takes: rows, and steps of depth, to which zeros are added.
template <Bf16 kHow>
constexpr int64_t kRowUnit = kHow == Bf16::kTiles ? 32 : kTileRows;
template <class In, Bf16 kHow>
constexpr int64_t kDepthUnit = sizeof(In) == sizeof(float) ? 1
                               : kHow == Bf16::kTiles      ? 32
                                                           : 2;
// Pieces but the last are multiples of so many steps.
constexpr int64_t kStepUnit = 32;

// One cache line more than a power of two: rows, or panels, of a piece must not fall into one cache set.
template <class In>
constexpr int64_t kStride = Layout<In>::kFloats + 16;
template <class In>
constexpr int64_t kPanelSize = kStride<In> * kTileCols;

constexpr int64_t kBlockCols = 256;
constexpr int64_t kBlockTiles = kBlockCols / kTileCols;
// Rows of the input whose piece stays in the second cache, and those whose sums wait for the next piece: whole tiles,
// so that a row is in a tile of the same size however the rows are shared out, and its result has the same bits.
constexpr int64_t kInnerRows = 96;
constexpr int64_t kBlockRows = 5 * kInnerRows;
static_assert(kInnerRows % kTileRows == 0 && kInnerRows % kRowUnit<Bf16::kTiles> == 0);
// Rows of the input that take as long as converting the weight.
constexpr int64_t kConvertRows = 16;

// Rows of the weight in the type of the input, from row n and column `first` on: where they lie, if they may be read
// there, else written to `to`, whose rows are ld apart.
template <class In>
struct Rows {
  const In* data;
  int64_t ld;
};
template <class W, class In>
LK_INLINE Rows<In> rows_of(const W& weight, float scale, int64_t n, int64_t count, int64_t first, int64_t cols,
                           bool in_place, In* to, int64_t ld) {
  if constexpr (std::is_same_v<W, Dense<In>>)
    if (in_place && scale == 1.0f) return {weight.data + n * weight.ld + first, weight.ld};
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(In) == sizeof(float))
      convert_row(weight, scale, n + i, first, cols, to + i * ld);
    else
      narrow_row(weight, scale, n + i, first, cols, to + i * ld);
  }
  return {to, ld};
}

// How far before it is read a weight is fetched.
constexpr int64_t kRowsAhead = 16;

// Panels of `depth` steps from p0 on and `cols` columns of the result from j0 on. What is in the last one beyond these
// columns is not used. `line` has room for kTileCols rows of a piece.
template <class W>
LK_INLINE void make_panels(const W& weight, float scale, bool transposed, int64_t p0, int64_t depth, int64_t j0,
                           int64_t cols, float* line, float* panels) {
  const int64_t tiles = (cols + kTileCols - 1) / kTileCols;
  if (!transposed) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * kTileCols, width = min64(kTileCols, cols - first);
      const auto rows = rows_of(weight, scale, j0 + first, width, p0, depth, width == kTileCols && depth % kLanes == 0,
                                line, kStride<float>);
      turn_round(rows.data, rows.ld * sizeof(float), depth, panels + tile * kPanelSize<float>,
                 rows.data == line ? 0 : kTileCols * rows.ld * sizeof(float));
    }
    return;
  }
  for (int64_t p = 0; p < depth; ++p) {
    const auto row = rows_of(weight, scale, p0 + p, 1, j0, cols, cols % kTileCols == 0, line, 0);
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int v = 0; v < kVecs; ++v)
        store(panels + tile * kPanelSize<float> + p * kTileCols + v * kLanes,
              load(row.data + tile * kTileCols + v * kLanes));
  }
}

// The same in pairs, zeros up to whole units of AMX.
template <class W>
LK_INLINE void make_panels(const W& weight, float scale, bool transposed, int64_t p0, int64_t depth, int64_t j0,
                           int64_t cols, bf16* line, float* panels) {
  constexpr int64_t kRow = 2 * kStride<bf16>;
  const int64_t tiles = (cols + kTileCols - 1) / kTileCols, whole = round_up(depth, kDepthUnit<bf16, Bf16::kTiles>);
  if (!transposed) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * kTileCols, width = min64(kTileCols, cols - first);
      const auto rows =
          rows_of(weight, scale, j0 + first, width, p0, depth, width == kTileCols && whole == depth, line, kRow);
      for (int64_t j = 0; whole > depth && j < width; ++j)
        memset(line + j * kRow + depth, 0, (whole - depth) * sizeof(bf16));
      turn_round(rows.data, rows.ld * sizeof(bf16), whole / 2, panels + tile * kPanelSize<bf16>,
                 rows.data == line ? 0 : kTileCols * rows.ld * sizeof(bf16));
    }
    return;
  }
  static_assert(kTileCols * kRow >= 2 * kBlockCols);
  for (int64_t p = 0; p < whole; p += 2) {
    const int64_t count = min64(2, depth - p);
    if (count < 2) memset(line, 0, 2 * kBlockCols * sizeof(bf16));
    const auto rows = count > 0 ? rows_of(weight, scale, p0 + p, count, j0, cols, count == 2 && cols % kTileCols == 0,
                                          line, kBlockCols)
                                : Rows<bf16>{line, kBlockCols};
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int v = 0; v < kVecs; ++v) {
        const bf16* const even = rows.data + tile * kTileCols + v * kLanes;
        if (v == 0 && rows.data != line) {
          __builtin_prefetch(even + kRowsAhead * rows.ld);
          __builtin_prefetch(even + (kRowsAhead + 1) * rows.ld);
        }
        store_raw(panels + tile * kPanelSize<bf16> + p / 2 * kTileCols + v * kLanes,
                  widen(load_raw<vu16>(even)) | widen(load_raw<vu16>(even + rows.ld)) << 16);
      }
  }
}

// sum += the products of two bfloat16 in each lane.
template <Bf16 kHow>
LK_INLINE void add_pairs(vf& sum, vu32 a, vu32 b) {
#if defined(LK_DOTS)
  if constexpr (kHow == Bf16::kDots) {
    // By its name, as all such instructions here: the build for AVX-512 then needs no flag for it. The compiler keeps a
    // local variable in its register.
    vf local = sum;
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(local) : "v"(b), "v"(a));
    sum = local;
    return;
  }
#endif
  sum += (vf)(a << 16) * (vf)(b << 16);
  sum += (vf)(a & 0xffff0000) * (vf)(b & 0xffff0000);
}

// acc[i] = Σ_p a[i, p] b[p, :] over pairs of steps, of which each float of a row of `a` and of a panel has one.
template <Bf16 kHow, int kRows>
LK_INLINE void multiply_pairs(const bf16* a, int64_t lda, const float* panel, int64_t pairs, vf (&acc)[kRows][kVecs]) {
  accumulate_steps(
      [=](int i, int64_t p) __attribute__((always_inline)) {
        uint32_t pair;
        memcpy(&pair, a + i * lda + 2 * p, 4);
        return splat_u32(pair);
      },
      panel, kTileCols, pairs, acc,
      [](vf& sum, vu32 av, vf bv) __attribute__((always_inline)) { add_pairs<kHow>(sum, av, (vu32)bv); });
}

#if defined(LK_TILES)
// Eight registers of 16 rows of 64 bytes: four of sums [16, 16], two of `in` [16, 32] and two of a panel [16 pairs,
// 16]. What the arrays have beyond them must be zero.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kTileConfig;

#define LK_TILE_LOAD(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(stride)) : "memory")
#define LK_TILE_STORE(tile, to, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(stride)) : "memory")
#define LK_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define LK_TILE_DOT(sums, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sums : :)

// sums [kTiles * 16, 32] (+)= a [kTiles * 16, 2 * pairs] times a panel.
template <int kTiles>
LK_INLINE void multiply_tiles(const bf16* a, int64_t lda, const float* panel, int64_t pairs, bool first, float* sums) {
  constexpr int64_t kCols = kTileCols * sizeof(float);
  static_assert(kTileCols == 32);
  if (first) {
    LK_TILE_ZERO(0);
    LK_TILE_ZERO(1);
    if (kTiles > 1) {
      LK_TILE_ZERO(2);
      LK_TILE_ZERO(3);
    }
  } else {
    LK_TILE_LOAD(0, sums, kCols);
    LK_TILE_LOAD(1, sums + 16, kCols);
    if (kTiles > 1) {
      LK_TILE_LOAD(2, sums + 16 * kTileCols, kCols);
      LK_TILE_LOAD(3, sums + 16 * kTileCols + 16, kCols);
    }
  }
  for (int64_t p = 0; p < pairs; p += 16) {
    LK_TILE_LOAD(6, panel + p * kTileCols, kCols);
    LK_TILE_LOAD(4, a + 2 * p, lda * sizeof(bf16));
    LK_TILE_DOT(0, 4, 6);
    LK_TILE_LOAD(7, panel + p * kTileCols + 16, kCols);
    LK_TILE_DOT(1, 4, 7);
    if (kTiles > 1) {
      LK_TILE_LOAD(5, a + 16 * lda + 2 * p, lda * sizeof(bf16));
      LK_TILE_DOT(2, 5, 6);
      LK_TILE_DOT(3, 5, 7);
    }
  }
  LK_TILE_STORE(0, sums, kCols);
  LK_TILE_STORE(1, sums + 16, kCols);
  if (kTiles > 1) {
    LK_TILE_STORE(2, sums + 16 * kTileCols, kCols);
    LK_TILE_STORE(3, sums + 16 * kTileCols + 16, kCols);
  }
}

struct Tiles {
  Tiles() { __asm__ volatile("ldtilecfg %0" : : "m"(kTileConfig)); }
  ~Tiles() { __asm__ volatile("tilerelease" : :); }
};
#endif

// From the first column of a tile on; null where there is none.
struct Epilogue {
  const float *column_scale, *bias;
};

// One row of kTileCols sums, finished. What multiplies bfloat16 rounds to it in one instruction.
template <Bf16 kHow, class T>
LK_INLINE void finish(const vf (&sums)[kVecs], Epilogue epilogue, T* out, int64_t width) {
  T whole[kTileCols];
  T* const to = width == kTileCols ? out : whole;
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) {
    vf value = sums[v];
    if (epilogue.column_scale) value *= load(epilogue.column_scale + v * kLanes);
    if (epilogue.bias) value += load(epilogue.bias + v * kLanes);
#if defined(LK_DOTS) || defined(LK_TILES)
    if constexpr (kHow != Bf16::kWidened && std::is_same_v<T, bf16>) {
      __m256i rounded;
      __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(value));
      store_raw(to + v * kLanes, rounded);
      continue;
    }
#endif
    store(to + v * kLanes, value);
  }
  if (to != out) memcpy(out, whole, width * sizeof(T));
}

// sums [M, kTileCols] (+)= what the mask keeps of a times a panel, over one piece; out [M, :width] gets the sums of the
// last one, finished.
template <Bf16 kHow, class In, class T>
LK_INLINE void multiply_piece(const In* a, int64_t lda, int64_t M, const float* panel, int64_t depth, bool first,
                              bool last, Mask mask, float* sums, Epilogue epilogue, T* out, int64_t ld_out,
                              int64_t width) {
  auto keep = [&](int64_t row, vf(&products)[kVecs]) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) products[v] = (vf)((vu32)products[v] & expand_bits(mask.row(row), v * kLanes));
  };
#if defined(LK_TILES)
  if constexpr (kHow == Bf16::kTiles) {
    for (int64_t m = 0; m < M; m += 32) {
      float* const so_far = sums + m * kTileCols;
      float products[32 * kTileCols];
      float* const to = mask.bits ? products : so_far;
      if (M - m > 16)
        multiply_tiles<2>(a + m * lda, lda, panel, depth / 2, first || mask.bits, to);
      else
        multiply_tiles<1>(a + m * lda, lda, panel, depth / 2, first || mask.bits, to);
      for (int64_t i = 0; (last || mask.bits) && i < min64(32, M - m); ++i) {
        float* const row = so_far + i * kTileCols;
        vf total[kVecs];
        for (int v = 0; v < kVecs; ++v) total[v] = load(to + i * kTileCols + v * kLanes);
        if (mask.bits) {
          keep(m + i, total);
          for (int v = 0; v < kVecs; ++v) {
            if (!first) total[v] += load(row + v * kLanes);
            store(row + v * kLanes, total[v]);
          }
        }
        if (last) finish<kHow>(total, epilogue, out + (m + i) * ld_out, width);
      }
    }
    return;
  }
#endif
  for_row_tiles(M, [&](auto tile, int64_t m) {
    constexpr int kRows = decltype(tile)::value;
    vf acc[kRows][kVecs];
    float* const so_far = sums + m * kTileCols;
    if constexpr (sizeof(In) == sizeof(float))
      multiply<kRows, kVecs, false>(a + m * lda, lda, panel, kTileCols, depth, acc);
    else
      multiply_pairs<kHow>(a + m * lda, lda, panel, depth / 2, acc);
    if (mask.bits)
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) keep(m + i, acc[i]);
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
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) finish<kHow>(acc[i], epilogue, out + (m + i) * ld_out, width);
  });
}

// Rows and columns of a grid of threads.
struct Grid {
  int rows, cols;
};

// The grid with the least work for the busiest thread.
Grid make_grid(int threads, int64_t M, int64_t row_unit, int64_t tiles) {
  Grid best{1, 1};
  int64_t least = INT64_MAX;
  for (int rows = 1; rows <= threads; ++rows) {
    const int cols = (int)min64(threads / rows, tiles);
    const int64_t own_rows = round_up((M + rows - 1) / rows, row_unit) + kConvertRows;
    const int64_t work = own_rows * ((tiles + cols - 1) / cols);
    if (work < least) least = work, best = {rows, cols};
  }
  return best;
}

// Scratch memory of a thread: rows of a weight and its panels, rows of the input, and sums.
template <class In>
struct Work {
  static constexpr int64_t kRows = kTileCols * kStride<In>, kPanels = kBlockTiles * kPanelSize<In>;
  // Of bfloat16, what doesn't fill the registers of AMX is copied to where zeros follow it.
  static constexpr int64_t kStaged = sizeof(In) == sizeof(float) ? 0 : kInnerRows * kStride<In>;
  static int64_t size(int64_t block_rows) { return kRows + kPanels + kStaged + kBlockTiles * block_rows * kTileCols; }
};

// Rows of a piece of the input, with zeros up to whole tiles.
template <Bf16 kHow>
LK_INLINE void stage_rows(const bf16* in, int64_t ld, int64_t rows, int64_t depth, int64_t whole, bf16* staged) {
  constexpr int64_t kRow = 2 * kStride<bf16>;
  for (int64_t m = 0; m < rows; ++m) {
    memcpy(staged + m * kRow, in + m * ld, depth * sizeof(bf16));
    memset(staged + m * kRow + depth, 0, (whole - depth) * sizeof(bf16));
  }
  if constexpr (kHow == Bf16::kTiles)
    for (int64_t m = rows; m < round_up(rows, kRowUnit<kHow>); ++m) memset(staged + m * kRow, 0, whole * sizeof(bf16));
}

// The rows and columns of one thread, up to block_rows at a time.
template <Bf16 kHow, class In, class T>
void own_part(const Product& p, const PaddedColumns& column_scale, const PaddedColumns& bias, Range rows, Range cols,
              int64_t block_rows, float* work) {
  float *const line = work, *const panels = line + Work<In>::kRows;
  In* const staged = (In*)(panels + Work<In>::kPanels);
  float* const sums = panels + Work<In>::kPanels + Work<In>::kStaged;
  memset(line, 0, Work<In>::kRows * sizeof(float));
  for (int64_t m0 = rows.first; m0 < rows.last; m0 += block_rows) {
    const int64_t m1 = min64(m0 + block_rows, rows.last);
    for (int64_t j0 = cols.first; j0 < cols.last; j0 += kBlockCols) {
      const int64_t block_cols = min64(kBlockCols, cols.last - j0);
      for (int t = 0; t < p.count; ++t) {
        const ProductTerm& term = p.terms[t];
        const int64_t P = p.transposed ? term.weight.N : term.weight.K;
        const int64_t pieces = (P + Layout<In>::kDepth - 1) / Layout<In>::kDepth,
                      step = round_up((P + pieces - 1) / pieces, kStepUnit);
        for (int64_t p0 = 0; p0 < P; p0 += step) {
          const int64_t depth = min64(step, P - p0), whole = round_up(depth, kDepthUnit<In, kHow>);
          const bool first = t == 0 && p0 == 0, last = t == p.count - 1 && p0 + depth == P;
          with_weight(term.weight, [&](const auto& weight) {
            make_panels(weight, term.scale, p.transposed != term.weight.turned, p0, depth, j0, block_cols, (In*)line,
                        panels);
          });
          for (int64_t m = m0; m < m1; m += kInnerRows) {
            const int64_t M = min64(kInnerRows, m1 - m);
            const In* in = (const In*)term.in + m * term.ld + p0;
            int64_t ld = term.ld;
            if constexpr (sizeof(In) != sizeof(float)) {
              if (whole != depth || (kHow == Bf16::kTiles && M % kRowUnit<kHow>)) {
                stage_rows<kHow>(in, ld, M, depth, whole, staged);
                in = staged, ld = 2 * kStride<In>;
              }
            }
            for (int64_t j = 0; j < block_cols; j += kTileCols) {
              const int64_t tile = j / kTileCols;
              multiply_piece<kHow>(in, ld, M, panels + tile * kPanelSize<In>, whole, first, last,
                                   mask_at(term.kept, m, j0 + j), sums + (tile * block_rows + m - m0) * kTileCols,
                                   {column_scale.at(j0 + j), bias.at(j0 + j)}, (T*)p.out + m * p.ld_out + j0 + j,
                                   p.ld_out, min64(kTileCols, block_cols - j));
            }
          }
        }
      }
    }
  }
}

template <Bf16 kHow, class In>
bool product_of(const Product& p) {
  const PaddedColumns column_scale(p.column_scale, p.J), bias(p.bias, p.J);
  if (!column_scale.buffer.data || !bias.buffer.data) return false;
  int64_t depth = 0;
  for (int t = 0; t < p.count; ++t) depth += p.transposed ? p.terms[t].weight.N : p.terms[t].weight.K;
  constexpr int64_t kUnit = kRowUnit<kHow>;
  const int64_t tiles = (p.J + kTileCols - 1) / kTileCols, row_tiles = (p.M + kUnit - 1) / kUnit;
  const Grid grid =
      make_grid(thread_count(p.num_threads, row_tiles * tiles, p.M * p.J * depth, kMinMultiplyAdds), p.M, kUnit, tiles);
  const int threads = grid.rows * grid.cols;
  const int64_t block_rows = min64(kBlockRows, round_up((p.M + grid.rows - 1) / grid.rows, kUnit));
  const int64_t size = Work<In>::size(block_rows);
  Buffer work(threads * size);
  if (!work.data) return false;
  with_type(p.out_dtype, [&](auto* type) {
    using T = __typeof__(*type);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
#if defined(LK_TILES)
      [[maybe_unused]] const std::conditional_t<kHow == Bf16::kTiles, Tiles, int> tiles{};
#endif
      own_part<kHow, In, T>(p, column_scale, bias, share(p.M, kUnit, part / grid.cols, grid.rows),
                            share(p.J, kTileCols, part % grid.cols, grid.cols), block_rows, work.data + part * size);
    }
  });
  return true;
}

template <Bf16 kHow>
bool product(const Product& p) {
  return p.in_dtype == DType::kFloat32 ? product_of<Bf16::kWidened, float>(p) : product_of<kHow, bf16>(p);
}

void convert(const Convert& p) {
  const int threads = thread_count(p.num_threads, p.rows, p.rows * p.cols, kMinMoves);
  with_type(p.in_dtype, [&](auto* in_type) {
    with_type(p.out_dtype, [&](auto* out_type) {
      using In = __typeof__(*in_type);
      using Out = __typeof__(*out_type);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
      for (int64_t row = 0; row < p.rows; ++row) {
        const In* in = (const In*)p.in + row * p.ld;
        Out* out = (Out*)p.out + row * p.cols;
        for_each_vector(p.cols, [&](int64_t i, auto read, auto write) { write(out + i, read(in + i)); });
      }
    });
  });
}

}  // namespace

extern const ProductKernels LK_CONCAT(product_, LK_ISA);
const ProductKernels LK_CONCAT(product_, LK_ISA) = {product<Bf16::kWidened>, convert};
#if defined(LK_DOTS)
extern const ProductKernels product_avx512_bf16;
const ProductKernels product_avx512_bf16 = {product<Bf16::kDots>, convert};
#endif
#if defined(LK_TILES)
extern const ProductKernels product_avx512_amx;
const ProductKernels product_avx512_amx = {product<Bf16::kTiles>, convert};
#endif

}  // namespace lora_kernels::cpu
