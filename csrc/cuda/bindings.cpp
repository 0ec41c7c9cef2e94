// lora_kernels._cuda and, with LK_SIMT, lora_kernels._simt, which runs the same kernels on CPU tensors. Tensors arrive
// as addresses; all checks are made in Python.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "adamw.h"
#include "few_rows.h"
#include "lora_linear.h"
#include "nf4.h"

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

// The keyword arguments of one call. Each must be taken, under the name of the field it is for.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& values) : values_(values) {}

  template <class T>
  T get(const char* name) {
    if (!values_.contains(name)) throw py::type_error(std::string("argument ") + name + " is missing");
    ++taken_;
    return values_[name].cast<T>();
  }
  template <class T = void>
  T* pointer(const char* name) {
    return reinterpret_cast<T*>(get<uintptr_t>(name));
  }
  int extent(const char* name) { return get<int>(name); }
  int64_t stride(const char* name) { return get<int64_t>(name); }
  DType dtype(const char* name) { return DType(get<int>(name)); }
  float real(const char* name) { return get<float>(name); }
  Nf4Weight nf4_weight() {
    return {pointer<uint8_t>("packed"),
            pointer("absmax"),
            pointer<float>("absmax_scale"),
            pointer<float>("absmax_code"),
            pointer<float>("absmax_offset"),
            get<int>("block_shift"),
            get<int64_t>("N"),
            get<int64_t>("K")};
  }
  AdamWStep adamw() {
    return {pointer<AdamWTensor>("tensors"), pointer<AdamWChunk>("chunks"),
            pointer<AdamWGroup>("groups"),   pointer<AdamWScalars>("scalars"),
            pointer<float>("partials"),      pointer<double>("max_grad_norm"),
            pointer<float>("grad_norm"),     extent("count")};
  }
  RankParts rank_parts(const char* parts, const char* splits, const char* sum) {
    return {pointer<float>(parts), extent(splits), pointer<float>(sum)};
  }
  template <class Weight>
  LoraFewRows<Weight> few_rows(const Weight& weight) {
    return {weight,
            pointer("x"),
            stride("ld_x"),
            pointer<float>("column_scale"),
            pointer("bias"),
            rank_parts("h_parts", "splits", "h"),
            pointer("lora_b"),
            dtype("lora_b_dtype"),
            pointer("lora_e"),
            dtype("lora_e_dtype"),
            pointer("y"),
            extent("M"),
            extent("R"),
            real("scaling"),
            dtype("dtype")};
  }
  Dropout dropout() { return {pointer<int64_t>("rng"), get<uint32_t>("threshold")}; }

  void check_all_taken() const {
    if (taken_ != values_.size()) throw py::type_error("an argument is not known");
  }

 private:
  const py::kwargs& values_;
  size_t taken_ = 0;
};

void check(const char* kernel, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Binds `launcher`, whose parameters `read` makes from the arguments; `device` and `stream` say where it is queued.
template <class Params, class Read>
void bind(py::module_& m, const char* name, cudaError_t (*launcher)(const Params&, cudaStream_t), Read read) {
  m.def(name, [=](const py::kwargs& kwargs) {
    Arguments arguments(kwargs);
    const int device = arguments.get<int>("device");
    auto* stream = arguments.pointer<std::remove_pointer_t<cudaStream_t>>("stream");
    const Params params = read(arguments);
    arguments.check_all_taken();
    cudaError_t error;
    {
      py::gil_scoped_release release;
#ifdef LK_SIMT
      (void)device;
      error = launcher(params, stream);
#else
      int previous = device;
      error = cudaGetDevice(&previous);
      if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
      if (error == cudaSuccess) error = launcher(params, stream);
      if (previous != device) cudaSetDevice(previous);
#endif
    }
    check(name, error);
  });
}

}  // namespace

