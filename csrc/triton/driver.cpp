#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace lora_kernels::triton {
namespace {

// The driver's own structures and numbers, which keep their layout and meaning for good.
constexpr int kProgrammaticStreamSerialization = 6;
struct LaunchAttribute {
  int identifier;
  char padding[4];
  union {
    char bytes[64];
    int value;
  };
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
};
constexpr int kNoInterleaving = 0, kPromoteTo128Bytes = 2, kFillWithZeros = 0;

template <class Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("the driver's library has no ") + name);
}

}  // namespace

Driver::Driver(const char* library) {
  void* const opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!opened) throw std::runtime_error(dlerror());
  find(opened, "cuDriverGetVersion", driver_get_version_);
  find(opened, "cuGetErrorString", get_error_string_);
  find(opened, "cuCtxGetCurrent", context_get_current_);
  find(opened, "cuCtxSetCurrent", context_set_current_);
  find(opened, "cuDeviceGet", device_get_);
  find(opened, "cuDevicePrimaryCtxRetain", primary_context_retain_);
  find(opened, "cuLaunchKernelEx", launch_kernel_);
  find(opened, "cuTensorMapEncodeTiled", encode_tiled_);
  check(driver_get_version_(&version_), "cuDriverGetVersion");
}

void Driver::check(int result, const char* function) const {
  if (!result) return;
  const char* text = nullptr;
  get_error_string_(result, &text);
  throw std::runtime_error(std::string(function) + ": " + (text ? text : "unknown error") + " (" +
                           std::to_string(result) + ")");
}

void Driver::enter(int device) const {
  void* context = nullptr;
  check(context_get_current_(&context), "cuCtxGetCurrent");
  if (context) return;
  int handle;
  check(device_get_(&handle, device), "cuDeviceGet");
  check(primary_context_retain_(&context, handle), "cuDevicePrimaryCtxRetain");
  check(context_set_current_(context), "cuCtxSetCurrent");
}

void Driver::launch(const Kernel& kernel, const unsigned (&grid)[3], void* stream, void** params) const {
  if (!grid[0] || !grid[1] || !grid[2]) return;
  LaunchAttribute overlaps{kProgrammaticStreamSerialization, {}, {}};
  overlaps.value = 1;
  LaunchConfig config{{grid[0], grid[1], grid[2]},
                      {32u * kernel.num_warps, 1, 1},
                      unsigned(kernel.shared_bytes),
                      stream,
                      &overlaps,
                      kernel.overlaps};
  check(launch_kernel_(&config, kernel.function, params, nullptr), "cuLaunchKernelEx");
}

TensorMap Driver::encode(const TileMap& map) const {
  TensorMap made;
  const uint64_t whole[2] = {map.row_bytes, map.row_bytes * map.sizes[1]};
  const uint32_t steps[2] = {1, 1};
  check(encode_tiled_(&made, map.element_type, 2, reinterpret_cast<void*>(map.address), map.sizes, whole, map.box,
                      steps, kNoInterleaving, map.swizzle, kPromoteTo128Bytes, kFillWithZeros),
        "cuTensorMapEncodeTiled");
  // Drivers up to 13.1 set a flag that is wrong for matrices below 128 KiB; CUTLASS and Triton clear it too.
  const uint64_t last = (map.sizes[0] - 1) * map.element_bytes + (map.sizes[1] - 1) * map.row_bytes;
  if (version_ <= 13010 && last + 1 < (128 << 10)) made.words[1] &= ~(uint64_t(1) << 21);
  return made;
}

}  // namespace lora_kernels::triton
