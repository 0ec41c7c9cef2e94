#include "dispatch.cuh"
#include "launch.cuh"
#include "lora_linear.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "tile.cuh"

namespace lora_kernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

static_assert(kScaleRows == kWarps && kScaleColumns == kThreads);

// A warp takes every kWarps-th row, a lane 8 columns of it; the warps' sums are added in order.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) column_scale_bwd_kernel(ColumnScaleBwd p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n0 = blockIdx.x * kScaleColumns, n = n0 + 8 * lane;
  const int first = blockIdx.y * p.rows_per_split, last = min(first + p.rows_per_split, p.M);
  const T* bias = static_cast<const T*>(p.bias);
  float scale[8], offset[8], sum[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    scale[i] = n + i < p.N ? p.column_scale[n + i] : 0.f;
    offset[i] = bias != nullptr && n + i < p.N ? to_float(bias[n + i]) : 0.f;
  }
  for (int m = first + warp; m < last; m += kWarps) {
    float dy[8], dz[8];
    unpack8<T>(dy, load8<kAligned>(static_cast<const T*>(p.dy) + m * p.ld_dy, n, p.N));
#pragma unroll
    for (int i = 0; i < 8; ++i) dz[i] = dy[i] * scale[i];
    T* target = static_cast<T*>(p.dz) + int64_t(m) * p.N + n;
    if constexpr (kAligned) {
      if (n < p.N) *reinterpret_cast<uint4*>(target) = pack8<T>(dz);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (n + i < p.N) target[i] = from_float<T>(dz[i]);
    }
    if (p.y == nullptr) continue;
    float y[8];
    unpack8<T>(y, load8<kAligned>(static_cast<const T*>(p.y) + int64_t(m) * p.N, n, p.N));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += dy[i] * (y[i] - offset[i]);
  }
  if (p.y == nullptr) return;
  float* sums = dynamic_shared<float>();  // [kWarps, kScaleColumns]
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[warp * kScaleColumns + 8 * lane + i] = scale[i] == 0.f ? 0.f : sum[i] / scale[i];
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w * kScaleColumns + threadIdx.x];
  if (n0 + int(threadIdx.x) < p.N) p.dscale_parts[int64_t(blockIdx.y) * p.N + n0 + threadIdx.x] = total;
}

constexpr int kDhStages = 3;

template <int kRankFragments>
constexpr int kDhColumns = dh_columns(8 * kRankFragments);

template <int kRankFragments>
constexpr size_t dh_shared_bytes() {
  constexpr int kRank = 8 * kRankFragments;
  return size_t(2) * kDhStages * kDhRows * kDhColumns<kRankFragments> + sizeof(float) * kWarps * kDhRows * kRank +
         size_t(2) * kDhRows * kRank;
}

