// Small kernels, each with a mistake that the emulator must report and without it: `mutants NAME 0|1`. Prints what went
// wrong and exits with 1, or with 0 if nothing did.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "gemm.cuh"

using namespace lora_kernels::cuda;

namespace {

constexpr int kThreads = 128;

struct Params {
  const float* in;  // [size]
  float* out;       // [size]
  int size;
};

using Kernel = void (*)(Params);

// Runs kernel on in[i] = i; empty, or what is wrong with out.
template <class Expected>
std::string check(Kernel kernel, size_t dynamic_smem, Expected expected, int size = kThreads, int blocks = 1) {
  std::vector<float> in(size), out(size, -1);
  for (int i = 0; i < size; ++i) in[i] = float(i);
  using lora_kernels::simt::Buffer;
  lora_kernels::simt::memory_set_buffers({Buffer{"in", uintptr_t(in.data()), size * sizeof(float)},
                                          Buffer{"out", uintptr_t(out.data()), size * sizeof(float)}});
  const cudaError_t error =
      launch(kernel, dim3(blocks), dim3(kThreads), dynamic_smem, nullptr, Params{in.data(), out.data(), size});
  if (error != cudaSuccess) return cudaGetErrorString(error);
  for (int i = 0; i < size; ++i)
    if (!(out[i] == expected(i)))
      return "wrong result: out[" + std::to_string(i) + "] = " + std::to_string(out[i]) + ", not " +
             std::to_string(float(expected(i)));
  return "";
}

float reversed(int i) { return float(kThreads - 1 - i); }
float same(int i) { return float(i); }
float neighbour(int i) { return float(i ^ 1); }

template <bool mutant>
__global__ void reverse(Params p) {
  float* smem = dynamic_shared<float>();
  const int i = threadIdx.x;
  smem[i] = p.in[i];
  if (!mutant) __syncthreads();
  p.out[i] = smem[kThreads - 1 - i];
}

// Reads before another thread's next write; warps run far ahead of each other.
template <bool mutant>
__global__ void reuse(Params p) {
  float* smem = dynamic_shared<float>();
  const int i = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    smem[i] = p.in[i] * float(round);
    __syncthreads();
    sum += smem[kThreads - 1 - i];
    if (!mutant) __syncthreads();
  }
  p.out[i] = sum;
}

template <bool mutant>
__global__ void lanes(Params p) {
  float* smem = dynamic_shared<float>();
  const int i = threadIdx.x;
  smem[i] = p.in[i];
  if (!mutant) __syncwarp();
  p.out[i] = smem[i ^ 1];
}

template <bool mutant>
__global__ void off_by_one(Params p) {
  for (int i = threadIdx.x; mutant ? i <= p.size : i < p.size; i += kThreads) p.out[i] = p.in[i];
}

template <bool mutant>
__global__ void off_by_one_store(Params p) {
  const int i = threadIdx.x;
  p.out[i] = p.in[i];
  if (mutant) p.out[i + 1] = p.in[i];
}

// Four blocks; the mutant's add to the same sums.
template <bool mutant>
__global__ void blocks(Params p) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (mutant)
    p.out[threadIdx.x] += p.in[i];
  else
    p.out[i] = p.in[i];
}

template <bool mutant>
__global__ void shared_overflow(Params p) {
  float* smem = dynamic_shared<float>();
  const int i = threadIdx.x + (mutant ? 1 : 0);
  smem[i] = p.in[threadIdx.x];
  p.out[threadIdx.x] = smem[i];
}

template <bool mutant>
__global__ void uninitialised(Params p) {
  float* smem = dynamic_shared<float>();
  const int i = threadIdx.x;
  if (!mutant || i != 7) smem[i] = p.in[i];
  __syncthreads();
  p.out[i] = smem[i];
}

template <bool mutant>
__global__ void misaligned_vector(Params p) {
  const int i = threadIdx.x;
  const float* from = p.in + i / 4 * 4 + (mutant ? 1 : 0);
  const float4 v = *reinterpret_cast<const float4*>(mutant && i == kThreads - 1 ? p.in : from);
  p.out[i] = i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
}