PYBIND11_MODULE(LK_MODULE, m) {
  m.doc() = "CUDA kernels of lora_kernels. Addresses in, nothing out; use lora_kernels.cuda instead.";
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
  m.def("dh_columns", &dh_columns, py::arg("R"));

  bind(m, "lora_h", &lora_h, [](Arguments& a) {
    return LoraH{a.pointer("x"),
                 a.stride("ld_x"),
                 a.pointer("lora_a"),
                 a.dtype("lora_a_dtype"),
                 a.pointer<float>("h_parts"),
                 a.extent("M"),
                 a.extent("K"),
                 a.extent("R"),
                 a.extent("columns_per_split"),
                 a.dropout(),
                 a.real("scale"),
                 a.dtype("dtype")};
  });
  bind(m, "lora_gemm", &lora_gemm, [](Arguments& a) {
    return LoraGemm{a.pointer("x"),        a.stride("ld_x"),
                    a.pointer("weight"),   a.stride("stride_wn"),
                    a.stride("stride_wk"), a.pointer<float>("column_scale"),
                    a.pointer("bias"),     a.rank_parts("u_parts", "splits", "u"),
                    a.pointer("lora_e"),   a.dtype("lora_e_dtype"),
                    a.pointer("v"),        a.dtype("v_dtype"),
                    a.stride("stride_vr"), a.stride("stride_vn"),
                    a.pointer("out"),      a.extent("M"),
                    a.extent("N"),         a.extent("K"),
                    a.extent("R"),         a.real("scale"),
                    a.dropout(),           a.dtype("dtype")};
  });
  bind(m, "lora_few_rows", &lora_few_rows, [](Arguments& a) {
    return a.few_rows(
        DenseWeight{a.pointer("weight"), a.stride("ld_weight"), a.get<int64_t>("N"), a.get<int64_t>("K")});
  });
  bind(m, "column_scale_bwd", &column_scale_bwd, [](Arguments& a) {
    return ColumnScaleBwd{a.pointer("dy"),
                          a.stride("ld_dy"),
                          a.pointer("y"),
                          a.pointer("bias"),
                          a.pointer<float>("column_scale"),
                          a.pointer("dz"),
                          a.pointer<float>("dscale_parts"),
                          a.extent("M"),
                          a.extent("N"),
                          a.extent("rows_per_split"),
                          a.dtype("dtype")};
  });
  bind(m, "lora_dh_dlora_b", &lora_dh_dlora_b, [](Arguments& a) {
    return LoraDhDloraB{a.pointer("dy"),
                        a.stride("ld_dy"),
                        a.pointer<float>("h"),
                        a.pointer("lora_b"),
                        a.dtype("lora_b_dtype"),
                        a.pointer<float>("dh_parts"),
                        a.pointer<float>("db_parts"),
                        a.pointer<float>("de_parts"),
                        a.extent("M"),
                        a.extent("N"),
                        a.extent("R"),
                        a.extent("rows_per_split"),
                        a.dtype("dtype")};
  });
  bind(m, "lora_reduce", &lora_reduce, [](Arguments& a) {
    return LoraReduce{a.pointer<float>("dh_parts"),
                      a.pointer<float>("db_parts"),
                      a.pointer<float>("de_parts"),
                      a.pointer<float>("dh"),
                      a.pointer("dlora_b"),
                      a.pointer("dlora_e"),
                      a.dtype("dlora_b_dtype"),
                      a.dtype("dlora_e_dtype"),
                      a.pointer("lora_e"),
                      a.dtype("lora_e_dtype"),
                      a.extent("column_blocks"),
                      a.extent("splits"),
                      a.extent("M"),
                      a.extent("N"),
                      a.extent("R"),
                      a.real("scaling"),
                      a.dtype("dtype")};
  });
  bind(m, "lora_dlora_a", &lora_dlora_a, [](Arguments& a) {
    return LoraDloraA{
        a.pointer("x"),  a.stride("ld_x"), a.pointer<float>("dh"), a.pointer("dlora_a"), a.dtype("dlora_a_dtype"),
        a.extent("M"),   a.extent("K"),    a.extent("R"),          a.dropout(),          a.real("scale"),
        a.dtype("dtype")};
  });

  bind(m, "nf4_quantize", &nf4_quantize, [](Arguments& a) {
    return Nf4Quantize{a.pointer("weight"),          a.dtype("dtype"),
                       a.get<int64_t>("size"),       a.extent("block_shift"),
                       a.pointer<uint8_t>("packed"), a.pointer<float>("absmax")};
  });
  bind(m, "nf4_quantize_absmax", &nf4_quantize_absmax, [](Arguments& a) {
    return Nf4QuantizeAbsmax{a.pointer<float>("absmax"),        a.get<int64_t>("blocks"),
                             a.pointer<float>("absmax_offset"), a.pointer<float>("absmax_code"),
                             a.pointer<uint8_t>("codes"),       a.pointer<float>("absmax_scale")};
  });
  bind(m, "nf4_dequantize", &nf4_dequantize,
       [](Arguments& a) { return Nf4Dequantize{a.nf4_weight(), a.pointer("out"), a.dtype("dtype")}; });
  bind(m, "nf4_few_rows", &nf4_few_rows, [](Arguments& a) { return a.few_rows(a.nf4_weight()); });
  bind(m, "adamw_prepare", &adamw_prepare, [](Arguments& a) { return a.adamw(); });
  bind(m, "adamw_step", &adamw_step, [](Arguments& a) { return a.adamw(); });

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