// A block walks down its rows of its columns of dy, which its warps divide. The columns' part of dyᵀ h stays in
// registers until the end; that of dy lora_b is summed over the warps after every 16 rows.
template <class T, int kRankFragments, bool kAligned>
__global__ void __launch_bounds__(kThreads) dh_dlora_b_kernel(LoraDhDloraB p) {
  constexpr int kRank = 8 * kRankFragments, kColumns = kDhColumns<kRankFragments>, kWarpColumns = kColumns / kWarps;
  constexpr int kOwned = kDhRows * kRank / kThreads;  // elements of a step's dh and h that a thread looks after
  static_assert(kDhRows * kRank % kThreads == 0 && kThreads % kRank == 0);
  T* stages = dynamic_shared<T>();                                                     // [kDhStages] tiles of dy
  float* warp_dh = reinterpret_cast<float*>(stages + kDhStages * kDhRows * kColumns);  // [kWarps, kDhRows, kRank]
  T* h_tile = reinterpret_cast<T*>(warp_dh + kWarps * kDhRows * kRank);                // a tile [kDhRows, kRank]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int n0 = blockIdx.x * kColumns, warp_n = warp * kWarpColumns, r0 = blockIdx.z * kRank;
  const int first = blockIdx.y * p.rows_per_split, last = min(first + p.rows_per_split, p.M);

  uint32_t b[kWarpColumns / 16][kRankFragments][2];
#pragma unroll
  for (int j = 0; j < kWarpColumns / 16; ++j)
#pragma unroll
    for (int f = 0; f < kRankFragments; ++f)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = n0 + warp_n + 16 * j + 8 * half + 2 * q + e, r = r0 + 8 * f + g;
          pair[e] = n < p.N && r < p.R ? load_any<T>(p.lora_b, p.lora_b_dtype, int64_t(n) * p.R + r) : 0.f;
        }
        b[j][f][half] = pack<T>(pair[0], pair[1]);
      }

  TileLoader<kDhRows, kColumns, kThreads, kAligned, T> dy(static_cast<const T*>(p.dy) + first * p.ld_dy + n0, p.ld_dy,
                                                          threadIdx.x);
  auto load_stage = [&](int step) {
    dy.load(stages + step % kDhStages * kDhRows * kColumns, last - first - step * kDhRows, p.N - n0);
    dy.advance(kDhRows * p.ld_dy);
  };
  const int owned_m = threadIdx.x / kRank, owned_r = threadIdx.x % kRank, r = r0 + owned_r;
  auto load_h = [&](int step, float (&h)[kOwned]) {
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int m = first + step * kDhRows + owned_m + i * (kThreads / kRank);
      h[i] = m < last && r < p.R ? p.h[int64_t(m) * p.R + r] : 0.f;
    }
  };

  const int steps = ceil_div(last - first, kDhRows);
#pragma unroll
  for (int step = 0; step < kDhStages - 1; ++step) {
    if (step < steps) load_stage(step);
    cp_async_commit();
  }
  float h[kOwned], next_h[kOwned], de = 0;
  load_h(0, next_h);
  float db[kWarpColumns / 16][kRankFragments][4] = {};
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      h[i] = next_h[i];
      h_tile[element_offset<kRank>(owned_m + i * (kThreads / kRank), owned_r)] = from_float<T>(h[i]);
    }
    cp_async_wait<kDhStages - 2>();
    __syncthreads();
    if (step + kDhStages - 1 < steps) load_stage(step + kDhStages - 1);
    cp_async_commit();
    load_h(step + 1, next_h);

    const T* tile = stages + step % kDhStages * kDhRows * kColumns;
    uint32_t h_fragments[kRankFragments][2];
#pragma unroll
    for (int f = 0; f < kRankFragments; f += 2)
      load_b_transposed<kRank>(h_fragments[f], h_fragments[f + 1], h_tile, 8 * f, 0, lane);
    float dh[kRankFragments][4] = {};
#pragma unroll
    for (int j = 0; j < kWarpColumns / 16; ++j) {
      uint32_t a[4], a_transposed[4];
      load_a<kColumns>(a, tile, 0, warp_n + 16 * j, lane);
      load_a_transposed<kColumns>(a_transposed, tile, warp_n + 16 * j, 0, lane);
#pragma unroll
      for (int f = 0; f < kRankFragments; ++f) {
        mma_m16n8k16(dh[f], a, b[j][f], (T*)nullptr);
        mma_m16n8k16(db[j][f], a_transposed, h_fragments[f], (T*)nullptr);
      }
    }
