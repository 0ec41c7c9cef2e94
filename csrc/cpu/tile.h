// The register tile that the matrix products are made of.
#pragma once

#include <utility>

#include "common.h"
#include "dropout.h"

namespace lora_kernels::cpu {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 12;  // 24 accumulators of 32 registers
#else
constexpr int kTileRows = LK_LANES == 16 ? 3 : 6;  // 12 accumulators of 16 registers
#endif
constexpr int kVecs = 2;
constexpr int kTileCols = kVecs * kLanes;

// acc[i, :] = Σ_p of what add(acc, a(i, p), b[p, :]) adds; rows of b are ldb apart.
template <int kRows, int kCols, class A, class F>
LK_INLINE void accumulate_steps(A a, const float* b, int64_t ldb, int64_t P, vf (&acc)[kRows][kCols], F add) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kCols; ++j) acc[i][j] = vf{};
#pragma GCC unroll 1
  for (int64_t p = 0; p < P; ++p) {
    vf bv[kCols];
#pragma GCC unroll 2
    for (int j = 0; j < kCols; ++j) bv[j] = load(b + p * ldb + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto av = a(i, p);
#pragma GCC unroll 2
      for (int j = 0; j < kCols; ++j) add(acc[i][j], av, bv[j]);
    }
  }
}

// acc[i, :] = Σ_p a(i, p) b[p, :]; a is stored [I, P], or [P, I] when kTransposed; rows of b are ldb apart.
template <int kRows, int kCols, bool kTransposed>
LK_INLINE void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t P, vf (&acc)[kRows][kCols]) {
  accumulate_steps([=](int i, int64_t p)
                       __attribute__((always_inline)) { return splat(kTransposed ? a[p * lda + i] : a[i * lda + p]); },
                   b, ldb, P, acc, [](vf& sum, vf av, vf bv) __attribute__((always_inline)) { sum += av * bv; });
}

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

// panel [depth, kTileCols] = rows of floats [kTileCols, depth], ld bytes apart, turned round; up to kLanes - 1 rows
// more are written. `ahead` bytes after a row lies what is read next.
LK_INLINE void turn_round(const void* rows, int64_t ld, int64_t depth, float* panel, int64_t ahead = 0) {
  for (int64_t p = 0; p < depth; p += kLanes)
    for (int part = 0; part < kVecs; ++part) {
      vf v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const char* const from = (const char*)rows + (part * kLanes + i) * ld + p * sizeof(float);
        if (ahead) __builtin_prefetch(from + ahead, 0, 2);
        v[i] = load_raw<vf>(from);
      }
      transpose(v);
      for (int i = 0; i < kLanes; ++i) store(panel + (p + i) * kTileCols + part * kLanes, v[i]);
    }
}

// Rows of bits that say which elements to keep, or null: all of them.
struct Mask {
  const uint8_t* bits = nullptr;
  int64_t stride = 0;
  LK_INLINE const uint8_t* row(int64_t i) const { return bits ? bits + i * stride : nullptr; }
};
// That of a block that begins there. col is a multiple of 8.
LK_INLINE Mask mask_at(const Kept& kept, int64_t row, int64_t col) {
  return {kept.bits ? kept.bits + row * kept.stride + col / 8 : nullptr, kept.stride};
}

// Calls f(Int<rows>, first row) for tiles that cover `rows`.
template <class F>
LK_INLINE void for_row_tiles(int64_t rows, F f) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) f(Int<kTileRows>{}, i);
  if (kTileRows > 4)
    for (; i + 4 <= rows; i += 4) f(Int<4>{}, i);
  for (; i < rows; ++i) f(Int<1>{}, i);
}

// The part of `size` that one of `parts` threads has, a multiple of `unit` but for the end.
struct Range {
  int64_t first, last;
};
LK_INLINE Range share(int64_t size, int64_t unit, int part, int parts) {
  const int64_t units = (size + unit - 1) / unit;
  return {min64(size, units * part / parts * unit), min64(size, units * (part + 1) / parts * unit)};
}

// src [N], or null, with zeros up to whole tiles.
struct PaddedColumns {
  Buffer buffer;
  const float* data;
  PaddedColumns(const float* src, int64_t N)
      : buffer(src ? round_up(N, kTileCols) : 0), data(src ? buffer.data : nullptr) {
    if (!data) return;
    memcpy(buffer.data, src, N * sizeof(float));
    memset(buffer.data + N, 0, (round_up(N, kTileCols) - N) * sizeof(float));
  }
  LK_INLINE const float* at(int64_t col) const { return data ? data + col : nullptr; }
};

}  // namespace
}  // namespace lora_kernels::cpu
