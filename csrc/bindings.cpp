// lora_kernels._C: the only file that knows Python. Tensors arrive as addresses; all checks are made in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/amx.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace lora_kernels::cpu;

namespace {

struct Isas {
  const Isa* list[kMaxIsas];
  int count;
  std::atomic<const Isa*> current;
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

template <class Kernels, class Params>
void launch(const Kernels* Isa::* op, bool (*Kernels::*kernel)(const Params&), const Params& params) {
  py::gil_scoped_release release;
  if (!(isas.current.load()->*op->*kernel)(params)) throw std::bad_alloc();
}

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Address, and how far apart batches, heads and rows are.
using HeadsArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

Heads heads(const HeadsArgument& x) {
  const auto& [address, batch, head, row] = x;
  return {pointer(address), batch, head, row};
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
  m.def("amx_supported", &amx_supported);
  m.def("amx_enabled", &amx_enabled);
  m.def(
      "enable_amx",
      [](bool enabled) {
        if (!enable_amx(enabled)) throw py::value_error("this processor, or its system, has no AMX for bfloat16");
      },
      py::arg("enabled"));

  m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);
  m.attr("FLOAT16") = static_cast<int>(DType::kFloat16);

  m.def(
      "lora_a_fwd",
      [](uintptr_t x, int x_dtype, int64_t ld_x, uintptr_t lora_a, int lora_a_dtype, uintptr_t h, int64_t M, int64_t K,
         int64_t R, uint64_t seed, uint64_t offset, uint32_t threshold, int num_threads) {
        launch(&Isa::lora_linear, &LoraLinearKernels::lora_a_fwd,
               LoraAFwd{pointer(x), DType(x_dtype), ld_x, pointer(lora_a), DType(lora_a_dtype), pointer<float>(h), M, K,
                        R, Dropout{seed, offset, threshold}, num_threads});
      },
      py::kw_only(), py::arg("x"), py::arg("x_dtype"), py::arg("ld_x"), py::arg("lora_a"), py::arg("lora_a_dtype"),
      py::arg("h"), py::arg("M"), py::arg("K"), py::arg("R"), py::arg("seed"), py::arg("offset"), py::arg("threshold"),
      py::arg("num_threads"));

  m.def(
      "lora_b_fwd",
      [](uintptr_t base, int base_dtype, int64_t ld_base, uintptr_t column_scale, uintptr_t bias, uintptr_t h,
         uintptr_t lora_b, int lora_b_dtype, float scaling, uintptr_t y, int y_dtype, int64_t ld_y, int64_t M,
         int64_t N, int64_t R, int num_threads) {
        launch(&Isa::lora_linear, &LoraLinearKernels::lora_b_fwd,
               LoraBFwd{pointer(base), DType(base_dtype), ld_base, pointer<float>(column_scale), pointer<float>(bias),
                        pointer<float>(h), pointer(lora_b), DType(lora_b_dtype), scaling, pointer(y), DType(y_dtype),
                        ld_y, M, N, R, num_threads});
      },
      py::kw_only(), py::arg("base"), py::arg("base_dtype"), py::arg("ld_base"), py::arg("column_scale"),
      py::arg("bias"), py::arg("h"), py::arg("lora_b"), py::arg("lora_b_dtype"), py::arg("scaling"), py::arg("y"),
      py::arg("y_dtype"), py::arg("ld_y"), py::arg("M"), py::arg("N"), py::arg("R"), py::arg("num_threads"));

  m.def(
      "column_scale_bwd",
      [](uintptr_t dy, int64_t ld_dy, uintptr_t y, int64_t ld_y, uintptr_t bias, uintptr_t column_scale, uintptr_t dz,
         int dtype, uintptr_t total, int64_t M, int64_t N, int num_threads) {
        launch(&Isa::lora_linear, &LoraLinearKernels::column_scale_bwd,
               ColumnScaleBwd{pointer(dy), ld_dy, pointer(y), ld_y, pointer<float>(bias), pointer<float>(column_scale),
                              pointer(dz), DType(dtype), pointer<float>(total), M, N, num_threads});
      },
      py::kw_only(), py::arg("dy"), py::arg("ld_dy"), py::arg("y"), py::arg("ld_y"), py::arg("bias"),
      py::arg("column_scale"), py::arg("dz"), py::arg("dtype"), py::arg("total"), py::arg("M"), py::arg("N"),
      py::arg("num_threads"));