template <bool mutant>
__global__ void misaligned_copy(Params p) {
  float* smem = dynamic_shared<float>();
  const int i = threadIdx.x;
  if (i < kThreads / 4) cp_async16(smem + 4 * i, p.in + 4 * i + (mutant && i == 3 ? 2 : 0), true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  p.out[i] = smem[i];
}

template <bool mutant>
__global__ void misaligned_matrix(Params p) {
  float* smem = dynamic_shared<float>();
  const int i = threadIdx.x;
  smem[i] = p.in[i];
  __syncthreads();
  uint32_t r[2];
  ldmatrix_x2(r, smem + i % 16 * 4 + (mutant ? 1 : 0));
  p.out[i] = smem[i];
}

// The destination is in flight when it is written.
template <bool mutant>
__global__ void write_in_flight(Params p) {
  float* smem = dynamic_shared<float>();
  const int i = threadIdx.x;
  if (i < kThreads / 4) cp_async16(smem + 4 * i, p.in + 4 * i, true);
  cp_async_commit();
  if (!mutant) cp_async_wait<0>();
  __syncthreads();
  const float v = mutant ? p.in[i] : smem[i];
  smem[i] = 1;
  if (mutant) cp_async_wait<0>();
  p.out[i] = v;
}

template <bool mutant>
__global__ void barrier_in_branch(Params p) {
  const int i = threadIdx.x;
  if (mutant) {
    if (i < 64) __syncthreads();
  } else {
    __syncthreads();
  }
  p.out[i] = p.in[i];
}

template <bool mutant>
__global__ void two_barriers(Params p) {
  const int i = threadIdx.x;
  if (mutant && i < 64)
    __syncthreads();
  else
    __syncthreads();
  p.out[i] = p.in[i];
}

template <bool mutant>
__global__ void barrier_after_exit(Params p) {
  const int i = threadIdx.x;
  p.out[i] = p.in[i];
  if (mutant && i == 5) return;
  __syncthreads();
}

template <bool mutant>
__global__ void shuffle_in_branch(Params p) {
  const int i = threadIdx.x;
  float v = p.in[i];
  if (mutant ? i % 32 < 16 : true) v = __shfl_xor_sync(0xffffffff, v, 1);
  p.out[i] = v;
}

template <bool mutant>
__global__ void shuffle_outside_mask(Params p) {
  const int i = threadIdx.x;
  float v = p.in[i];
  if (i % 32 < 16)
    v = __shfl_xor_sync(0x0000ffff, v, mutant ? 16 : 1);
  else
    v = __shfl_xor_sync(0xffff0000, v, 1);
  p.out[i] = v;
}

template <bool mutant>
__global__ void copy(Params p) {
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

template <gemm::Mutation mutation>
std::string check_gemm() {
  const int M = 70, N = 66, K = 72;
  std::vector<__nv_bfloat16> a(M * K), b(N * K);
  for (int i = 0; i < M * K; ++i) a[i] = __nv_bfloat16(float(i * 7 % 13 - 6));
  for (int i = 0; i < N * K; ++i) b[i] = __nv_bfloat16(float(i * 5 % 11 - 5));
  std::vector<float> c(M * N, -1);
  const cudaError_t error = gemm::run<__nv_bfloat16, mutation>(a.data(), b.data(), c.data(), M, N, K);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float sum = 0;  // of small integers: exact
      for (int k = 0; k < K; ++k) sum += float(a[m * K + k]) * float(b[n * K + k]);
      if (!(c[m * N + n] == sum))
        return "wrong result: " + std::to_string(c[m * N + n]) + ", not " + std::to_string(sum);
    }
  return "";
}

template <bool mutant>
std::string run(const std::string& name) {
  using gemm::Mutation;
  constexpr size_t kBytes = kThreads * sizeof(float);
  if (name == "reverse") return check(&reverse<mutant>, kBytes, reversed);
  if (name == "reuse") return check(&reuse<mutant>, kBytes, reversed);
  if (name == "lanes") return check(&lanes<mutant>, kBytes, neighbour);
  if (name == "off_by_one") return check(&off_by_one<mutant>, 0, same, 200);
  if (name == "off_by_one_store") return check(&off_by_one_store<mutant>, 0, same);
  if (name == "blocks") return check(&blocks<mutant>, 0, same, 4 * kThreads, 4);
  if (name == "shared_overflow") return check(&shared_overflow<mutant>, kBytes, same);
  if (name == "uninitialised") return check(&uninitialised<mutant>, kBytes, same);
  if (name == "misaligned_vector") return check(&misaligned_vector<mutant>, 0, same);
  if (name == "misaligned_copy") return check(&misaligned_copy<mutant>, kBytes, same);
  if (name == "misaligned_matrix") return check(&misaligned_matrix<mutant>, kBytes, same);
  if (name == "write_in_flight") return check(&write_in_flight<mutant>, kBytes, same);
  if (name == "barrier_in_branch") return check(&barrier_in_branch<mutant>, 0, same);
  if (name == "two_barriers") return check(&two_barriers<mutant>, 0, same);
  if (name == "barrier_after_exit") return check(&barrier_after_exit<mutant>, 0, same);
  if (name == "shuffle_in_branch") return check(&shuffle_in_branch<mutant>, 0, neighbour);
  if (name == "shuffle_outside_mask") return check(&shuffle_outside_mask<mutant>, 0, neighbour);
  if (name == "too_much_shared") return check(&copy<mutant>, (mutant ? 100 : 99) << 10, same);
  if (name == "swapped_fragment") return check_gemm<mutant ? Mutation::kSwappedFragment : Mutation::kNone>();
  if (name == "missing_wait") return check_gemm<mutant ? Mutation::kMissingWait : Mutation::kNone>();
  if (name == "missing_commit") return check_gemm<mutant ? Mutation::kMissingCommit : Mutation::kNone>();
  if (name == "missing_barrier") return check_gemm<mutant ? Mutation::kMissingBarrier : Mutation::kNone>();
  return "no such kernel";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string problem = std::atoi(argv[2]) ? run<true>(argv[1]) : run<false>(argv[1]);
  std::puts(problem.c_str());
  return problem.empty() ? 0 : 1;
}
