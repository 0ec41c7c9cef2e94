// Part of lora_kernels._C: whether tensors still lie where they did.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "tensor.h"

namespace lora_kernels {

// Which tensors, or None, of a tuple lay where, with which dtype, shape, strides and need of a gradient, when this was
// made; and the dtype, device and last size of the x that they are used with. Numbers only: whoever keeps this keeps
// the tensors, or Python's garbage collector could not follow them.
class Places {
 public:
  Places(const pybind11::tuple& tensors, Tensor x) : known_(describe(tensors, places_) && x.describe_values(x_)) {}

  // Whether `tensors` are the very same ones, all is as it was, and x, unless it is None, is like that one. False where
  // DLPack can't read one.
  bool hold(const pybind11::tuple& tensors, Tensor x) const {
    std::vector<int64_t> now;
    now.reserve(places_.size());
    if (!known_) return false;
    if (!x.is_none()) {
      if (!x.describe_values(now) || now != x_) return false;
      now.clear();
    }
    return describe(tensors, now) && now == places_;
  }

 private:
  static bool describe(const pybind11::tuple& tensors, std::vector<int64_t>& out) {
    static PyObject* const name = PyUnicode_InternFromString("requires_grad");
    for (const pybind11::handle each : tensors) {
      out.push_back(reinterpret_cast<int64_t>(each.ptr()));
      if (each.is_none()) continue;
      if (!Tensor(each).describe_place(out)) return false;
      out.push_back(getattr(each, name).ptr() == Py_True);
    }
    return true;
  }

  std::vector<int64_t> places_, x_;
  bool known_;
};

inline void define_places(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Places>(m, "Places")
      .def(py::init<py::tuple, Tensor>(), py::arg("tensors"), py::arg("x"))
      .def("hold", &Places::hold, py::arg("tensors"), py::arg("x"));
}

}  // namespace lora_kernels
