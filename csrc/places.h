// Part of lora_kernels._C: whether tensors still lie where they did.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "tensor.h"

namespace lora_kernels {

// Tensors, or None, with the address, dtype, shape, strides and need of a gradient that they had when this was made;
// and the dtype, device and last size of the x that they are used with.
class Places {
 public:
  Places(pybind11::tuple tensors, Tensor x) : tensors_(std::move(tensors)) {
    describe(places_);
    x.describe_values(x_);
  }

  // Whether `tensors` are the very same ones, all is as it was, and x is like that one. None isn't looked at.
  bool hold(pybind11::object tensors, Tensor x) const {
    if (!tensors.is_none()) {
      const Py_ssize_t count = PyTuple_GET_SIZE(tensors_.ptr());
      if (!PyTuple_Check(tensors.ptr()) || PyTuple_GET_SIZE(tensors.ptr()) != count) return false;
      for (Py_ssize_t i = 0; i < count; ++i)
        if (PyTuple_GET_ITEM(tensors.ptr(), i) != PyTuple_GET_ITEM(tensors_.ptr(), i)) return false;
    }
    std::vector<int64_t> now;
    now.reserve(places_.size());
    if (!x.is_none()) {
      x.describe_values(now);
      if (now != x_) return false;
      now.clear();
    }
    describe(now);
    return now == places_;
  }

  const pybind11::tuple& tensors() const { return tensors_; }

 private:
  void describe(std::vector<int64_t>& out) const {
    static PyObject* const name = PyUnicode_InternFromString("requires_grad");
    for (const pybind11::handle each : tensors_) {
      if (each.is_none()) continue;
      Tensor(each).describe_place(out);
      out.push_back(getattr(each, name).ptr() == Py_True);
    }
  }

  pybind11::tuple tensors_;
  std::vector<int64_t> places_, x_;
};

inline void define_places(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Places>(m, "Places")
      .def(py::init<py::tuple, Tensor>(), py::arg("tensors"), py::arg("x"))
      .def("hold", &Places::hold, py::arg("tensors"), py::arg("x"))
      .def_property_readonly("tensors", &Places::tensors);
}

}  // namespace lora_kernels
