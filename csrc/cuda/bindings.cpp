// lora_kernels._cuda and, with LK_SIMT, lora_kernels._simt, which runs the same kernels on CPU tensors. All checks are
// made in Python.
#include <pybind11/pybind11.h>

#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "adamw.h"
#include "few_rows.h"
#include "lora_linear.h"
#include "nf4.h"
#include "tensor.h"

#ifdef LK_SIMT
#include "simt/bindings.h"
#define LK_MODULE _simt
#else
#define LK_MODULE _cuda
#endif

namespace py = pybind11;
using namespace lora_kernels;
using namespace lora_kernels::cuda;

namespace {

// Of None any.
DType dtype_of(const Tensor& t) { return t.is_none() ? DType::kFloat32 : t.dtype<DType>(); }

int checked(int64_t size) {
  if (size != int(size)) throw py::value_error("a tensor is too large");
  return int(size);
}
int rows(const Tensor& t) { return checked(t.size(0)); }
int columns(const Tensor& t) { return checked(t.size(1)); }

// The arguments of one launch, {name: value}. Each must be taken, under the name of the field it is for.
class Arguments {
 public:
  // names: of the kernel's arguments in the order in which they are taken, the same at every launch, so that each is
  // made a string only once.
  Arguments(py::dict values, std::vector<PyObject*>& names) : values_(std::move(values)), names_(names) {}

