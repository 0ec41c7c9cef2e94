// The kernel of few_rows.h, whatever form the weight has.
#pragma once

#include "few_rows.h"
#include "launch.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace lora_kernels::cuda {

constexpr int kFewRowsWarps = 8, kFewRowsThreads = 32 * kFewRowsWarps;
// Columns of y that a block makes, and ranks that it takes at once.
constexpr int kFewRowsColumns = 16, kFewRowsRanks = 64;
// Columns of W that a warp takes at once, 32 a lane.
constexpr int kFewRowsStep = 128;
static_assert(kFewRowsThreads >= kFewRowsColumns * kFewRows, "one thread for each element of y");

template <class Source, int kTokens>
constexpr size_t few_rows_shared_bytes() {
  return sizeof(float) * (Source::kSharedFloats + kFewRowsWarps * kTokens * kFewRowsColumns + kTokens * kFewRowsRanks +
                          kFewRowsColumns * (kFewRowsRanks + 1));
}

// A block makes kFewRowsColumns columns of y for all tokens; its warps divide K. The weight is the A operand, so that
// one product serves 8 tokens. As in h_kernel, the order of the sum is free: a lane takes 32 columns of W in four
// chunks of 8 neighbours, in the order in which the Source best loads them.
//
// Source: kSharedFloats, of shared memory that it gets; kBlocks on a multiprocessor, for which registers are left;
// kAligned, whether x is read 16 bytes at a time; Loaded, what load(n, k, q) reads of row n and the lane's columns
// from k on; chunk(Loaded, c), the 8 elements from column k + column(q, c) on; zeros beyond W.
template <class Source, class T, int kTokens>
__global__ void __launch_bounds__(kFewRowsThreads, Source::kBlocks)
    few_rows_kernel(LoraFewRows<typename Source::Weight> p) {
  float* shared = dynamic_shared<float>();
  float* sums = shared + Source::kSharedFloats;                      // [kFewRowsWarps, kTokens, kFewRowsColumns]
  float* h_tile = sums + kFewRowsWarps * kTokens * kFewRowsColumns;  // [kTokens, kFewRowsRanks]
  float* b_tile = h_tile + kTokens * kFewRowsRanks;                  // [kFewRowsColumns, kFewRowsRanks + 1]
  const Source source(p.weight, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64_t n0 = int64_t(blockIdx.x) * kFewRowsColumns, N = p.weight.N;
  const int K = int(p.weight.K);

  typename Source::Loaded loaded[2], next[2];  // of rows g and g + 8
  auto load_next = [&](int k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) next[half] = source.load(n0 + 8 * half + g, k, q);
  };
  auto load_lora_b = [&](int r0) {
    const int ranks = min(p.R - r0, kFewRowsRanks);
    for (int i = threadIdx.x; i < kFewRowsColumns * ranks; i += kFewRowsThreads) {
      const int row = i / ranks, r = i % ranks;
      b_tile[row * (kFewRowsRanks + 1) + r] =
          n0 + row < N ? load_any<T>(p.lora_b, p.lora_b_dtype, (n0 + row) * p.R + r0 + r) : 0.f;
    }
  };
  float acc[kTokens / 8][4] = {};
  load_next(kFewRowsStep * warp);
  // Waits no longer than the weight does.
  load_lora_b(0);
  for (int k = kFewRowsStep * warp; k < K; k += kFewRowsStep * kFewRowsWarps) {
#pragma unroll
    for (int half = 0; half < 2; ++half) loaded[half] = next[half];
    load_next(k + kFewRowsStep * kFewRowsWarps);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint4 a[2] = {source.chunk(loaded[0], c), source.chunk(loaded[1], c)};
#pragma unroll
      for (int t = 0; t < kTokens / 8; ++t) {
        const int m = 8 * t + g;
        const uint4 x =
            load8<Source::kAligned>(static_cast<const T*>(p.x) + m * p.ld_x, k + Source::column(q, c), m < p.M ? K : 0);
        mma_m16n8k16(acc[t], {a[0].x, a[1].x, a[0].y, a[1].y}, {x.x, x.y}, (T*)nullptr);
        mma_m16n8k16(acc[t], {a[0].z, a[1].z, a[0].w, a[1].w}, {x.z, x.w}, (T*)nullptr);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens / 8; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sums[(warp * kTokens + 8 * t + 2 * q + e % 2) * kFewRowsColumns + e / 2 * 8 + g] = acc[t][e];

  const int m = threadIdx.x / kFewRowsColumns, column = threadIdx.x % kFewRowsColumns;
  float low_rank = 0;
  wait_for_previous_kernel();
  // Once also without a rank: the warps' sums wait for the barrier too.
  for (int r0 = 0; r0 == 0 || r0 < p.R; r0 += kFewRowsRanks) {
    const int ranks = min(p.R - r0, kFewRowsRanks);
    if (r0 > 0) __syncthreads();
    for (int i = threadIdx.x; i < p.M * ranks; i += kFewRowsThreads) {
      const int row = i / ranks, r = i % ranks;
      float h[1];
      load_h(h, p.h, p.M, p.R, row, r0 + r, 1, blockIdx.x == 0);
      if (p.lora_e != nullptr) h[0] *= load_any<T>(p.lora_e, p.lora_e_dtype, r0 + r);
      h_tile[row * kFewRowsRanks + r] = h[0];
    }
    if (r0 > 0) load_lora_b(r0);
    __syncthreads();
    if (m < p.M) {
      for (int r = 0; r < ranks; ++r)
        low_rank += h_tile[m * kFewRowsRanks + r] * b_tile[column * (kFewRowsRanks + 1) + r];
    }
  }
  const int64_t n = n0 + column;
  if (m >= p.M || n >= N) return;
  float y = 0;
#pragma unroll
  for (int w = 0; w < kFewRowsWarps; ++w) y += sums[w * kTokens * kFewRowsColumns + threadIdx.x];
  y += p.scaling * low_rank;
  if (p.column_scale != nullptr) y *= p.column_scale[n];
  if (p.bias != nullptr) y += to_float(static_cast<const T*>(p.bias)[n]);
  static_cast<T*>(p.y)[m * N + n] = from_float<T>(y);
}

template <class Source, class T>
cudaError_t launch_few_rows(const LoraFewRows<typename Source::Weight>& p, cudaStream_t stream) {
  if (p.M > kFewRows) return cudaErrorInvalidValue;
  const dim3 grid(ceil_div<int64_t>(p.weight.N, kFewRowsColumns)), block(kFewRowsThreads);
  return p.M <= 8 ? launch(few_rows_kernel<Source, T, 8>, grid, block, few_rows_shared_bytes<Source, 8>(), stream, p,
                           p.h.just_queued)
                  : launch(few_rows_kernel<Source, T, 16>, grid, block, few_rows_shared_bytes<Source, 16>(), stream, p,
                           p.h.just_queued);
}

}  // namespace lora_kernels::cuda
