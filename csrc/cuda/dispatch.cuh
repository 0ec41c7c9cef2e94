// From what a launcher is told at run time to the instance of a kernel.
#pragma once

#include <type_traits>

#include "numeric.cuh"

namespace lora_kernels::cuda {

// Whether 16-byte accesses may begin here.
inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

template <class T>
struct Type {
  using type = T;
};

// fn(Type<T>(), std::bool_constant<flag>()) for the element type `dtype`.
template <class Fn>
cudaError_t dispatch(DType dtype, bool flag, Fn fn) {
  if (dtype == DType::kBFloat16)
    return flag ? fn(Type<__nv_bfloat16>(), std::true_type()) : fn(Type<__nv_bfloat16>(), std::false_type());
  if (dtype == DType::kFloat16)
    return flag ? fn(Type<__half>(), std::true_type()) : fn(Type<__half>(), std::false_type());
  return cudaErrorInvalidValue;
}

}  // namespace lora_kernels::cuda