#pragma unroll
    for (int f = 0; f < kRankFragments; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e) warp_dh[(warp * kDhRows + e / 2 * 8 + g) * kRank + 8 * f + 2 * q + e % 2] = dh[f][e];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += warp_dh[w * kDhRows * kRank + threadIdx.x + i * kThreads];
      de += h[i] * sum;
      const int m = first + step * kDhRows + owned_m + i * (kThreads / kRank);
      if (p.dh_parts != nullptr && m < last && r < p.R) p.dh_parts[(int64_t(blockIdx.x) * p.M + m) * p.R + r] = sum;
    }
  }

  if (p.db_parts != nullptr) {
#pragma unroll
    for (int j = 0; j < kWarpColumns / 16; ++j)
#pragma unroll
      for (int f = 0; f < kRankFragments; ++f)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = n0 + warp_n + 16 * j + e / 2 * 8 + g, column = r0 + 8 * f + 2 * q + e % 2;
          if (n < p.N && column < p.R) p.db_parts[(int64_t(blockIdx.y) * p.N + n) * p.R + column] = db[j][f][e];
        }
  }
  if (p.de_parts != nullptr) {
    // Of what the last step left in warp_dh, this element was read by this thread only.
    warp_dh[threadIdx.x] = de;
    __syncthreads();
    if (threadIdx.x < kRank && r < p.R) {
      float sum = 0;
      for (int i = threadIdx.x; i < kThreads; i += kRank) sum += warp_dh[i];
      p.de_parts[(int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * p.R + r] = sum;
    }
  }
}

constexpr int kReduceColumns = 32;

// out[i] = scaling lora_e[i % R] Σ_p parts[p, i] for kReduceColumns elements: warp w sums parts w, w + kWarps, ..., and
// then the warps' sums are added in order.
template <class T, class Store>
__device__ __forceinline__ void sum_parts(const float* parts, int count, int64_t length, int64_t block, float scaling,
                                          const void* lora_e, DType lora_e_dtype, int R, Store store) {
  float* sums = dynamic_shared<float>();  // [kWarps, kReduceColumns]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = block * kReduceColumns + lane;
  float sum = 0;
  if (i < length) {
#pragma unroll 4
    for (int part = warp; part < count; part += kWarps) sum += parts[part * length + i];
  }
  sums[warp * kReduceColumns + lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= length) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * kReduceColumns + lane];
  sum *= scaling;
  if (lora_e != nullptr) sum *= load_any<T>(lora_e, lora_e_dtype, i % R);
  store(i, sum);
}

__host__ __device__ int reduce_blocks(const float* parts, int64_t length) {
  return parts == nullptr ? 0 : int(ceil_div<int64_t>(length, kReduceColumns));
}

template <class T>
__global__ void __launch_bounds__(kThreads) reduce_kernel(LoraReduce p) {
  const int dh_blocks = reduce_blocks(p.dh_parts, int64_t(p.M) * p.R);
  const int db_blocks = reduce_blocks(p.db_parts, int64_t(p.N) * p.R);
  int block = blockIdx.x;
  if (block < dh_blocks) {
    sum_parts<T>(p.dh_parts, p.column_blocks, int64_t(p.M) * p.R, block, p.scaling, p.lora_e, p.lora_e_dtype, p.R,
                 [&](int64_t i, float value) { p.dh[i] = value; });
    return;
  }
  block -= dh_blocks;
  if (block < db_blocks) {
    sum_parts<T>(p.db_parts, p.splits, int64_t(p.N) * p.R, block, p.scaling, p.lora_e, p.lora_e_dtype, p.R,
                 [&](int64_t i, float value) { store_any<T>(p.dlora_b, p.dlora_b_dtype, i, value); });
    return;
  }
  block -= db_blocks;
  sum_parts<T>(p.de_parts, p.splits * p.column_blocks, p.R, block, p.scaling, nullptr, p.lora_e_dtype, p.R,
               [&](int64_t i, float value) { store_any<T>(p.dlora_e, p.dlora_e_dtype, i, value); });
}

constexpr int kDaColumns = 32, kDaRows = 32, kDaStages = 4;

template <int kRankTiles>
constexpr size_t da_shared_bytes() {
  constexpr size_t kPipeline = size_t(2) * kWarps * kDaStages * kDaRows * kDaColumns;
  constexpr size_t kSums = sizeof(float) * kWarps * 16 * kRankTiles * kDaColumns;
  return kPipeline > kSums ? kPipeline : kSums;
}

