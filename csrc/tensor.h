// A torch tensor as the bindings read it, without building against torch: by the C functions of DLPack's exchange API
// (dmlc.github.io/dlpack, version 1), all in one call, where torch has them (from 2.10 on), else by Python's methods.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace lora_kernels {

// As the standard lays them out.
namespace dlpack {

struct View {
  void* data;
  int32_t device_type, device_index;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  void *previous, *allocate, *from_object, *to_object;
  int (*view)(void* object, View* out);
  void* current_stream;
};

}  // namespace dlpack

// Or None. Read before the GIL is released; the caller of the binding keeps the tensor alive and as it is meanwhile.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(pybind11::handle object) : object_(object), is_viewed_(view(object, view_)) {}

  bool is_none() const { return object_.is_none(); }

  // nullptr of None, and of a tensor without elements. Of what else has no memory of its own, such as a tensor on meta,
  // of a subclass or inside a transform, torch has no address, or 0: a ValueError.
  template <class T = void>
  T* data() const {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    if (is_none()) return nullptr;
    if (is_viewed_ && view_.data) return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
    PyObject* const made = PyObject_CallMethodNoArgs(object_.ptr(), name);
    void* const address = made ? PyLong_AsVoidPtr(checked(made).ptr()) : nullptr;
    if (!made) PyErr_Clear();
    if (!address && (!made || numel())) refuse();
    return static_cast<T*>(address);
  }
  int64_t size(int dim) const {
    static PyObject* const name = PyUnicode_InternFromString("shape");
    return is_viewed_ && dim < view_.dims ? view_.shape[dim] : item(attribute(name), dim);
  }
  int64_t numel() const {
    static PyObject* const name = PyUnicode_InternFromString("numel");
    return integer(call(name).ptr());
  }
  int64_t stride(int dim) const {
    static PyObject* const name = PyUnicode_InternFromString("stride");
    return is_viewed_ && dim < view_.dims ? view_.strides[dim] : item(call(name), dim);
  }
  // torch's own.
  pybind11::object torch_dtype() const {
    static PyObject* const name = PyUnicode_InternFromString("dtype");
    return attribute(name);
  }
  // One of an enumeration whose first values are float32, bfloat16 and float16.
  template <class DType>
  DType dtype() const {
    constexpr uint8_t kFloat = 2, kBFloat = 4;
    if (is_viewed_ && view_.code == kFloat && view_.bits == 32) return DType(0);
    if (is_viewed_ && view_.code == kBFloat) return DType(1);
    if (is_viewed_ && view_.code == kFloat && view_.bits == 16) return DType(2);
    static PyObject* const* const dtypes = torch_dtypes();
    const auto dtype = torch_dtype();
    for (int i = 0; i < 3; ++i)
      if (dtype.ptr() == dtypes[i]) return DType(i);
    throw pybind11::type_error("a tensor is " + std::string(pybind11::str(dtype)) +
                               "; allowed: torch.float32, torch.bfloat16, torch.float16");
  }

  // Appends what tells where it lies: the address, dtype, shape and strides. False where DLPack can't read it.
  bool describe_place(std::vector<int64_t>& out) const {
    if (!is_viewed_) return false;
    out.insert(out.end(), {reinterpret_cast<int64_t>(view_.data) + int64_t(view_.byte_offset), viewed_dtype()});
    out.push_back(view_.dims);
    out.insert(out.end(), view_.shape, view_.shape + view_.dims);
    out.insert(out.end(), view_.strides, view_.strides + view_.dims);
    return true;
  }
  // Appends the dtype, the device and the last size; likewise.
  bool describe_values(std::vector<int64_t>& out) const {
    if (!is_viewed_) return false;
    out.insert(out.end(), {viewed_dtype(), view_.device_type, view_.device_index});
    out.push_back(view_.dims ? view_.shape[view_.dims - 1] : -1);
    return true;
  }
  // What is looked up in torch once, before threads could wait for each other there.
  static void prepare() {
    torch();
    torch_dtypes();
  }

 private:
  int64_t viewed_dtype() const { return view_.code << 16 | view_.bits << 8 | view_.lanes; }
  // Whether the object is a tensor that DLPack's functions could read.
  static bool view(pybind11::handle object, dlpack::View& out) {
    const Torch& found = torch();
    if (!found.exchange || !PyObject_TypeCheck(object.ptr(), found.type)) return false;
    if (found.exchange->view(object.ptr(), &out) == 0) return true;
    PyErr_Clear();
    return false;
  }
  struct Torch {
    PyTypeObject* type;
    const dlpack::Exchange* exchange = nullptr;
    Torch() {
      const pybind11::object tensor = pybind11::module_::import("torch").attr("Tensor");
      const pybind11::object capsule = pybind11::getattr(tensor, "__dlpack_c_exchange_api__", pybind11::none());
      type = reinterpret_cast<PyTypeObject*>(pybind11::object(tensor).release().ptr());
      if (capsule.is_none()) return;
      const void* const found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
      if (!found) throw pybind11::error_already_set();
      const auto* const api = static_cast<const dlpack::Exchange*>(found);
      if (api->major == 1) exchange = api;
    }
  };

  static const Torch& torch() {
    static const Torch found;
    return found;
  }

  [[noreturn]] void refuse() const {
    const std::string kind = pybind11::str(pybind11::type::of(object_).attr("__name__"));
    throw pybind11::value_error("a kernel got a tensor, of type " + kind +
                                ", that has no memory; allowed: dense tensors in memory");
  }
  static PyObject* const* torch_dtypes() {
    struct Dtypes {
      PyObject* list[3];
      Dtypes() {
        const auto torch = pybind11::module_::import("torch");
        const char* const names[] = {"float32", "bfloat16", "float16"};
        for (int i = 0; i < 3; ++i) list[i] = pybind11::object(torch.attr(names[i])).release().ptr();
      }
    };
    static const Dtypes dtypes;
    return dtypes.list;
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
  dlpack::View view_;
  bool is_viewed_ = false;
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
