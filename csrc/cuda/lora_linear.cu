#include "dispatch.cuh"
#include "few_rows.cuh"
#include "launch.cuh"
#include "lora_linear.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "tile.cuh"

namespace lora_kernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

static_assert(kHColumns == 32 * kWarps);

template <int kRankFragments>
constexpr size_t h_shared_bytes() {
  return sizeof(float) * kWarps * kHRows * 8 * kRankFragments;
}

// A block makes kHRows rows and kRank columns of a part of h; its warps divide the part's columns of x. Fragments come
// straight from global memory: the order of a dot product's terms is free, so a lane takes 8 neighbours of a row, one
// 16-byte load and one Philox call, as the terms that two fragments want of it. lora_a is taken in the same order.
template <class T, int kRankFragments, bool kAligned>
__global__ void __launch_bounds__(kThreads) h_kernel(LoraH p) {
  let_next_kernel_start();
  constexpr int kRank = 8 * kRankFragments;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int m0 = blockIdx.x * kHRows, r0 = blockIdx.y * kRank, split = blockIdx.z;
  const int first = split * p.columns_per_split, end = min(first + p.columns_per_split, p.K);
  const KeepMask mask(p.dropout.rng, p.dropout.threshold);

  auto load_x = [&](int k, uint4(&x)[4]) {  // of rows g, g + 8, g + 16, g + 24
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = m0 + 8 * i + g;
      x[i] = load8<kAligned>(static_cast<const T*>(p.x) + m * p.ld_x, k, m < p.M ? end : 0);
    }
  };

  float acc[2][kRankFragments][4] = {};
  uint4 x[4], next[4];
  load_x(first + 32 * warp + 8 * q, next);
  for (int k0 = first + 32 * warp; k0 < end; k0 += kHColumns) {
    const int k = k0 + 8 * q;
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = next[i];
    load_x(k + kHColumns, next);
    if (mask.drops()) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = mask.apply(x[i], k / 8, m0 + 8 * i + g);
    }
#pragma unroll
    for (int f = 0; f < kRankFragments; ++f) {
      const int r = r0 + 8 * f + g, columns = r < p.R ? end : 0;
      const int64_t row = int64_t(r) * p.K;
      const uint4 a = p.lora_a_dtype == DType::kFloat32
                          ? load8_float<T, kAligned>(static_cast<const float*>(p.lora_a) + row, k, columns)
                          : load8<kAligned>(static_cast<const T*>(p.lora_a) + row, k, columns);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_m16n8k16(acc[i][f], {x[2 * i].x, x[2 * i + 1].x, x[2 * i].y, x[2 * i + 1].y}, {a.x, a.y}, (T*)nullptr);
        mma_m16n8k16(acc[i][f], {x[2 * i].z, x[2 * i + 1].z, x[2 * i].w, x[2 * i + 1].w}, {a.z, a.w}, (T*)nullptr);
      }
    }
  }

  float* parts = dynamic_shared<float>();  // [kWarps, kHRows, kRank]
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int f = 0; f < kRankFragments; ++f)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        parts[(warp * kHRows + 16 * i + j / 2 * 8 + g) * kRank + 8 * f + 2 * q + j % 2] = acc[i][f][j];
  __syncthreads();
  for (int i = threadIdx.x; i < kHRows * kRank; i += kThreads) {
    const int m = m0 + i / kRank, r = r0 + i % kRank;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w * kHRows * kRank + i];
    if (m < p.M && r < p.R) p.h_parts[(int64_t(split) * p.M + m) * p.R + r] = sum * p.scale;
  }
}

// out = column_scale ∘ (x weightᵀ + dropout(scale (u ∘ lora_e) v)) + bias

constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 32, kStages = 3;
constexpr int kWarpM = 64, kWarpN = 32, kWarpsN = kBlockN / kWarpN;
constexpr int kStageElements = (kBlockM + kBlockN) * kBlockK;
constexpr size_t kGemmSharedBytes = size_t(kStages) * kStageElements * 2;
// Blocks that run at the same time should share columns of weight in L2: they walk groups of kGroupM tiles downwards.
constexpr int kGroupM = 8;
static_assert(kBlockM / kWarpM * kWarpsN == kWarps && kBlockM * 2 == kThreads && kBlockN * 2 == kThreads);
static_assert(kBlockM * kBlockN * 2 <= kGemmSharedBytes, "the finished tile is staged in the same memory");

