// Part of lora_kernels._C: launches of kernels that Triton compiled, past its own launcher.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <unordered_map>
#include <vector>

#include "../tensor.h"
#include "driver.h"

namespace lora_kernels::triton {

namespace py = pybind11;

// How the driver takes one argument of a launch.
enum class Kind { kDropped, kValue, kTile };

struct Argument {
  Kind kind;
  // Of a tile.
  TileMap map;
};

struct Kept {
  Kernel kernel;
  std::vector<Argument> arguments;
  // Addresses that Triton adds behind, of memory that these kernels don't ask for.
  int nulls;
  // What must live as long: the compiled kernel, and what the key has the address of.
  py::object alive;
};

// What is taken from a call: numbers as the driver reads them, and of tiles the tensor.
struct Value {
  union {
    uint64_t bits;
    float real;
  };
  py::handle tensor;
};

// Kernels by what of a call changes the code: of a number its width, whether it is 1 and whether 16 divides it; of a
// tensor its dtype; of a tile, the tuple (tensor, rows, columns), the dtype and the size; and every constant.
class TritonLaunches {
 public:
  explicit TritonLaunches(const std::string& library) : driver_(library.c_str()) {
    const auto torch = py::module_::import("torch");
    tensor_ = torch.attr("Tensor");
    parameter_ = torch.attr("nn").attr("Parameter");
  }

  // Whether the call is kept, and with that launched. Not where an argument is of an unknown kind or a tensor doesn't
  // start at a multiple of 16 bytes.
  bool launch(py::handle kernel, int device, uintptr_t stream, py::tuple grid, py::tuple args, py::dict constants) {
    Value values[kMost];
    std::string key;
    if (!read(kernel, device, args, constants, key, values)) return false;
    const auto found = kept_.find(key);
    if (found == kept_.end()) return false;
    const Kept& kept = found->second;
    driver_.enter(device);

    TensorMap maps[kMostTiles];
    int32_t sizes[kMostTiles][2];
    int64_t strides[kMostTiles][2];
    void* params[5 * kMostTiles + kMost + 2];
    uint64_t null = 0;
    int count = 0, tiles = 0;
    for (size_t i = 0; i < kept.arguments.size(); ++i) {
      const auto& [kind, made] = kept.arguments[i];
      if (kind == Kind::kDropped) continue;
      if (kind == Kind::kValue) {
        params[count++] = &values[i].bits;
        continue;
      }
      const Tensor tensor(values[i].tensor);
      auto& size = sizes[tiles];
      auto& stride = strides[tiles];
      for (int dim = 0; dim < 2; ++dim) size[dim] = int32_t(tensor.size(dim)), stride[dim] = tensor.stride(dim);
      TileMap map = made;
      map.address = values[i].bits;
      map.sizes[0] = size[1], map.sizes[1] = size[0];
      map.row_bytes = stride[0] * map.element_bytes;
      maps[tiles] = driver_.encode(map);
      for (void* param : {(void*)&maps[tiles], (void*)&size[0], (void*)&size[1], (void*)&stride[0], (void*)&stride[1]})
        params[count++] = param;
      ++tiles;
    }
    for (int i = 0; i < kept.nulls; ++i) params[count++] = &null;

    unsigned blocks[3];
    for (int dim = 0; dim < 3; ++dim) blocks[dim] = unsigned(PyLong_AsUnsignedLong(PyTuple_GetItem(grid.ptr(), dim)));
    if (PyErr_Occurred()) throw py::error_already_set();
    const Kernel launched = kept.kernel;
    // It waits where the device's queue is full.
    py::gil_scoped_release release;
    driver_.launch(launched, blocks, reinterpret_cast<void*>(stream), params);
    return true;
  }

