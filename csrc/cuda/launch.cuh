// How every kernel starts and finds its shared memory. One set of kernel sources serves nvcc and, with LK_SIMT, the
// emulator in csrc/simt, which runs them on the CPU.
#pragma once

#ifdef LK_SIMT
#include "simt/runtime.h"
#else
#include <cuda_runtime.h>
#endif

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace lora_kernels::cuda {

#ifndef LK_SIMT
// Whether a kernel can wait for the one before it while it runs: griddepcontrol is in code that was compiled for sm_90
// or newer, which a newer GPU doesn't run where it compiles the PTX of an older one for itself. All kernels are
// compiled for the same architectures.
inline bool waits_by_itself(const void* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<int> ptx_versions[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int version = ptx_versions[device].load(std::memory_order_relaxed);
  if (version == 0) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
    ptx_versions[device].store(version = attributes.ptxVersion, std::memory_order_relaxed);
  }
  return version >= 90;
}
#endif

// Runs kernel(params) on `stream` of the current device. Raises the limit of dynamic shared memory where needed.
// early: it may start while the kernel queued just before it still runs, if that one calls let_next_kernel_start, and
// calls wait_for_previous_kernel itself. RankParts::just_queued says why that is right where it is used.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t dynamic_smem, cudaStream_t stream,
                   const Params& params, bool early = false) {
  constexpr size_t kDefaultLimit = 48 << 10;
  if (dynamic_smem > kDefaultLimit) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_smem));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
#ifndef LK_SIMT
  if (early && waits_by_itself(reinterpret_cast<const void*>(kernel))) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = dynamic_smem;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  }
#endif
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
