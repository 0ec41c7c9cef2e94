// How every kernel starts and finds its shared memory. One set of kernel sources serves nvcc and, with LK_SIMT, the
// emulator in csrc/simt, which runs them on the CPU.
#pragma once

#ifdef LK_SIMT
#include "simt/runtime.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

namespace lora_kernels::cuda {

// Runs kernel(params) on `stream` of the current device. Raises the limit of dynamic shared memory where needed.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t dynamic_smem, cudaStream_t stream,
                   const Params& params) {
  constexpr size_t kDefaultLimit = 48 << 10;
  if (dynamic_smem > kDefaultLimit) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_smem));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(kernel, grid, block, arguments, dynamic_smem, stream);
}

#if defined(LK_SIMT) || defined(__CUDACC__)
// The block's dynamic shared memory, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef LK_SIMT
  return static_cast<T*>(simt::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
#endif
}
#endif

template <class Int>
constexpr __host__ __device__ Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace lora_kernels::cuda
