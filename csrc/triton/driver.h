// NVIDIA's driver, as far as launching a kernel that Triton compiled needs it. Its library is loaded when it is asked
// for, so that the build needs no CUDA toolkit and the package runs where there is no GPU.
#pragma once

#include <cstdint>

namespace lora_kernels::triton {

struct Kernel {
  void* function;
  int num_warps, shared_bytes;
  // The kernel may start before the one ahead of it in the stream has ended (programmatic dependent launch).
  bool overlaps;
};

// A matrix whose tiles the copy engine fetches; sizes, strides and box from the innermost dimension on.
struct TileMap {
  uint64_t address, sizes[2], row_bytes;
  uint32_t box[2];
  int element_type, element_bytes, swizzle;
};

// What the driver makes of it, by value an argument of a kernel. Aligned as by NVIDIA's newest header; older ones ask
// for 64.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

class Driver {
 public:
  // Raises std::runtime_error where the library, or a function in it, isn't there.
  explicit Driver(const char* library);

  // Makes the device's context current where the thread has none yet.
  void enter(int device) const;
  // Raise std::runtime_error with the driver's words.
  void launch(const Kernel& kernel, const unsigned (&grid)[3], void* stream, void** params) const;
  TensorMap encode(const TileMap& map) const;

 private:
  void check(int result, const char* function) const;

  int version_ = 0;
  int (*driver_get_version_)(int*);
  int (*get_error_string_)(int, const char**);
  int (*context_get_current_)(void**);
  int (*context_set_current_)(void*);
  int (*device_get_)(int*, int);
  int (*primary_context_retain_)(void**, int);
  int (*launch_kernel_)(const void*, void*, void**, void**);
  int (*encode_tiled_)(TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                       const uint32_t*, int, int, int, int);
};

}  // namespace lora_kernels::triton
