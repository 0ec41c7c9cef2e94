// Tiles of 16-bit elements in shared memory: asynchronous loads into them, tensor core fragments out of them.
#pragma once

#include "launch.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace lora_kernels::cuda {

// Where chunk `chunk` (8 elements, 16 bytes) of row `row` of a tile of kColumns lies, in elements. Chunks are permuted
// within their row so that the eight rows that one ldmatrix reads lie in different banks.
template <int kColumns>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  constexpr int kChunks = kColumns / 8;
  constexpr int kRowsPer128Bytes = kChunks >= 8 ? 1 : 8 / kChunks;
  constexpr int kMask = kChunks >= 8 ? 7 : kChunks - 1;
  return (row * kChunks + (chunk ^ (row / kRowsPer128Bytes & kMask))) * 8;
}

template <int kColumns>
__device__ __forceinline__ int element_offset(int row, int column) {
  return chunk_offset<kColumns>(row, column / 8) + column % 8;
}

// Copies tiles of kRows x kColumns from a matrix to shared memory, by kThreads threads: each takes the same chunks of
// every tile. Where kAligned, in the thread's current cp.async group; where not, complete on return.
template <int kRows, int kColumns, int kThreads, bool kAligned, class T>
class TileLoader {
  static constexpr int kChunks = kColumns / 8, kRowStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kRowStep == 0);

 public:
  static constexpr int kCopies = kRows / kRowStep;

  // source: where the first tile begins.
  __device__ __forceinline__ TileLoader(const T* source, int64_t ld, int thread)
      : row_(thread / kChunks), chunk_(thread % kChunks), step_(kRowStep * ld) {
    source_ = source + row_ * ld + chunk_ * 8;
  }

  // Where copy i of this thread, of chunk() elements 8 to 15 and so on of row(i), lies in a tile.
  __device__ __forceinline__ int row(int i) const { return row_ + i * kRowStep; }
  __device__ __forceinline__ int chunk() const { return chunk_; }
  __device__ __forceinline__ int offset(int i) const { return chunk_offset<kColumns>(row(i), chunk_); }

  // The next tile begins this many elements after the last one.
  __device__ __forceinline__ void advance(int64_t elements) { source_ += elements; }

  // Zeros beyond rows_left and columns_left.
  __device__ __forceinline__ void load(T* tile, int rows_left, int columns_left) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const T* source = source_ + i * step_;
      const bool valid = row(i) < rows_left && chunk_ * 8 < columns_left;
      if constexpr (kAligned)
        cp_async16(tile + offset(i), source, valid);
      else
        *reinterpret_cast<uint4*>(tile + offset(i)) = load8<false>(source, 0, valid ? columns_left - chunk_ * 8 : 0);
    }
  }

 private:
  int row_, chunk_;
  int64_t step_;
  const T* source_;
};

// The 16x16 elements at (row, 8 chunk) as four 8x8 matrices, in two orders: down the rows first, or along them.
template <int kColumns, class T>
__device__ __forceinline__ const T* rows_first(const T* tile, int row, int chunk, int lane) {
  return tile + chunk_offset<kColumns>(row + lane % 16, chunk + lane / 16);
}
template <int kColumns, class T>
__device__ __forceinline__ const T* columns_first(const T* tile, int row, int chunk, int lane) {
  return tile + chunk_offset<kColumns>(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2);
}

// A tile stored [m, k] or, transposed, [k, m] as an A fragment of m16n8k16: the 16 of m and of k at (m, k), multiples
// of 8.
template <int kColumns, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* tile, int m, int k, int lane) {
  ldmatrix_x4(a, rows_first<kColumns>(tile, m, k / 8, lane));
}
template <int kColumns, class T>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const T* tile, int m, int k, int lane) {
  ldmatrix_x4_trans(a, columns_first<kColumns>(tile, k, m / 8, lane));
}

// A tile stored [n, k] or, transposed, [k, n] as the B fragments of columns n to n + 7 and n + 8 to n + 15.
template <int kColumns, class T>
__device__ __forceinline__ void load_b(uint32_t (&b0)[2], uint32_t (&b1)[2], const T* tile, int n, int k, int lane) {
  uint32_t r[4];
  ldmatrix_x4(r, columns_first<kColumns>(tile, n, k / 8, lane));
  b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}
template <int kColumns, class T>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b0)[2], uint32_t (&b1)[2], const T* tile, int n, int k,
                                                  int lane) {
  uint32_t r[4];
  ldmatrix_x4_trans(r, rows_first<kColumns>(tile, k, n / 8, lane));
  b0[0] = r[0], b0[1] = r[1], b1[0] = r[2], b1[1] = r[3];
}

}  // namespace lora_kernels::cuda
