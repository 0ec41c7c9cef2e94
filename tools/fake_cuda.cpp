// A libcuda.so.1 that launches nothing and tells what it was asked to launch, for machines without a GPU: an H100 as
// far as Triton asks. Built by tools/fake_cuda.py with NVIDIA's header, so that the layouts are NVIDIA's.
#include <cuda.h>

#include <cstring>
#include <initializer_list>

namespace {

// numbers: grid, block, shared bytes, stream, whether there is `extra`, then identifier and value of each attribute
using Watcher = void (*)(CUfunction, const unsigned long long* numbers, int count, void** params);
Watcher watcher = nullptr;
CUcontext current = nullptr;
CUresult result_of_launches = CUDA_SUCCESS;

int value_of(int attribute) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return 232448;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 132;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    default:
      return 0;
  }
}

}  // namespace

extern "C" {

void fake_watch(Watcher wanted) { watcher = wanted; }
void fake_fail(int result) { result_of_launches = CUresult(result); }

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "made up", CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  return *value = value_of(attribute), CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  return *context = reinterpret_cast<CUcontext>(64), CUDA_SUCCESS;
}

// Another handle for each binary.
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  static unsigned long long count = 0;
  return *module = reinterpret_cast<CUmodule>(++count << 4), CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char*) {
  return *function = reinterpret_cast<CUfunction>(module), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  return *count = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  return std::memcpy(value, &address, sizeof address), CUDA_SUCCESS;
}

// Every argument is in the map, where the flag that Triton clears for small tensors of old drivers is set.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (rank != 2) return CUDA_ERROR_INVALID_VALUE;
  const cuuint64_t words[16] = {reinterpret_cast<cuuint64_t>(address),
                                ~0ull,
                                sizes[0],
                                sizes[1],
                                strides[0],
                                box[0],
                                box[1],
                                steps[0],
                                steps[1],
                                cuuint64_t(type),
                                cuuint64_t(interleave),
                                cuuint64_t(swizzle),
                                cuuint64_t(promotion),
                                cuuint64_t(fill),
                                rank,
                                0};
  static_assert(sizeof words == sizeof *map);
  return std::memcpy(map, words, sizeof words), CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const int*, const int*, cuuint32_t, cuuint32_t, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void** extra) {
  if (!watcher) return result_of_launches;
  unsigned long long numbers[64];
  int count = 0;
  for (const unsigned number : {config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                                config->blockDimY, config->blockDimZ, config->sharedMemBytes})
    numbers[count++] = number;
  numbers[count++] = reinterpret_cast<unsigned long long>(config->hStream);
  numbers[count++] = extra != nullptr;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    numbers[count++] = attribute.id;
    const auto& cluster = attribute.value.clusterDim;
    const bool three = attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    numbers[count++] = cluster.x;
    if (three) numbers[count++] = cluster.y, numbers[count++] = cluster.z;
  }
  watcher(function, numbers, count, params);
  return result_of_launches;
}

}  // extern "C"
