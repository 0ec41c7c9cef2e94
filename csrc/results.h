// Part of lora_kernels._C: new tensors on the CPU for what a pass computes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>

#include "tensor.h"

namespace lora_kernels {

// Or None where nothing was asked for.
struct Result {
  pybind11::object tensor = pybind11::none();
  void* data = nullptr;
};

class Results {
 public:
  // new_(like, *sizes) -> tensor makes those of at least `bytes`.
  void take_large_from(pybind11::object new_, int64_t bytes) { new_large_ = std::move(new_), large_ = bytes; }

  template <class DType, class... Sizes>
  Result of(DType dtype, Sizes... sizes) {
    static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
    const pybind11::object& like = prototype(int(dtype));
    const int64_t bytes = (int64_t(dtype) == 0 ? 4 : 2) * (int64_t(1) * ... * int64_t(sizes));
    Result result;
    if (bytes >= large_) {
      result.tensor = new_large_(like, sizes...);
    } else {
      const pybind11::object made[] = {pybind11::int_(sizes)...};
      PyObject* arguments[1 + sizeof...(sizes)] = {like.ptr()};
      for (size_t i = 0; i < sizeof...(sizes); ++i) arguments[1 + i] = made[i].ptr();
      PyObject* const tensor = PyObject_VectorcallMethod(new_empty, arguments, 1 + sizeof...(sizes), nullptr);
      if (!tensor) throw pybind11::error_already_set();
      result.tensor = pybind11::reinterpret_steal<pybind11::object>(tensor);
    }
    result.data = Tensor(result.tensor).data();
    return result;
  }

 private:
  // A tensor of float32, bfloat16 or float16 on the CPU, whatever the default device is. Never freed: Python may be
  // gone by then.
  const pybind11::object& prototype(int dtype) {
    pybind11::object*& kept = prototypes_[dtype];
    if (!kept) {
      const auto torch = pybind11::module_::import("torch");
      const char* const names[] = {"float32", "bfloat16", "float16"};
      kept = new pybind11::object(
          torch.attr("empty")(0, pybind11::arg("dtype") = torch.attr(names[dtype]), pybind11::arg("device") = "cpu"));
    }
    return *kept;
  }

  pybind11::object* prototypes_[3] = {};
  pybind11::object new_large_;
  int64_t large_ = std::numeric_limits<int64_t>::max();
};

}  // namespace lora_kernels