  m.def(
      "lora_b_bwd",
      [](uintptr_t dy, int dy_dtype, int64_t ld_dy, uintptr_t h, uintptr_t lora_b, int lora_b_dtype, float scaling,
         uintptr_t dh, uintptr_t dlora_b, int64_t M, int64_t N, int64_t R, int num_threads) {
        launch(&Isa::lora_linear, &LoraLinearKernels::lora_b_bwd,
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
        launch(&Isa::lora_linear, &LoraLinearKernels::lora_a_bwd,
               LoraABwd{pointer(x), DType(x_dtype), ld_x, pointer<float>(dh), pointer(lora_a), DType(lora_a_dtype),
                        pointer<float>(dlora_a), pointer(base), DType(base_dtype), ld_base, pointer(dx), ld_dx, M, K, R,
                        Dropout{seed, offset, threshold}, undo_dropped, first_row, num_threads});
      },
      py::kw_only(), py::arg("x"), py::arg("x_dtype"), py::arg("ld_x"), py::arg("dh"), py::arg("lora_a"),
      py::arg("lora_a_dtype"), py::arg("dlora_a"), py::arg("base"), py::arg("base_dtype"), py::arg("ld_base"),
      py::arg("dx"), py::arg("ld_dx"), py::arg("M"), py::arg("K"), py::arg("R"), py::arg("seed"), py::arg("offset"),
      py::arg("threshold"), py::arg("undo_dropped"), py::arg("first_row"), py::arg("num_threads"));

  m.def(
      "nf4_quantize",
      [](uintptr_t weight, int weight_dtype, int64_t size, int64_t block_size, uintptr_t packed, uintptr_t absmax,
         int num_threads) {
        launch(&Isa::nf4, &Nf4Kernels::quantize,
               Nf4Quantize{pointer(weight), DType(weight_dtype), size, block_size, pointer<uint8_t>(packed),
                           pointer<float>(absmax), num_threads});
      },
      py::kw_only(), py::arg("weight"), py::arg("weight_dtype"), py::arg("size"), py::arg("block_size"),
      py::arg("packed"), py::arg("absmax"), py::arg("num_threads"));

  m.def(
      "nf4_quantize_absmax",
      [](uintptr_t absmax, int64_t blocks, float absmax_offset, uintptr_t absmax_code, uintptr_t codes,
         uintptr_t absmax_scale, int) {
        launch(&Isa::nf4, &Nf4Kernels::quantize_absmax,
               Nf4QuantizeAbsmax{pointer<float>(absmax), blocks, absmax_offset, pointer<float>(absmax_code),
                                 pointer<uint8_t>(codes), pointer<float>(absmax_scale)});
      },
      py::kw_only(), py::arg("absmax"), py::arg("blocks"), py::arg("absmax_offset"), py::arg("absmax_code"),
      py::arg("codes"), py::arg("absmax_scale"), py::arg("num_threads"));

  py::class_<Weight>(m, "Weight")
      .def_static(
          "nf4",
          [](uintptr_t packed, uintptr_t absmax, uintptr_t absmax_scale, uintptr_t absmax_code, uintptr_t absmax_offset,
             int64_t block_size, int64_t N, int64_t K) {
            Weight w{};
            w.nf4 = {pointer<uint8_t>(packed),
                     pointer(absmax),
                     pointer<float>(absmax_scale),
                     pointer<float>(absmax_code),
                     pointer<float>(absmax_offset),
                     block_size,
                     N,
                     K};
            w.N = N, w.K = K;
            return w;
          },
          py::kw_only(), py::arg("packed"), py::arg("absmax"), py::arg("absmax_scale"), py::arg("absmax_code"),
          py::arg("absmax_offset"), py::arg("block_size"), py::arg("N"), py::arg("K"))
      .def_static(
          "dense",
          [](uintptr_t data, int dtype, int64_t ld, int64_t N, int64_t K) {
            return Weight{{}, pointer(data), DType(dtype), ld, N, K};
          },
          py::kw_only(), py::arg("data"), py::arg("dtype"), py::arg("ld"), py::arg("N"), py::arg("K"));

  m.def(
      "nf4_dequantize",
      [](const Weight& weight, int64_t row_first, int64_t row_last, int64_t col_first, int64_t col_last, uintptr_t out,
         int out_dtype, int64_t ld_out, int num_threads) {
        launch(&Isa::nf4, &Nf4Kernels::dequantize,
               Nf4Dequantize{weight.nf4, row_first, row_last, col_first, col_last, pointer(out), DType(out_dtype),
                             ld_out, num_threads});
      },
      py::kw_only(), py::arg("weight"), py::arg("row_first"), py::arg("row_last"), py::arg("col_first"),
      py::arg("col_last"), py::arg("out"), py::arg("out_dtype"), py::arg("ld_out"), py::arg("num_threads"));

  m.attr("LAYER_ROWS") = kLayerRows;
  m.attr("MAX_LAYERS") = kMaxLayers;
  py::class_<FewRowsLayer>(m, "FewRowsLayer")
      .def(py::init([](const Weight& weight, uintptr_t lora_a, int lora_a_dtype, uintptr_t lora_b, int lora_b_dtype,
                       float scaling, uintptr_t bias, uintptr_t lora_e, int lora_e_dtype, uintptr_t column_scale,
                       int64_t R) {
             return FewRowsLayer{
                 weight,  pointer(lora_a), DType(lora_a_dtype), pointer(lora_b),     DType(lora_b_dtype),
                 scaling, pointer(bias),   pointer(lora_e),     DType(lora_e_dtype), pointer<float>(column_scale),
                 R};
           }),
           py::kw_only(), py::arg("weight"), py::arg("lora_a"), py::arg("lora_a_dtype"), py::arg("lora_b"),
           py::arg("lora_b_dtype"), py::arg("scaling"), py::arg("bias"), py::arg("lora_e"), py::arg("lora_e_dtype"),
           py::arg("column_scale"), py::arg("R"))
      .def_property_readonly("N", [](const FewRowsLayer& layer) { return layer.weight.N; });

  // Arguments by position: their names would take as long as a small layer.
  m.def("layers_forward",
        [](const std::vector<const FewRowsLayer*>& layers, const std::vector<uintptr_t>& y,
           const std::vector<uintptr_t>& h, uintptr_t x, int x_dtype, int64_t ld_x, int64_t M, int num_threads) {
          if (layers.empty() || layers.size() > kMaxLayers || y.size() != layers.size() || h.size() > layers.size())
            throw py::value_error("layers_forward takes 1 to " + std::to_string(kMaxLayers) + " layers with a y each");
          LayersForward p{};
          for (size_t i = 0; i < layers.size(); ++i) p.layers[i] = layers[i], p.y[i] = pointer(y[i]);
          for (size_t i = 0; i < h.size(); ++i) p.h[i] = pointer<float>(h[i]);
          p.count = (int)layers.size(), p.x = pointer(x), p.x_dtype = DType(x_dtype), p.ld_x = ld_x;
          p.M = M, p.K = layers[0]->weight.K, p.num_threads = num_threads;
          launch(&Isa::few_rows, &FewRowsKernels::layers_forward, p);
        });

  m.def(
      "product",
      // A term: (weight, in, ld, scale).
      [](const std::vector<std::tuple<Weight, uintptr_t, int64_t, float>>& terms, int in_dtype, bool transposed,
         uintptr_t column_scale, uintptr_t bias, uintptr_t out, int out_dtype, int64_t ld_out, int64_t M, int64_t J,
         int num_threads) {
        std::vector<ProductTerm> list;
        for (const auto& [weight, in, ld, scale] : terms) list.push_back({weight, pointer(in), ld, scale});
        launch(&Isa::product, &ProductKernels::product,
               Product{list.data(), (int)list.size(), DType(in_dtype), transposed, pointer<float>(column_scale),
                       pointer<float>(bias), pointer(out), DType(out_dtype), ld_out, M, J, num_threads});
      },
      py::kw_only(), py::arg("terms"), py::arg("in_dtype"), py::arg("transposed"), py::arg("column_scale"),
      py::arg("bias"), py::arg("out"), py::arg("out_dtype"), py::arg("ld_out"), py::arg("M"), py::arg("J"),
      py::arg("num_threads"));

  m.def(
      "rms_norm_fwd",
      [](uintptr_t x, uintptr_t weight, float eps, float offset, uintptr_t y, uintptr_t rstd, int64_t M, int64_t K,
         int dtype, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::rms_norm_fwd,
               RmsNormFwd{pointer(x), pointer(weight), eps, offset, pointer(y), pointer<float>(rstd), M, K,
                          DType(dtype), num_threads});
      },
      py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("offset"), py::arg("y"), py::arg("rstd"),
      py::arg("M"), py::arg("K"), py::arg("dtype"), py::arg("num_threads"));

