// lora_kernels._C: the only file that knows Python. Tensors arrive as addresses; all checks are made in Python.
#include <pybind11/pybind11.h>

#include <atomic>
#include <new>
#include <string>

#include "cpu/lora_linear.h"

namespace py = pybind11;
using namespace lora_kernels::cpu;

namespace {

struct Isas {
  const Kernels* list[kMaxIsas];
  int count;
  std::atomic<const Kernels*> current;
  Isas() : count(supported_isas(list)), current(list[0]) {}
};
Isas isas;

std::string isa_names() {
  std::string names;
  for (int i = 0; i < isas.count; ++i) names += (i ? ", " : "") + std::string(isas.list[i]->name);
  return names;
}

void set_isa(const std::string& name) {
  for (int i = 0; i < isas.count; ++i)
    if (name == isas.list[i]->name) {
      isas.current = isas.list[i];
      return;
    }
  throw py::value_error("instruction set '" + name + "' can't run on this processor; it has: " + isa_names());
}

template <class Params>
void launch(bool (*Kernels::*kernel)(const Params&), const Params& params) {
  py::gil_scoped_release release;
  if (!(isas.current.load()->*kernel)(params)) throw std::bad_alloc();
}

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of lora_kernels. Addresses in, nothing out; use lora_kernels.cpu instead.";

  m.def("isa_supported", [] {
    py::list names;
    for (int i = 0; i < isas.count; ++i) names.append(isas.list[i]->name);
    return names;
  });
  m.def("get_isa", [] { return isas.current.load()->name; });
  m.def("set_isa", &set_isa, py::arg("name"));

  m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);
  m.attr("FLOAT16") = static_cast<int>(DType::kFloat16);

  m.def(
      "lora_a_fwd",
      [](uintptr_t x, int x_dtype, int64_t ld_x, uintptr_t lora_a, int lora_a_dtype, uintptr_t h, int64_t M, int64_t K,
         int64_t R, uint64_t seed, uint64_t offset, uint32_t threshold, int num_threads) {
        launch(&Kernels::lora_a_fwd,
               LoraAFwd{pointer(x), DType(x_dtype), ld_x, pointer(lora_a), DType(lora_a_dtype), pointer<float>(h), M, K,
                        R, Dropout{seed, offset, threshold}, num_threads});
      },
      py::kw_only(), py::arg("x"), py::arg("x_dtype"), py::arg("ld_x"), py::arg("lora_a"), py::arg("lora_a_dtype"),
      py::arg("h"), py::arg("M"), py::arg("K"), py::arg("R"), py::arg("seed"), py::arg("offset"), py::arg("threshold"),
      py::arg("num_threads"));

  m.def(
      "lora_b_fwd",
      [](uintptr_t base, int base_dtype, int64_t ld_base, uintptr_t bias, uintptr_t h, uintptr_t lora_b,
         int lora_b_dtype, float scaling, uintptr_t y, int y_dtype, int64_t ld_y, int64_t M, int64_t N, int64_t R,
         int num_threads) {
        launch(&Kernels::lora_b_fwd, LoraBFwd{pointer(base), DType(base_dtype), ld_base, pointer<float>(bias),
                                              pointer<float>(h), pointer(lora_b), DType(lora_b_dtype), scaling,
                                              pointer(y), DType(y_dtype), ld_y, M, N, R, num_threads});
      },
      py::kw_only(), py::arg("base"), py::arg("base_dtype"), py::arg("ld_base"), py::arg("bias"), py::arg("h"),
      py::arg("lora_b"), py::arg("lora_b_dtype"), py::arg("scaling"), py::arg("y"), py::arg("y_dtype"), py::arg("ld_y"),
      py::arg("M"), py::arg("N"), py::arg("R"), py::arg("num_threads"));

  m.def(
      "lora_b_bwd",
      [](uintptr_t dy, int dy_dtype, int64_t ld_dy, uintptr_t h, uintptr_t lora_b, int lora_b_dtype, float scaling,
         uintptr_t dh, uintptr_t dlora_b, int64_t M, int64_t N, int64_t R, int num_threads) {
        launch(&Kernels::lora_b_bwd,
               LoraBBwd{pointer(dy), DType(dy_dtype), ld_dy, pointer<float>(h), pointer(lora_b), DType(lora_b_dtype),
                        scaling, pointer<float>(dh), pointer<float>(dlora_b), M, N, R, num_threads});
      },
      py::kw_only(), py::arg("dy"), py::arg("dy_dtype"), py::arg("ld_dy"), py::arg("h"), py::arg("lora_b"),
      py::arg("lora_b_dtype"), py::arg("scaling"), py::arg("dh"), py::arg("dlora_b"), py::arg("M"), py::arg("N"),
      py::arg("R"), py::arg("num_threads"));

  m.def(
      "lora_a_bwd",
      [](uintptr_t x, int x_dtype, int64_t ld_x, uintptr_t dh, uintptr_t lora_a, int lora_a_dtype, uintptr_t dlora_a,
         uintptr_t base, int base_dtype, int64_t ld_base, uintptr_t dx, int64_t ld_dx, int64_t M, int64_t K, int64_t R,
         uint64_t seed, uint64_t offset, uint32_t threshold, bool undo_dropped, int64_t first_row, int num_threads) {
        launch(&Kernels::lora_a_bwd,
               LoraABwd{pointer(x), DType(x_dtype), ld_x, pointer<float>(dh), pointer(lora_a), DType(lora_a_dtype),
                        pointer<float>(dlora_a), pointer(base), DType(base_dtype), ld_base, pointer(dx), ld_dx, M, K, R,
                        Dropout{seed, offset, threshold}, undo_dropped, first_row, num_threads});
      },
      py::kw_only(), py::arg("x"), py::arg("x_dtype"), py::arg("ld_x"), py::arg("dh"), py::arg("lora_a"),
      py::arg("lora_a_dtype"), py::arg("dlora_a"), py::arg("base"), py::arg("base_dtype"), py::arg("ld_base"),
      py::arg("dx"), py::arg("ld_dx"), py::arg("M"), py::arg("K"), py::arg("R"), py::arg("seed"), py::arg("offset"),
      py::arg("threshold"), py::arg("undo_dropped"), py::arg("first_row"), py::arg("num_threads"));
}