// The fragments of a warp at step k of a stage: x as A and weight, stored [n, k] or [k, n], as B.
template <bool kWeightKMajor, class T>
__device__ __forceinline__ void load_b_fragments(uint32_t (&b)[kWarpN / 8][2], const T* tile, int n, int k, int lane) {
#pragma unroll
  for (int j = 0; j < kWarpN / 8; j += 2) {
    if constexpr (kWeightKMajor)
      load_b<kBlockK>(b[j], b[j + 1], tile, n + 8 * j, k, lane);
    else
      load_b_transposed<kBlockN>(b[j], b[j + 1], tile, n + 8 * j, k, lane);
  }
}

// Adds dropout(scale (u ∘ lora_e) v) for one block to its accumulators. All of shared memory is free for it.
template <class T>
__device__ __forceinline__ void add_low_rank(float (&acc)[kWarpM / 16][kWarpN / 8][4], const LoraGemm& p, T* smem,
                                             int m0, int n0, int warp_m, int warp_n, int lane) {
  const int g = lane / 4, q = lane % 4;
  const bool drops = p.dropout.threshold != 0;
#pragma unroll 1
  for (int r0 = 0; r0 < p.R; r0 += kStages * kBlockK) {
    const int ranks = min(p.R - r0, kStages * kBlockK);
    __syncthreads();
    // Stage s holds ranks r0 + s kBlockK and following of u as an A tile [m, r] and of v as a B tile [n, r].
#pragma unroll 1
    for (int k = 0; k < ranks; k += 16) {
      T* u_tile = smem + k / kBlockK * kStageElements;
      T* v_tile = u_tile + kBlockM * kBlockK;
      const int m = threadIdx.x / 2, u_rank = k + threadIdx.x % 2 * 8;
      float e[8];
      load_h(e, p.u, p.M, p.R, m0 + m, r0 + u_rank, m0 + m < p.M ? ranks - u_rank : 0, n0 == 0);
#pragma unroll
      for (int i = 0; i < 8; ++i) e[i] *= p.scale;
      if (p.lora_e != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (u_rank + i < ranks) e[i] *= load_any<T>(p.lora_e, p.lora_e_dtype, r0 + u_rank + i);
      }
      *reinterpret_cast<uint4*>(u_tile + chunk_offset<kBlockK>(m, u_rank % kBlockK / 8)) = pack8<T>(e);

      // Neighbouring threads read neighbours in memory.
      const int n = p.stride_vr == 1 ? threadIdx.x / 2 : threadIdx.x % kBlockN;
      const int v_rank = k + (p.stride_vr == 1 ? threadIdx.x % 2 : threadIdx.x / kBlockN) * 8;
      const int64_t v = (r0 + v_rank) * p.stride_vr + (n0 + n) * p.stride_vn;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        e[i] = n0 + n < p.N && v_rank + i < ranks ? load_any<T>(p.v, p.v_dtype, v + i * p.stride_vr) : 0.f;
      *reinterpret_cast<uint4*>(v_tile + chunk_offset<kBlockK>(n, v_rank % kBlockK / 8)) = pack8<T>(e);
    }
    __syncthreads();

    // One slice of 16 rows at a time, so that the term of the slice, which the mask needs apart, fits in registers.
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
      float term[kWarpN / 8][4];
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) term[j][e] = drops ? 0.f : acc[i][j][e];
#pragma unroll 1
      for (int r = 0; r < ranks; r += 16) {
        const T* stage = smem + r / kBlockK * kStageElements;
        uint32_t a[4];
        load_a<kBlockK>(a, stage, warp_m + 16 * i, r % kBlockK, lane);
#pragma unroll
        for (int j = 0; j < kWarpN / 8; j += 2) {
          uint32_t b0[2], b1[2];
          load_b<kBlockK>(b0, b1, stage + kBlockM * kBlockK, warp_n + 8 * j, r % kBlockK, lane);
          mma_m16n8k16(term[j], a, b0, (T*)nullptr);
          mma_m16n8k16(term[j + 1], a, b1, (T*)nullptr);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // The four lanes of a row draw its mask for one group of 8 columns each, and then share it.
        uint32_t keep = 0;
        if (drops) {
          const KeepMask mask(p.dropout.rng, p.dropout.threshold);
          keep = mask.bits((n0 + warp_n) / 8 + q, m0 + warp_m + 16 * i + 8 * half + g);
        }
#pragma unroll
        for (int j = 0; j < kWarpN / 8; ++j) {
          const uint32_t bits = __shfl_sync(0xffffffffu, keep, lane / 4 * 4 + j) >> (2 * q);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& out = acc[i][j][2 * half + e];
            out = !drops ? term[j][2 * half + e] : bits >> e & 1 ? out + term[j][2 * half + e] : out;
          }
        }
      }
    }
  }
}