  m.def(
      "rms_norm_bwd",
      [](uintptr_t dy, uintptr_t x, uintptr_t rstd, uintptr_t weight, float offset, uintptr_t dx, int64_t M, int64_t K,
         int dtype, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::rms_norm_bwd,
               RmsNormBwd{pointer(dy), pointer(x), pointer<float>(rstd), pointer(weight), offset, pointer(dx), M, K,
                          DType(dtype), num_threads});
      },
      py::kw_only(), py::arg("dy"), py::arg("x"), py::arg("rstd"), py::arg("weight"), py::arg("offset"), py::arg("dx"),
      py::arg("M"), py::arg("K"), py::arg("dtype"), py::arg("num_threads"));

  m.def(
      "swiglu_fwd",
      [](uintptr_t gate, uintptr_t up, uintptr_t y, int64_t size, int dtype, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::swiglu_fwd,
               SwigluFwd{pointer(gate), pointer(up), pointer(y), size, DType(dtype), num_threads});
      },
      py::kw_only(), py::arg("gate"), py::arg("up"), py::arg("y"), py::arg("size"), py::arg("dtype"),
      py::arg("num_threads"));

  m.def(
      "swiglu_bwd",
      [](uintptr_t dy, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup, int64_t size, int dtype,
         int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::swiglu_bwd,
               SwigluBwd{pointer(dy), pointer(gate), pointer(up), pointer(dgate), pointer(dup), size, DType(dtype),
                         num_threads});
      },
      py::kw_only(), py::arg("dy"), py::arg("gate"), py::arg("up"), py::arg("dgate"), py::arg("dup"), py::arg("size"),
      py::arg("dtype"), py::arg("num_threads"));

  m.def(
      "rotary",
      [](const HeadsArgument& x, uintptr_t cos, uintptr_t sin, int64_t angle_batch, bool transposed,
         const HeadsArgument& y, int64_t B, int64_t H, int64_t T, int64_t D, int dtype, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::rotary,
               Rotary{heads(x), heads(y), pointer(cos), pointer(sin), angle_batch, transposed, B, H, T, D, DType(dtype),
                      num_threads});
      },
      py::kw_only(), py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("angle_batch"), py::arg("transposed"),
      py::arg("y"), py::arg("B"), py::arg("H"), py::arg("T"), py::arg("D"), py::arg("dtype"), py::arg("num_threads"));

  m.def(
      "cross_entropy",
      [](uintptr_t logits, uintptr_t target, float scale, bool with_gradient, uintptr_t nll, int64_t M, int64_t V,
         int dtype, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::cross_entropy,
               CrossEntropy{pointer(logits), pointer<int64_t>(target), scale, with_gradient, pointer<float>(nll), M, V,
                            DType(dtype), num_threads});
      },
      py::kw_only(), py::arg("logits"), py::arg("target"), py::arg("scale"), py::arg("with_gradient"), py::arg("nll"),
      py::arg("M"), py::arg("V"), py::arg("dtype"), py::arg("num_threads"));

  m.def(
      "attention_fwd",
      [](const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v, const HeadsArgument& o, uintptr_t lse,
         int64_t B, int64_t H, int64_t KV, int64_t T, int64_t D, float scale, int dtype, int num_threads) {
        launch(&Isa::attention, &AttentionKernels::forward,
               AttentionFwd{heads(q),
                            heads(k),
                            heads(v),
                            heads(o),
                            pointer<float>(lse),
                            {B, H, KV, T, D, scale, DType(dtype), num_threads}});
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("lse"), py::arg("B"), py::arg("H"),
      py::arg("KV"), py::arg("T"), py::arg("D"), py::arg("scale"), py::arg("dtype"), py::arg("num_threads"));

  m.def(
      "attention_bwd",
      [](const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v, const HeadsArgument& o,
         const HeadsArgument& dout, const HeadsArgument& dq, const HeadsArgument& dk, const HeadsArgument& dv,
         uintptr_t lse, int64_t B, int64_t H, int64_t KV, int64_t T, int64_t D, float scale, int dtype,
         int num_threads) {
        launch(&Isa::attention, &AttentionKernels::backward,
               AttentionBwd{heads(q),
                            heads(k),
                            heads(v),
                            heads(o),
                            heads(dout),
                            heads(dq),
                            heads(dk),
                            heads(dv),
                            pointer<float>(lse),
                            {B, H, KV, T, D, scale, DType(dtype), num_threads}});
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("dout"), py::arg("dq"),
      py::arg("dk"), py::arg("dv"), py::arg("lse"), py::arg("B"), py::arg("H"), py::arg("KV"), py::arg("T"),
      py::arg("D"), py::arg("scale"), py::arg("dtype"), py::arg("num_threads"));

  m.def(
      "adamw_step",
      [](const std::vector<uintptr_t>& param, const std::vector<uintptr_t>& grad, const std::vector<int>& grad_dtype,
         const std::vector<uintptr_t>& exp_avg, const std::vector<uintptr_t>& exp_avg_sq,
         const std::vector<uintptr_t>& step, const std::vector<uintptr_t>& master, const std::vector<int64_t>& numel,
         const std::vector<int>& param_dtype, const std::vector<int>& group,
         const std::vector<std::array<double, 5>>& settings, double max_grad_norm, uintptr_t grad_norm,
         int num_threads) {
        std::vector<AdamWTensor> tensors;
        for (size_t i = 0; i < param.size(); ++i)
          tensors.push_back({pointer(param[i]), pointer<float>(master.at(i)), pointer(grad.at(i)),
                             pointer<float>(exp_avg.at(i)), pointer<float>(exp_avg_sq.at(i)),
                             pointer<float>(step.at(i)), numel.at(i), DType(param_dtype.at(i)), DType(grad_dtype.at(i)),
                             group.at(i)});
        std::vector<AdamWGroup> groups;
        for (const auto& [lr, beta1, beta2, eps, weight_decay] : settings)
          groups.push_back({lr, beta1, beta2, eps, weight_decay});
        launch(&Isa::adamw, &AdamWKernels::step,
               AdamWStep{tensors.data(), int64_t(tensors.size()), groups.data(), max_grad_norm,
                         pointer<float>(grad_norm), num_threads});
      },
      py::kw_only(), py::arg("param"), py::arg("grad"), py::arg("grad_dtype"), py::arg("exp_avg"),
      py::arg("exp_avg_sq"), py::arg("step"), py::arg("master"), py::arg("numel"), py::arg("param_dtype"),
      py::arg("group"), py::arg("settings"), py::arg("max_grad_norm"), py::arg("grad_norm"), py::arg("num_threads"));
}
