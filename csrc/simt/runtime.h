// CUDA's names, for kernels compiled as host C++ with -DLK_SIMT. Only what the kernels use: shared memory is dynamic,
// as dynamic_shared() in csrc/cuda/launch.cuh gives it; there is no __shared__.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <typeinfo>

#include "engine.h"
#include "half.h"
#include "memory.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))

// ---- host side

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum [[nodiscard]] cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

// After a failed launch: which kernel, block and thread, and what happened at which line.
const char* cudaGetErrorString(cudaError_t error);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace lora_kernels::simt {

// The type of its parameters names a kernel in messages: it's the only name known at run time.
cudaError_t set_dynamic_limit(const std::type_info& params_type, const void* kernel, int bytes);
cudaError_t run(const std::type_info& params_type, dim3 grid, dim3 block, size_t dynamic_smem, Body body,
                const void* kernel, const void* params);

// What memory.h counts begins with the kernel.
template <class Params>
__attribute__((no_sanitize("thread"))) void call(const void* kernel, const void* params) {
  reinterpret_cast<void (*)(Params)>(kernel)(*static_cast<const Params*>(params));
}

}  // namespace lora_kernels::simt

template <class Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params), cudaFuncAttribute, int bytes) {
  return lora_kernels::simt::set_dynamic_limit(typeid(Params), reinterpret_cast<const void*>(kernel), bytes);
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t dynamic_smem,
                             cudaStream_t) {
  static_assert(sizeof(Params) <= 4096, "more than a kernel's parameters may have");
  return lora_kernels::simt::run(typeid(Params), grid, block, dynamic_smem, &lora_kernels::simt::call<Params>,
                                 reinterpret_cast<const void*>(kernel), arguments[0]);
}

// ---- block and warp

inline void __syncthreads(lora_kernels::simt::Site site = {}) {
  lora_kernels::simt::block_barrier("__syncthreads", false, site);
}
inline int __syncthreads_count(int predicate, lora_kernels::simt::Site site = {}) {
  return lora_kernels::simt::block_barrier("__syncthreads_count", predicate, site);
}
inline int __syncthreads_or(int predicate, lora_kernels::simt::Site site = {}) {
  return lora_kernels::simt::block_barrier("__syncthreads_or", predicate, site) > 0;
}
inline int __syncthreads_and(int predicate, lora_kernels::simt::Site site = {}) {
  return lora_kernels::simt::block_barrier("__syncthreads_and", !predicate, site) == 0;
}

inline void __threadfence() { lora_kernels::simt::memory_blocks_ordered(); }
inline void __threadfence_block() {}

namespace lora_kernels::simt {

void sync_warp(unsigned mask, Site site);
// The value that lane `source` brought. `name` for messages.
uint64_t shuffle(const char* name, unsigned mask, uint64_t value, int source, Site site);
// The lanes of mask whose predicate is true.
unsigned ballot(const char* name, unsigned mask, bool predicate, Site site);

// As PTX's shfl: a source outside the segment of `width` lanes means the lane's own value.
enum class ShuffleKind { kIndex, kXor, kUp, kDown };
int shuffle_source(ShuffleKind kind, int lane, int operand, int width);

template <class T>
T shuffle(const char* name, ShuffleKind kind, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(name, mask, bits, shuffle_source(kind, lane_index(), operand, width), site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace lora_kernels::simt

inline void __syncwarp(unsigned mask = 0xffffffff, lora_kernels::simt::Site site = {}) {
  lora_kernels::simt::sync_warp(mask, site);
}

#define LK_SHUFFLE(name, kind, Operand)                                                                 \
  template <class T>                                                                                    \
  T name(unsigned mask, T value, Operand operand, int width = 32, lora_kernels::simt::Site site = {}) { \
    using namespace lora_kernels::simt;                                                                 \
    return shuffle(#name, ShuffleKind::kind, mask, value, int(operand), width, site);                   \
  }
LK_SHUFFLE(__shfl_sync, kIndex, int)
LK_SHUFFLE(__shfl_xor_sync, kXor, int)
LK_SHUFFLE(__shfl_up_sync, kUp, unsigned)
LK_SHUFFLE(__shfl_down_sync, kDown, unsigned)
#undef LK_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, lora_kernels::simt::Site site = {}) {
  return lora_kernels::simt::ballot("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, lora_kernels::simt::Site site = {}) {
  return lora_kernels::simt::ballot("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, lora_kernels::simt::Site site = {}) {
  return lora_kernels::simt::ballot("__all_sync", mask, predicate, site) == mask;
}

// Nothing else runs meanwhile, so these are atomic.
#define LK_ATOMIC(name, result)                                                  \
  template <class T>                                                             \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* address, T value) { \
    lora_kernels::simt::memory_atomic(address, sizeof(T));                       \
    const T old = *address;                                                      \
    *address = result;                                                           \
    return old;                                                                  \
  }
LK_ATOMIC(atomicAdd, old + value)
LK_ATOMIC(atomicMax, old < value ? value : old)
LK_ATOMIC(atomicMin, value < old ? value : old)
LK_ATOMIC(atomicOr, old | value)
LK_ATOMIC(atomicExch, value)
#undef LK_ATOMIC

template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* address, T compare, T value) {
  lora_kernels::simt::memory_atomic(address, sizeof(T));
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

// ---- arithmetic and memory

template <class T>
T __ldg(const T* address, lora_kernels::simt::Site site = {}) {
  lora_kernels::simt::check_alignment(address, alignof(T), "__ldg", site);
  return *address;
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }

inline unsigned __float_as_uint(float v) { return lora_kernels::simt::float_bits(v); }
inline float __uint_as_float(unsigned bits) { return lora_kernels::simt::bits_float(bits); }
inline int __float_as_int(float v) { return int(__float_as_uint(v)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

// Compiled with -ffp-contract=off, an expression is rounded after every operation.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
using std::isfinite;
using std::isinf;
using std::isnan;