// A block makes kDaColumns columns of 16 kRankTiles rows of dlora_a. Its warps divide M, each with a pipeline of its
// own, and their sums are added in order.
template <class T, int kRankTiles, bool kAligned>
__global__ void __launch_bounds__(kThreads) dlora_a_kernel(LoraDloraA p) {
  constexpr int kRank = 16 * kRankTiles, kTile = kDaRows * kDaColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int k0 = blockIdx.x * kDaColumns, r0 = blockIdx.y * kRank;
  T* stages = dynamic_shared<T>() + warp * kDaStages * kTile;
  const KeepMask mask(p.dropout.rng, p.dropout.threshold);

  TileLoader<kDaRows, kDaColumns, 32, kAligned, T> x(static_cast<const T*>(p.x) + warp * kDaRows * p.ld_x + k0, p.ld_x,
                                                     lane);
  // The warp takes every kWarps-th step.
  const int steps = ceil_div(p.M, kDaRows);
  auto load_stage = [&](int step, int stage) {
    x.load(stages + stage * kTile, p.M - step * kDaRows, p.K - k0);
    x.advance(kWarps * kDaRows * p.ld_x);
  };
#pragma unroll
  for (int stage = 0; stage < kDaStages - 1; ++stage) {
    if (warp + stage * kWarps < steps) load_stage(warp + stage * kWarps, stage);
    cp_async_commit();
  }

  float acc[kRankTiles][kDaColumns / 8][4] = {};
  int stage = 0;
  for (int step = warp; step < steps; step += kWarps, stage = (stage + 1) % kDaStages) {
    T* tile = stages + stage * kTile;
    const int m0 = step * kDaRows;
    cp_async_wait<kDaStages - 2>();
    if (mask.drops()) {
      // Each lane drops elements of the chunks that it copied itself, which it sees before the others do.
#pragma unroll
      for (int i = 0; i < x.kCopies; ++i) {
        uint4* v = reinterpret_cast<uint4*>(tile + x.offset(i));
        *v = mask.apply(*v, k0 / 8 + x.chunk(), m0 + x.row(i));
      }
    }
    __syncwarp();
    if (step + (kDaStages - 1) * kWarps < steps)
      load_stage(step + (kDaStages - 1) * kWarps, (stage + kDaStages - 1) % kDaStages);
    cp_async_commit();
#pragma unroll
    for (int m = 0; m < kDaRows; m += 16) {
      uint32_t b[kDaColumns / 8][2];
#pragma unroll
      for (int j = 0; j < kDaColumns / 8; j += 2) load_b_transposed<kDaColumns>(b[j], b[j + 1], tile, 8 * j, m, lane);
#pragma unroll
      for (int i = 0; i < kRankTiles; ++i) {
        uint32_t a[4];  // dhᵀ
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = m0 + m + e / 2 * 8 + 2 * q, r = r0 + 16 * i + e % 2 * 8 + g;
          const float* dh = p.dh + int64_t(row) * p.R + r;
          a[e] = pack<T>(row < p.M && r < p.R ? dh[0] : 0.f, row + 1 < p.M && r < p.R ? dh[p.R] : 0.f);
        }
#pragma unroll
        for (int j = 0; j < kDaColumns / 8; ++j) mma_m16n8k16(acc[i][j], a, b[j], (T*)nullptr);
      }
    }
  }

  // All copies with data were waited for in the loop; the groups after them are empty.
  __syncthreads();
  float* sums = dynamic_shared<float>();  // [kWarps, kRank, kDaColumns]
#pragma unroll
  for (int i = 0; i < kRankTiles; ++i)
