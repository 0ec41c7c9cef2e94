// The emulator's operations one by one, called from tests/backends/test_simt.py through ctypes. Each function returns
// an error message, empty if there was none.
#include "gemm.cuh"

using namespace lora_kernels::cuda;

namespace {

const char* message(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

struct LoadMatrices {
  const uint16_t* matrices;  // [count,8,8]
  uint32_t* registers;       // [32,count]
  int count;
  bool transposed;
};

__global__ void load_matrices(LoadMatrices p) {
  auto* smem = dynamic_shared<uint16_t>();
  const int lane = threadIdx.x;
  for (int i = lane; i < p.count * 64; i += 32) smem[i] = p.matrices[i];
  __syncwarp();
  const uint16_t* row = smem + lane % (8 * p.count) * 8;
  uint32_t x2[2], x4[4];
  if (p.count == 2) p.transposed ? ldmatrix_x2_trans(x2, row) : ldmatrix_x2(x2, row);
  if (p.count == 4) p.transposed ? ldmatrix_x4_trans(x4, row) : ldmatrix_x4(x4, row);
  for (int i = 0; i < p.count; ++i) p.registers[lane * p.count + i] = p.count == 2 ? x2[i] : x4[i];
}

template <class T>
struct Mma {
  const uint32_t *a, *b;  // [32,4], [32,2]
  float* d;               // [32,4]
};

template <class T>
__global__ void mma(Mma<T> p) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[lane * 4 + i], d[i] = p.d[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = p.b[lane * 2 + i];
  mma_m16n8k16(d, a, b, static_cast<const T*>(nullptr));
  for (int i = 0; i < 4; ++i) p.d[lane * 4 + i] = d[i];
}

struct Shuffle {
  int kind;
  unsigned mask;
  const int64_t* operand;  // [32]
  int width;
  const float* in;  // [32]
  float* out;       // [32]
};

__global__ void shuffle(Shuffle p) {
  const int lane = threadIdx.x;
  if (!(p.mask >> lane & 1)) return;
  const float v = p.in[lane];
  const int operand = int(p.operand[lane]);
  p.out[lane] = p.kind == 0   ? __shfl_sync(p.mask, v, operand, p.width)
                : p.kind == 1 ? __shfl_xor_sync(p.mask, v, operand, p.width)
                : p.kind == 2 ? __shfl_up_sync(p.mask, v, operand, p.width)
                              : __shfl_down_sync(p.mask, v, operand, p.width);
}

struct Vote {
  unsigned mask;
  const int* predicate;  // [32]
  unsigned* out;         // [32,3]
};

__global__ void vote(Vote p) {
  const int lane = threadIdx.x;
  if (!(p.mask >> lane & 1)) return;
  const int predicate = p.predicate[lane];
  p.out[lane * 3] = __ballot_sync(p.mask, predicate);
  p.out[lane * 3 + 1] = __any_sync(p.mask, predicate);
  p.out[lane * 3 + 2] = __all_sync(p.mask, predicate);
}

struct BlockVote {
  const int* predicate;  // [threads]
  int* out;              // [threads,3]
};

__global__ void block_vote(BlockVote p) {
  const int i = threadIdx.x;
  p.out[i * 3] = __syncthreads_count(p.predicate[i]);
  p.out[i * 3 + 1] = __syncthreads_or(p.predicate[i]);
  p.out[i * 3 + 2] = __syncthreads_and(p.predicate[i]);
}

struct Coordinates {
  int* out;    // [gridDim.z,gridDim.y,gridDim.x,blockDim.z,blockDim.y,blockDim.x]
  int* count;  // [1]
};

__global__ void coordinates(Coordinates p) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int i = block * int(blockDim.x * blockDim.y * blockDim.z) + thread;
  p.out[i] = i;
  atomicAdd(p.count, 1);
}

}  // namespace

extern "C" {

void set_schedule(int order, uint64_t seed) {
  lora_kernels::simt::set_schedule(lora_kernels::simt::Order(order), seed);
}

const char* run_load_matrices(const uint16_t* matrices, uint32_t* registers, int count, bool transposed) {
  return message(
      launch(&load_matrices, dim3(1), dim3(32), 512, nullptr, LoadMatrices{matrices, registers, count, transposed}));
}

const char* run_mma(const uint32_t* a, const uint32_t* b, float* d, bool is_half) {
  return message(is_half ? launch(&mma<__half>, dim3(1), dim3(32), 0, nullptr, Mma<__half>{a, b, d})
                         : launch(&mma<__nv_bfloat16>, dim3(1), dim3(32), 0, nullptr, Mma<__nv_bfloat16>{a, b, d}));
}

const char* run_gemm(const void* a, const void* b, float* c, int M, int N, int K, bool is_half) {
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    return message(gemm::run(static_cast<const T*>(a), static_cast<const T*>(b), c, M, N, K));
  };
  return is_half ? run(__half()) : run(__nv_bfloat16());
}

const char* run_shuffle(int kind, unsigned mask, const int64_t* operand, int width, const float* in, float* out) {
  return message(launch(&shuffle, dim3(1), dim3(32), 0, nullptr, Shuffle{kind, mask, operand, width, in, out}));
}

const char* run_vote(unsigned mask, const int* predicate, unsigned* out) {
  return message(launch(&vote, dim3(1), dim3(32), 0, nullptr, Vote{mask, predicate, out}));
}

const char* run_block_vote(int threads, const int* predicate, int* out) {
  return message(launch(&block_vote, dim3(1), dim3(threads), 0, nullptr, BlockVote{predicate, out}));
}

const char* run_coordinates(const unsigned* sizes, int* out, int* count) {
  return message(launch(&coordinates, dim3(sizes[0], sizes[1], sizes[2]), dim3(sizes[3], sizes[4], sizes[5]), 0,
                        nullptr, Coordinates{out, count}));
}

void to_float(const uint16_t* bits, float* out, int count, bool is_half) {
  for (int i = 0; i < count; ++i)
    out[i] = is_half ? __half2float(__ushort_as_half(bits[i])) : __bfloat162float(__ushort_as_bfloat16(bits[i]));
}

void from_float(const float* values, uint16_t* out, int count, bool is_half) {
  for (int i = 0; i < count; ++i)
    out[i] =
        is_half ? __half_as_ushort(__float2half_rn(values[i])) : __bfloat16_as_ushort(__float2bfloat16_rn(values[i]));
}
}