// kScaled: there is a column_scale. An instance of its own, since the registers of the others are all taken.
template <class T, bool kWeightKMajor, bool kScaled, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 2 : 1) gemm_kernel(LoraGemm p) {
  T* smem = dynamic_shared<T>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int warp_m = warp / kWarpsN * kWarpM, warp_n = warp % kWarpsN * kWarpN;

  const int tiles_m = ceil_div(p.M, kBlockM), tiles_n = ceil_div(p.N, kBlockN);
  const int first_m = blockIdx.x / (kGroupM * tiles_n) * kGroupM, in_group = blockIdx.x % (kGroupM * tiles_n);
  const int group_m = min(tiles_m - first_m, kGroupM);
  const int m0 = (first_m + in_group % group_m) * kBlockM, n0 = in_group / group_m * kBlockN;

  constexpr int kWeightRows = kWeightKMajor ? kBlockN : kBlockK, kWeightColumns = kWeightKMajor ? kBlockK : kBlockN;
  const int64_t ld_weight = kWeightKMajor ? p.stride_wn : p.stride_wk;
  TileLoader<kBlockM, kBlockK, kThreads, kAligned, T> x(static_cast<const T*>(p.x) + m0 * p.ld_x, p.ld_x, threadIdx.x);
  TileLoader<kWeightRows, kWeightColumns, kThreads, kAligned, T> weight(
      static_cast<const T*>(p.weight) + n0 * p.stride_wn, ld_weight, threadIdx.x);
  auto load_stage = [&](int index, int k) {
    T* stage = smem + index * kStageElements;
    x.load(stage, p.M - m0, p.K - k);
    x.advance(kBlockK);
    weight.load(stage + kBlockM * kBlockK, kWeightKMajor ? p.N - n0 : p.K - k, kWeightKMajor ? p.K - k : p.N - n0);
    weight.advance(kWeightKMajor ? kBlockK : kBlockK * ld_weight);
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i * kBlockK < p.K) load_stage(i, i * kBlockK);
    cp_async_commit();
  }
  float acc[kWarpM / 16][kWarpN / 8][4] = {};
  int index = 0;
  for (int k0 = 0; k0 < p.K; k0 += kBlockK) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    // Into the stage that was read last, which everyone has finished with.
    const int next = k0 + (kStages - 1) * kBlockK;
    if (next < p.K) load_stage(index == 0 ? kStages - 1 : index - 1, next);
    cp_async_commit();
    const T* stage = smem + index * kStageElements;
    index = index == kStages - 1 ? 0 : index + 1;
#pragma unroll
    for (int k = 0; k < kBlockK; k += 16) {
      uint32_t a[kWarpM / 16][4], b[kWarpN / 8][2];
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) load_a<kBlockK>(a[i], stage, warp_m + 16 * i, k, lane);
      load_b_fragments<kWeightKMajor>(b, stage + kBlockM * kBlockK, warp_n, k, lane);
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i)
#pragma unroll
        for (int j = 0; j < kWarpN / 8; ++j) mma_m16n8k16(acc[i][j], a[i], b[j], (T*)nullptr);
    }
  }
  wait_for_previous_kernel();
  add_low_rank<T>(acc, p, smem, m0, n0, warp_m, warp_n, lane);
  if constexpr (kScaled) {
#pragma unroll
    for (int j = 0; j < kWarpN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = n0 + warp_n + 8 * j + 2 * q + e;
        const float scale = n < p.N ? p.column_scale[n] : 0.f;
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i) acc[i][j][e] *= scale, acc[i][j][2 + e] *= scale;
      }
  }

  // Rounded once, into shared memory, so that whole rows of the tile are written to the output.
  __syncthreads();
  const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int j = 0; j < kWarpN / 8; ++j) {
    const int column = warp_n + 8 * j + 2 * q;
    const float bias0 = bias != nullptr && n0 + column < p.N ? to_float(bias[n0 + column]) : 0.f;
    const float bias1 = bias != nullptr && n0 + column + 1 < p.N ? to_float(bias[n0 + column + 1]) : 0.f;
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(smem + element_offset<kBlockN>(warp_m + 16 * i + 8 * half + g, column)) =
            pack<T>(acc[i][j][2 * half] + bias0, acc[i][j][2 * half + 1] + bias1);
  }
  __syncthreads();
  T* out = static_cast<T*>(p.out);
  for (int i = threadIdx.x; i < kBlockM * kBlockN / 8; i += kThreads) {
    const int row = i / (kBlockN / 8), chunk = i % (kBlockN / 8), n = n0 + 8 * chunk;
    if (m0 + row >= p.M || n >= p.N) continue;
    const T* source = smem + chunk_offset<kBlockN>(row, chunk);
    T* target = out + int64_t(m0 + row) * p.N + n;
    if (p.N % 8 == 0) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int e = 0; e < min(p.N - n, 8); ++e) target[e] = source[e];
    }
  }
}