  int64_t integer(const char* name) {
    const long long value = PyLong_AsLongLong(get(name));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  int extent(const char* name) {
    const int64_t value = integer(name);
    if (value != int(value)) throw py::value_error(std::string(name) + " is too large");
    return int(value);
  }
  float real(const char* name) {
    const double value = PyFloat_AsDouble(get(name));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return float(value);
  }
  DType dtype(const char* name) { return DType(integer(name)); }
  Tensor tensor(const char* name) { return Tensor(get(name)); }
  // Of None, a tensor, or a part of one as (tensor, first byte, bytes).
  template <class T = void>
  T* pointer(const char* name) {
    const py::handle value = get(name);
    if (!py::isinstance<py::tuple>(value)) return Tensor(value).data<T>();
    const auto part = py::reinterpret_borrow<py::tuple>(value);
    return reinterpret_cast<T*>(Tensor(py::object(part[0])).data<char>() + part[1].cast<uintptr_t>());
  }
  Nf4Weight nf4_weight() {
    return {pointer<uint8_t>("packed"),
            pointer("absmax"),
            pointer<float>("absmax_scale"),
            pointer<float>("absmax_code"),
            pointer<float>("absmax_offset"),
            extent("block_shift"),
            integer("N"),
            integer("K")};
  }
  AdamWStep adamw() {
    return {pointer<AdamWTensor>("tensors"), pointer<AdamWChunk>("chunks"),
            pointer<AdamWGroup>("groups"),   pointer<AdamWScalars>("scalars"),
            pointer<float>("partials"),      pointer<double>("max_grad_norm"),
            pointer<float>("grad_norm"),     extent("count")};
  }
  RankParts rank_parts() {
    return {pointer<float>("u_parts"), extent("splits"), pointer<float>("u"), integer("just_queued") != 0};
  }
  template <class Weight>
  LoraFewRows<Weight> few_rows(const Weight& weight) {
    const Tensor x = tensor("x"), lora_b = tensor("lora_b"), lora_e = tensor("lora_e");
    return {weight,          x.data(),         x.stride(0),   pointer<float>("column_scale"),
            pointer("bias"), rank_parts(),     lora_b.data(), dtype_of(lora_b),
            lora_e.data(),   dtype_of(lora_e), pointer("y"),  rows(x),
            columns(lora_b), real("scaling"),  dtype_of(x)};
  }
  Dropout dropout() { return {pointer<int64_t>("rng"), uint32_t(integer("threshold"))}; }

  void check_all_taken() const {
    if (taken_ != values_.size()) throw py::type_error("an argument is not known");
  }

 private:
  PyObject* get(const char* name) {
    if (names_.size() == taken_) names_.push_back(PyUnicode_InternFromString(name));
    PyObject* value = PyDict_GetItemWithError(values_.ptr(), names_[taken_++]);
    if (value == nullptr) throw py::type_error(std::string("argument ") + name + " is missing");
    return value;
  }

  const py::dict values_;
  std::vector<PyObject*>& names_;
  size_t taken_ = 0;
};

// A kernel with its parameters.
using Launch = std::function<cudaError_t(cudaStream_t)>;

struct Kernel {
  std::function<Launch(Arguments&)> read;
  std::vector<PyObject*> argument_names;
};
std::map<std::string, Kernel, std::less<>> kernels;

// `read` makes the parameters of `launcher` from the arguments.
template <class Params, class Read>
void add(const char* name, cudaError_t (*launcher)(const Params&, cudaStream_t), Read read) {
  kernels[name].read = [=](Arguments& arguments) -> Launch {
    return [launcher, params = Params(read(arguments))](cudaStream_t stream) { return launcher(params, stream); };
  };
}

// Queues kernels, each (name, {argument: value}), one after the other.
void queue(const py::iterable& launches, int device, uintptr_t stream_address) {
  std::vector<std::pair<const char*, Launch>> queued;
  for (const py::handle launch : launches) {
    const auto [name, values] = launch.cast<std::pair<std::string_view, py::dict>>();
    const auto found = kernels.find(name);
    if (found == kernels.end()) throw py::value_error("there is no kernel " + std::string(name));
    Arguments arguments(values, found->second.argument_names);
    queued.emplace_back(found->first.c_str(), found->second.read(arguments));
    arguments.check_all_taken();
  }
  auto* stream = reinterpret_cast<cudaStream_t>(stream_address);
  cudaError_t error = cudaSuccess;
  const char* kernel = "the device";
  {
    const py::gil_scoped_release release;
#ifndef LK_SIMT
    int previous = device;
    error = cudaGetDevice(&previous);
    if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
#endif
    for (size_t i = 0; i < queued.size() && error == cudaSuccess; ++i) {
      kernel = queued[i].first;
      error = queued[i].second(stream);
    }
#ifndef LK_SIMT
    if (previous != device) cudaSetDevice(previous);
#endif
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

}  // namespace

PYBIND11_MODULE(LK_MODULE, m) {
  m.doc() = "CUDA kernels of lora_kernels. Tensors in, nothing out; use lora_kernels.backends.cuda instead.";
  Tensor::prepare();
  m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);
  m.attr("FLOAT16") = static_cast<int>(DType::kFloat16);
  m.attr("DH_ROWS") = kDhRows;
  m.attr("H_COLUMNS") = kHColumns;
  m.attr("H_RANKS") = kHRanks;
  m.attr("H_ROWS") = kHRows;
  m.attr("SCALE_ROWS") = kScaleRows;
  m.attr("SCALE_COLUMNS") = kScaleColumns;
  m.attr("ADAMW_CHUNK") = kAdamWChunk;
  m.attr("ADAMW_SCALARS") = sizeof(AdamWScalars) / sizeof(float);
  m.attr("FEW_ROWS") = kFewRows;
  m.def("queue", &queue, py::arg("launches"), py::arg("device"), py::arg("stream"),
        "Queues kernels, each (name, {argument: value}), one after the other on a stream of a device.");
  m.def("dh_columns", &dh_columns, py::arg("R"));

  add("lora_h", &lora_h, [](Arguments& a) {
    const Tensor x = a.tensor("x"), lora_a = a.tensor("lora_a");
    return LoraH{x.data(),
                 x.stride(0),
                 lora_a.data(),
                 dtype_of(lora_a),
                 a.pointer<float>("h_parts"),
                 rows(x),
                 columns(x),
                 rows(lora_a),
                 a.extent("columns_per_split"),
                 a.dropout(),
                 a.real("scale"),
                 dtype_of(x)};
  });
  add("lora_gemm", &lora_gemm, [](Arguments& a) {
    const Tensor x = a.tensor("x"), weight = a.tensor("weight"), lora_e = a.tensor("lora_e"), v = a.tensor("v");
    const int transposed = a.integer("transposed") != 0;
    return LoraGemm{x.data(),
                    x.stride(0),
                    weight.data(),
                    weight.stride(transposed),
                    weight.stride(!transposed),
                    a.pointer<float>("column_scale"),
                    a.pointer("bias"),
                    a.rank_parts(),
                    lora_e.data(),
                    dtype_of(lora_e),
                    v.data(),
                    dtype_of(v),
                    v.stride(0),
                    v.stride(1),
                    a.pointer("out"),
                    rows(x),
                    columns(v),
                    columns(x),
                    rows(v),
                    a.real("scale"),
                    a.dropout(),
                    dtype_of(x)};
  });
  add("lora_few_rows", &lora_few_rows, [](Arguments& a) {
    const Tensor weight = a.tensor("weight");
    return a.few_rows(DenseWeight{weight.data(), weight.stride(0), weight.size(0), weight.size(1)});
  });
  add("column_scale_bwd", &column_scale_bwd, [](Arguments& a) {
    const Tensor dy = a.tensor("dy");
    return ColumnScaleBwd{dy.data(),
                          dy.stride(0),
                          a.pointer("y"),
                          a.pointer("bias"),
                          a.pointer<float>("column_scale"),
                          a.pointer("dz"),
                          a.pointer<float>("dscale_parts"),
                          rows(dy),
                          columns(dy),
                          a.extent("rows_per_split"),
                          dtype_of(dy)};
  });
  add("lora_dh_dlora_b", &lora_dh_dlora_b, [](Arguments& a) {
    const Tensor dy = a.tensor("dy"), lora_b = a.tensor("lora_b");
    return LoraDhDloraB{dy.data(),
                        dy.stride(0),
                        a.pointer<float>("h"),
                        lora_b.data(),
                        dtype_of(lora_b),
                        a.pointer<float>("dh_parts"),
                        a.pointer<float>("db_parts"),
                        a.pointer<float>("de_parts"),
                        rows(dy),
                        columns(dy),
                        columns(lora_b),
                        a.extent("rows_per_split"),
                        dtype_of(dy)};
  });
  add("lora_reduce", &lora_reduce, [](Arguments& a) {
    const Tensor dlora_b = a.tensor("dlora_b"), dlora_e = a.tensor("dlora_e"), lora_e = a.tensor("lora_e");
    return LoraReduce{a.pointer<float>("dh_parts"),
                      a.pointer<float>("db_parts"),
                      a.pointer<float>("de_parts"),
                      a.pointer<float>("dh"),
                      dlora_b.data(),
                      dlora_e.data(),
                      dtype_of(dlora_b),
                      dtype_of(dlora_e),
                      lora_e.data(),
                      dtype_of(lora_e),
                      a.extent("column_blocks"),
                      a.extent("splits"),
                      a.extent("M"),
                      a.extent("N"),
                      a.extent("R"),
                      a.real("scaling"),
                      a.dtype("dtype")};
  });
  add("lora_dlora_a", &lora_dlora_a, [](Arguments& a) {
    const Tensor x = a.tensor("x"), dlora_a = a.tensor("dlora_a");
    return LoraDloraA{x.data(),   x.stride(0), a.pointer<float>("dh"), dlora_a.data(), dtype_of(dlora_a),
                      rows(x),    columns(x),  rows(dlora_a),          a.dropout(),    a.real("scale"),
                      dtype_of(x)};
  });

  add("nf4_quantize", &nf4_quantize, [](Arguments& a) {
    const Tensor weight = a.tensor("weight");
    return Nf4Quantize{weight.data(),
                       dtype_of(weight),
                       weight.numel(),
                       a.extent("block_shift"),
                       a.pointer<uint8_t>("packed"),
                       a.pointer<float>("absmax")};
  });
  add("nf4_quantize_absmax", &nf4_quantize_absmax, [](Arguments& a) {
    const Tensor absmax = a.tensor("absmax");
    return Nf4QuantizeAbsmax{absmax.data<float>(),
                             absmax.numel(),
                             a.pointer<float>("absmax_offset"),
                             a.pointer<float>("absmax_code"),
                             a.pointer<uint8_t>("codes"),
                             a.pointer<float>("absmax_scale")};
  });
  add("nf4_dequantize", &nf4_dequantize, [](Arguments& a) {
    const Tensor out = a.tensor("out");
    return Nf4Dequantize{a.nf4_weight(), out.data(), dtype_of(out)};
  });
  add("nf4_few_rows", &nf4_few_rows, [](Arguments& a) { return a.few_rows(a.nf4_weight()); });
  add("adamw_prepare", &adamw_prepare, [](Arguments& a) { return a.adamw(); });
  add("adamw_step", &adamw_step, [](Arguments& a) { return a.adamw(); });

#ifdef LK_SIMT
  simt::bind_simt(m);
#else
  m.def(
      "device_error",
      []() -> py::object {
        int count = 0;
        const cudaError_t error = cudaGetDeviceCount(&count);
        return error == cudaSuccess ? py::object(py::none()) : py::str(cudaGetErrorString(error));
      },
      "Why the CUDA driver can't be used, or None.");
#endif
}
