// A torch tensor as the bindings read it: through its Python methods, so that nothing is built against torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace lora_kernels {

// Or None. Read before the GIL is released; the caller of the binding keeps the tensor alive.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(pybind11::handle object) : object_(object) {}

  bool is_none() const { return object_.is_none(); }

  // nullptr of None, and of a tensor without elements. Of what else has no memory of its own, such as a tensor on meta,
  // of a subclass or inside a transform, torch has no address, or 0: a ValueError.
  template <class T = void>
  T* data() const {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    if (is_none()) return nullptr;
    PyObject* const made = PyObject_CallMethodNoArgs(object_.ptr(), name);
    void* const address = made ? PyLong_AsVoidPtr(checked(made).ptr()) : nullptr;
    if (!made) PyErr_Clear();
    if (!address && (!made || numel())) refuse();
    return static_cast<T*>(address);
  }
  int64_t size(Py_ssize_t dim) const {
    static PyObject* const name = PyUnicode_InternFromString("shape");
    return item(attribute(name), dim);
  }
  int64_t numel() const {
    static PyObject* const name = PyUnicode_InternFromString("numel");
    return integer(call(name).ptr());
  }
  int64_t stride(Py_ssize_t dim) const {
    static PyObject* const name = PyUnicode_InternFromString("stride");
    return item(call(name), dim);
  }
  // torch's own.
  pybind11::object torch_dtype() const {
    static PyObject* const name = PyUnicode_InternFromString("dtype");
    return attribute(name);
  }
  // One of an enumeration whose first values are float32, bfloat16 and float16.
  template <class DType>
  DType dtype() const {
    static PyObject* const* const dtypes = torch_dtypes();
    const auto dtype = torch_dtype();
    for (int i = 0; i < 3; ++i)
      if (dtype.ptr() == dtypes[i]) return DType(i);
    throw pybind11::type_error("a tensor is " + std::string(pybind11::str(dtype)) +
                               "; allowed: torch.float32, torch.bfloat16, torch.float16");
  }

 private:
  [[noreturn]] void refuse() const {
    const std::string kind = pybind11::str(pybind11::type::of(object_).attr("__name__"));
    throw pybind11::value_error("a kernel got a tensor, of type " + kind +
                                ", that has no memory; allowed: dense tensors in memory");
  }
  static PyObject* const* torch_dtypes() {
    static PyObject* dtypes[3];
    const auto torch = pybind11::module_::import("torch");
    const char* const names[] = {"float32", "bfloat16", "float16"};
    for (int i = 0; i < 3; ++i) dtypes[i] = pybind11::object(torch.attr(names[i])).release().ptr();
    return dtypes;
  }
  static int64_t integer(PyObject* value) {
    const int64_t result = PyLong_AsLongLong(value);
    if (result == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return result;
  }
  static int64_t item(const pybind11::object& tuple, Py_ssize_t index) {
    PyObject* const value = PyTuple_GetItem(tuple.ptr(), index);
    if (!value) throw pybind11::error_already_set();
    return integer(value);
  }
  static pybind11::object checked(PyObject* made) {
    if (!made) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(made);
  }
  pybind11::object attribute(PyObject* name) const { return checked(PyObject_GetAttr(object_.ptr(), name)); }
  pybind11::object call(PyObject* name) const { return checked(PyObject_CallMethodNoArgs(object_.ptr(), name)); }

  pybind11::handle object_;
};

}  // namespace lora_kernels

namespace pybind11::detail {

template <>
struct type_caster<lora_kernels::Tensor> {
  PYBIND11_TYPE_CASTER(lora_kernels::Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = lora_kernels::Tensor(source);
    return true;
  }
  static handle cast(const lora_kernels::Tensor&, return_value_policy, handle) = delete;
};

}  // namespace pybind11::detail