// For few_rows_kernel: the lanes of a row take neighbouring chunks.
template <class T, bool kIsAligned>
class DenseSource {
 public:
  using Weight = DenseWeight;
  static constexpr bool kAligned = kIsAligned;
  // What two blocks have in flight covers the latency of memory.
  static constexpr int kSharedFloats = 0, kBlocks = kAligned ? 2 : 1;
  struct Loaded {
    uint4 chunks[4];
  };

  __device__ __forceinline__ DenseSource(const DenseWeight& weight, float*) : w_(weight) {}
  __device__ __forceinline__ static int column(int q, int c) { return 32 * c + 8 * q; }

  __device__ __forceinline__ Loaded load(int64_t n, int k, int q) const {
    const T* row = static_cast<const T*>(w_.data) + n * w_.ld;
    Loaded loaded;
#pragma unroll
    for (int c = 0; c < 4; ++c) loaded.chunks[c] = load8<kAligned>(row, k + column(q, c), n < w_.N ? int(w_.K) : 0);
    return loaded;
  }
  __device__ __forceinline__ uint4 chunk(const Loaded& from, int c) const { return from.chunks[c]; }

 private:
  const DenseWeight& w_;
};

}  // namespace

cudaError_t lora_h(const LoraH& p, cudaStream_t stream) {
  const bool is_aligned = aligned(p.x) && aligned(p.lora_a) && p.ld_x % 8 == 0 && p.K % 8 == 0;
  return dispatch(p.dtype, is_aligned, [&](auto type, auto flag) {
    using T = typename decltype(type)::type;
    constexpr bool kAligned = decltype(flag)::value;
    auto run = [&](auto kernel, int ranks, size_t shared) {
      const dim3 grid(ceil_div(p.M, kHRows), ceil_div(p.R, ranks), ceil_div(p.K, p.columns_per_split));
      return launch(kernel, grid, dim3(kThreads), shared, stream, p);
    };
    if (p.R <= 16) return run(h_kernel<T, 2, kAligned>, 16, h_shared_bytes<2>());
    if (p.R <= 32) return run(h_kernel<T, 4, kAligned>, 32, h_shared_bytes<4>());
    return run(h_kernel<T, 8, kAligned>, kHRanks, h_shared_bytes<8>());
  });
}

cudaError_t lora_gemm(const LoraGemm& p, cudaStream_t stream) {
  const bool k_major = p.stride_wk == 1;
  if (!k_major && p.stride_wn != 1) return cudaErrorInvalidValue;
  const bool is_aligned = aligned(p.x) && aligned(p.weight) && p.ld_x % 8 == 0 && p.K % 8 == 0 &&
                          (k_major ? p.stride_wn % 8 == 0 : p.stride_wk % 8 == 0 && p.N % 8 == 0);
  return dispatch(p.dtype, is_aligned, [&](auto type, auto flag) {
    using T = typename decltype(type)::type;
    constexpr bool kAligned = decltype(flag)::value;
    const auto plain = k_major ? gemm_kernel<T, true, false, kAligned> : gemm_kernel<T, false, false, kAligned>;
    const auto scaled = k_major ? gemm_kernel<T, true, true, kAligned> : gemm_kernel<T, false, true, kAligned>;
    const dim3 grid(int64_t(ceil_div(p.M, kBlockM)) * ceil_div(p.N, kBlockN));
    return launch(p.column_scale == nullptr ? plain : scaled, grid, dim3(kThreads), kGemmSharedBytes, stream, p,
                  p.u.just_queued);
  });
}

cudaError_t lora_few_rows(const LoraFewRows<DenseWeight>& p, cudaStream_t stream) {
  const bool is_aligned =
      aligned(p.x) && aligned(p.weight.data) && p.ld_x % 8 == 0 && p.weight.ld % 8 == 0 && p.weight.K % 8 == 0;
  return dispatch(p.dtype, is_aligned, [&](auto type, auto flag) {
    using T = typename decltype(type)::type;
    return launch_few_rows<DenseSource<T, decltype(flag)::value>, T>(p, stream);
  });
}

}  // namespace lora_kernels::cuda