  // Keeps what Triton compiled for a call. arguments, for each of args: None where the code doesn't take it, of a tile
  // (element type, bytes of an element, swizzle, rows, columns), else "value".
  void keep(py::handle kernel, int device, py::tuple args, py::dict constants, py::object compiled, uintptr_t function,
            int num_warps, int shared_bytes, bool overlaps, int nulls, py::list arguments) {
    Value values[kMost];
    std::string key;
    if (!read(kernel, device, args, constants, key, values)) return;
    Kept kept{{reinterpret_cast<void*>(function), num_warps, shared_bytes, overlaps}, {}, nulls, {}};
    for (const py::handle argument : arguments) {
      if (argument.is_none()) {
        kept.arguments.push_back({Kind::kDropped, {}});
      } else if (!py::isinstance<py::tuple>(argument)) {
        kept.arguments.push_back({Kind::kValue, {}});
      } else {
        const auto [type, bytes, swizzle, rows, columns] = argument.cast<std::array<int, 5>>();
        TileMap map{};
        map.element_type = type, map.element_bytes = bytes, map.swizzle = swizzle;
        map.box[0] = columns, map.box[1] = rows;
        kept.arguments.push_back({Kind::kTile, map});
      }
    }
    kept.alive = py::make_tuple(kernel, constants, compiled);
    kept_[key] = std::move(kept);
  }

 private:
  static constexpr int kMost = 64, kMostTiles = 6;

  template <class T>
  static void append(std::string& key, const T& value) {
    key.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  bool is_tensor(py::handle value) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value.ptr()));
    return type == tensor_.ptr() || type == parameter_.ptr();
  }

  bool read(py::handle kernel, int device, const py::tuple& args, const py::dict& constants, std::string& key,
            Value* values) const {
    if (args.size() > kMost) return false;
    key.reserve(1024);
    append(key, kernel.ptr());
    append(key, device);
    uint64_t addresses = 0;
    int tiles = 0;
    for (size_t i = 0; i < args.size(); ++i) {
      const py::handle arg = PyTuple_GET_ITEM(args.ptr(), i);
      Value& value = values[i];
      if (arg.is_none()) {
        key += 'n';
        value.bits = 0;
      } else if (PyLong_CheckExact(arg.ptr())) {
        int overflows;
        const int64_t number = PyLong_AsLongLongAndOverflow(arg.ptr(), &overflows);
        if (overflows) return false;
        key += char('0' + (number == 1) + 2 * (number % 16 == 0) + 4 * (number != int32_t(number)));
        value.bits = uint64_t(number);
      } else if (PyFloat_CheckExact(arg.ptr())) {
        key += 'f';
        value.real = float(PyFloat_AS_DOUBLE(arg.ptr()));
      } else {
        value.tensor = arg;
        if (PyTuple_Check(arg.ptr()) && PyTuple_GET_SIZE(arg.ptr()) == 3 && tiles++ < kMostTiles) {
          value.tensor = PyTuple_GET_ITEM(arg.ptr(), 0);
          key += 't';
          for (int item = 1; item < 3; ++item) {
            const int size = int(PyLong_AsLong(PyTuple_GET_ITEM(arg.ptr(), item)));
            if (size == -1 && PyErr_Occurred()) throw py::error_already_set();
            append(key, size);
          }
        } else {
          key += 'p';
        }
        if (!is_tensor(value.tensor)) return false;
        const Tensor tensor(value.tensor);
        append(key, tensor.torch_dtype().ptr());
        value.bits = reinterpret_cast<uint64_t>(tensor.data());
        addresses |= value.bits;
      }
    }
    PyObject *name, *constant;
    for (Py_ssize_t at = 0; PyDict_Next(constants.ptr(), &at, &name, &constant);) {
      append(key, name);
      if (PyLong_Check(constant)) {
        int overflows;
        append(key, PyLong_AsLongLongAndOverflow(constant, &overflows));
        if (overflows) return false;
      } else if (PyUnicode_CheckExact(constant)) {
        Py_ssize_t size;
        const char* const text = PyUnicode_AsUTF8AndSize(constant, &size);
        if (!text) throw py::error_already_set();
        append(key, size);
        key.append(text, size);
      } else {
        return false;
      }
    }
    return addresses % 16 == 0;
  }

  const Driver driver_;
  py::object tensor_, parameter_;
  std::unordered_map<std::string, Kept> kept_;
};

inline void define(py::module_& m) {
  py::class_<TritonLaunches>(m, "TritonLaunches")
      .def(py::init<const std::string&>(), py::arg("library"))
      .def("launch", &TritonLaunches::launch)
      .def("keep", &TritonLaunches::keep, py::arg("kernel"), py::arg("device"), py::arg("args"), py::arg("constants"),
           py::arg("compiled"), py::arg("function"), py::arg("num_warps"), py::arg("shared_bytes"), py::arg("overlaps"),
           py::arg("nulls"), py::arg("arguments"));
}

}  // namespace lora_kernels::triton
