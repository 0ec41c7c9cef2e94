// c [M,N] = a [M,K] b [N,K]ᵀ as a CUDA kernel writes it: two stages of cp.async, ldmatrix, mma. K % 8 == 0.
// Mutation is one of the mistakes that the emulator must find.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace gemm {

using namespace lora_kernels::cuda;

enum class Mutation { kNone, kSwappedFragment, kMissingWait, kMissingCommit, kMissingBarrier };

constexpr int kBlockM = 64, kBlockN = 64, kBlockK = 32, kPitch = kBlockK + 8, kThreads = 128;
constexpr int kStage = (kBlockM + kBlockN) * kPitch;

template <class T>
struct Params {
  const T *a, *b;
  float* c;
  int M, N, K;
};

template <class T, Mutation mutation>
__global__ void __launch_bounds__(kThreads) kernel(const Params<T> p) {
  T* const smem = dynamic_shared<T>();
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int first_row = blockIdx.x * kBlockM, first_column = blockIdx.y * kBlockN;

  const auto load_stage = [&](int stage, int k0) {
    for (int i = tid; i < (kBlockM + kBlockN) * kBlockK / 8; i += kThreads) {
      const int row = i / (kBlockK / 8), k = i % (kBlockK / 8) * 8;
      const bool of_a = row < kBlockM;
      const T* matrix = of_a ? p.a : p.b;
      const int from = of_a ? first_row + row : first_column + row - kBlockM;
      const bool valid = from < (of_a ? p.M : p.N) && k0 + k < p.K;
      cp_async16(smem + stage * kStage + row * kPitch + k, valid ? matrix + int64_t(from) * p.K + k0 + k : matrix,
                 valid);
    }
    if (mutation != Mutation::kMissingCommit) cp_async_commit();
  };

  float acc[2][4][4] = {};
  load_stage(0, 0);
  for (int k0 = 0, stage = 0; k0 < p.K; k0 += kBlockK, stage ^= 1) {
    load_stage(stage ^ 1, k0 + kBlockK);
    if (mutation != Mutation::kMissingWait) cp_async_wait<1>();
    if (mutation != Mutation::kMissingBarrier) __syncthreads();
    const T* const a = smem + stage * kStage + warp / 2 * 32 * kPitch;
    const T* const b = smem + stage * kStage + (kBlockM + warp % 2 * 32) * kPitch;
    for (int k = 0; k < kBlockK; k += 16) {
      uint32_t fragment_a[2][4], fragment_b[4][2];
      for (int i = 0; i < 2; ++i) ldmatrix_x4(fragment_a[i], a + (i * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
      for (int j = 0; j < 4; ++j) ldmatrix_x2(fragment_b[j], b + (j * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
      for (int i = 0; i < 2; ++i) {
        uint32_t (&f)[4] = fragment_a[i];
        const uint32_t swapped[4] = {f[0], f[2], f[1], f[3]};
        for (int j = 0; j < 4; ++j)
          mma_m16n8k16(acc[i][j], mutation == Mutation::kSwappedFragment ? swapped : f, fragment_b[j], p.a);
      }
    }
    __syncthreads();
  }

  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int r = 0; r < 4; ++r) {
        const int row = first_row + warp / 2 * 32 + i * 16 + lane / 4 + r / 2 * 8;
        const int column = first_column + warp % 2 * 32 + j * 8 + lane % 4 * 2 + r % 2;
        if (row < p.M && column < p.N) p.c[int64_t(row) * p.N + column] = acc[i][j][r];
      }
}

template <class T, Mutation mutation = Mutation::kNone>
cudaError_t run(const T* a, const T* b, float* c, int M, int N, int K) {
  const dim3 grid(ceil_div(M, kBlockM), ceil_div(N, kBlockN));
  return launch(&kernel<T, mutation>, grid, dim3(kThreads), 2 * kStage * sizeof(T), nullptr,
                Params<T>{a, b, c, M, N, K});
}

}  // namespace gemm