#pragma unroll
    for (int j = 0; j < kDaColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[(warp * kRank + 16 * i + e / 2 * 8 + g) * kDaColumns + 8 * j + 2 * q + e % 2] = acc[i][j][e];
  __syncthreads();
  for (int i = threadIdx.x; i < kRank * kDaColumns; i += kThreads) {
    const int r = r0 + i / kDaColumns, k = k0 + i % kDaColumns;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w * kRank * kDaColumns + i];
    if (r < p.R && k < p.K) store_any<T>(p.dlora_a, p.dlora_a_dtype, int64_t(r) * p.K + k, sum * p.scale);
  }
}

}  // namespace

cudaError_t column_scale_bwd(const ColumnScaleBwd& p, cudaStream_t stream) {
  const bool is_aligned = aligned(p.dy) && aligned(p.y) && aligned(p.dz) && p.ld_dy % 8 == 0 && p.N % 8 == 0;
  return dispatch(p.dtype, is_aligned, [&](auto type, auto flag) {
    using T = typename decltype(type)::type;
    const dim3 grid(ceil_div(p.N, kScaleColumns), ceil_div(p.M, p.rows_per_split));
    const size_t shared = sizeof(float) * kWarps * kScaleColumns;
    return launch(column_scale_bwd_kernel<T, decltype(flag)::value>, grid, dim3(kThreads), shared, stream, p);
  });
}

cudaError_t lora_dh_dlora_b(const LoraDhDloraB& p, cudaStream_t stream) {
  const bool is_aligned = aligned(p.dy) && p.ld_dy % 8 == 0 && p.N % 8 == 0;
  return dispatch(p.dtype, is_aligned, [&](auto type, auto flag) {
    using T = typename decltype(type)::type;
    constexpr bool kAligned = decltype(flag)::value;
    auto run = [&](auto kernel, int ranks, size_t shared) {
      const dim3 grid(ceil_div(p.N, dh_columns(p.R)), ceil_div(p.M, p.rows_per_split), ceil_div(p.R, ranks));
      return launch(kernel, grid, dim3(kThreads), shared, stream, p);
    };
    if (p.R <= 16) return run(dh_dlora_b_kernel<T, 2, kAligned>, 16, dh_shared_bytes<2>());
    if (p.R <= 32) return run(dh_dlora_b_kernel<T, 4, kAligned>, 32, dh_shared_bytes<4>());
    return run(dh_dlora_b_kernel<T, 8, kAligned>, 64, dh_shared_bytes<8>());
  });
}

cudaError_t lora_reduce(const LoraReduce& p, cudaStream_t stream) {
  const dim3 grid(reduce_blocks(p.dh_parts, int64_t(p.M) * p.R) + reduce_blocks(p.db_parts, int64_t(p.N) * p.R) +
                  reduce_blocks(p.de_parts, p.R));
  const size_t shared = sizeof(float) * kWarps * kReduceColumns;
  return dispatch(p.dtype, true, [&](auto type, auto) {
    return launch(reduce_kernel<typename decltype(type)::type>, grid, dim3(kThreads), shared, stream, p);
  });
}

cudaError_t lora_dlora_a(const LoraDloraA& p, cudaStream_t stream) {
  const bool is_aligned = aligned(p.x) && p.ld_x % 8 == 0 && p.K % 8 == 0;
  return dispatch(p.dtype, is_aligned, [&](auto type, auto flag) {
    using T = typename decltype(type)::type;
    constexpr bool kAligned = decltype(flag)::value;
    auto run = [&](auto kernel, int ranks, size_t shared) {
      return launch(kernel, dim3(ceil_div(p.K, kDaColumns), ceil_div(p.R, ranks)), dim3(kThreads), shared, stream, p);
    };
    if (p.R <= 16) return run(dlora_a_kernel<T, 1, kAligned>, 16, da_shared_bytes<1>());
    if (p.R <= 32) return run(dlora_a_kernel<T, 2, kAligned>, 32, da_shared_bytes<2>());
    return run(dlora_a_kernel<T, 4, kAligned>, 64, da_shared_bytes<4>());
  });
}

}  // namespace lora_kernels::cuda
