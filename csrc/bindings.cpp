// lora_kernels._C: with tensor.h, places.h and triton/bindings.h all that knows Python. All checks are made in Python.
#include "triton/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <initializer_list>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/layers.h"
#include "cpu/threads.h"
#include "places.h"
#include "results.h"
#include "tensor.h"

namespace py = pybind11;
using lora_kernels::Result;
using lora_kernels::Results;
using lora_kernels::Tensor;
using namespace lora_kernels::cpu;

namespace {

struct Isas {
  const Isa* list[kMaxIsas];
  int count;
  std::atomic<const Isa*> current;
  Isas() : count(supported_isas(list)), current(list[0]) {}
};
Isas isas;

// Never freed, since it holds Python's objects.
Results& results = *new Results;

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

template <class Params>
void run(bool (*pass)(const Isa&, const Params&), const Params& params) {
  py::gil_scoped_release release;
  if (!pass(*isas.current.load(), params)) throw std::bad_alloc();
}

void check_layers(const std::vector<const Layer*>& layers, std::initializer_list<size_t> counts) {
  bool fits = !layers.empty() && layers.size() <= kMaxLayers;
  for (const size_t count : counts) fits = fits && count == layers.size();
  if (!fits) throw py::value_error("a pass takes 1 to " + std::to_string(kMaxLayers) + " layers with tensors for each");
}

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(const Tensor& t) { return t.dtype<DType>(); }

// [B, heads, T, D]
Heads heads(const Tensor& t) { return {t.data(), t.stride(0), t.stride(1), t.stride(2)}; }

AttentionShape attention_shape(const Tensor& q, const Tensor& k, float scale, int num_threads) {
  return {q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), scale, dtype_of(q), num_threads};
}

// rng is an int64 tensor of two, the seed and the offset, or None.
Dropout dropout(const Tensor& rng, uint32_t threshold) {
  const auto* state = rng.data<const uint64_t>();
  return state ? Dropout{state[0], state[1], threshold} : Dropout{0, 0, threshold};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of lora_kernels. Tensors in, nothing out; use lora_kernels.backends.cpu instead.";

  m.def("isa_supported", [] {
    py::list names;
    for (int i = 0; i < isas.count; ++i) names.append(isas.list[i]->name);
    return names;
  });
  m.def("get_isa", [] { return isas.current.load()->name; });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("spare_threads", &spare_threads, py::arg("enabled"));
  m.def("take_most_threads", &take_most_threads);

  Tensor::prepare();
  lora_kernels::define_places(m);
  lora_kernels::triton::define(m);

  m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
  m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);
  m.attr("FLOAT16") = static_cast<int>(DType::kFloat16);

  m.def(
      "column_scale_bwd",
      [](Tensor dy, Tensor y, Tensor bias, Tensor column_scale, Tensor dz, Tensor total, int num_threads) {
        launch(&Isa::lora_linear, &LoraLinearKernels::column_scale_bwd,
               ColumnScaleBwd{dy.data(), dy.stride(0), y.data(), y.is_none() ? 0 : y.stride(0), bias.data<float>(),
                              column_scale.data<float>(), dz.data(), dtype_of(dy), total.data<float>(), dy.size(0),
                              dy.size(1), num_threads});
      },
      py::kw_only(), py::arg("dy"), py::arg("y"), py::arg("bias"), py::arg("column_scale"), py::arg("dz"),
      py::arg("total"), py::arg("num_threads"));

  m.def(
      "nf4_quantize",
      [](Tensor weight, int64_t block_size, Tensor packed, Tensor absmax, int num_threads) {
        launch(&Isa::nf4, &Nf4Kernels::quantize,
               Nf4Quantize{weight.data(), dtype_of(weight), weight.numel(), block_size, packed.data<uint8_t>(),
                           absmax.data<float>(), num_threads});
      },
      py::kw_only(), py::arg("weight"), py::arg("block_size"), py::arg("packed"), py::arg("absmax"),
      py::arg("num_threads"));

  m.def(
      "nf4_quantize_absmax",
      [](Tensor absmax, float absmax_offset, Tensor absmax_code, Tensor codes, Tensor absmax_scale, int) {
        launch(&Isa::nf4, &Nf4Kernels::quantize_absmax,
               Nf4QuantizeAbsmax{absmax.data<float>(), absmax.numel(), absmax_offset, absmax_code.data<float>(),
                                 codes.data<uint8_t>(), absmax_scale.data<float>()});
      },
      py::kw_only(), py::arg("absmax"), py::arg("absmax_offset"), py::arg("absmax_code"), py::arg("codes"),
      py::arg("absmax_scale"), py::arg("num_threads"));

  // A view of tensors that must outlive it.
  py::class_<Weight>(m, "Weight")
      .def_static("nf4",
                  [](Tensor packed, Tensor absmax, Tensor absmax_scale, Tensor absmax_offset, int64_t block_size,
                     std::pair<int64_t, int64_t> shape, Tensor absmax_code) {
                    const auto [N, K] = shape;
                    const Nf4Weight nf4{packed.data<uint8_t>(),
                                        absmax.data(),
                                        absmax_scale.data<float>(),
                                        absmax_code.data<float>(),
                                        absmax_offset.data<float>(),
                                        block_size,
                                        N,
                                        K};
                    return Weight{nf4, nullptr, DType::kFloat32, 0, N, K};
                  })
      .def_static("dense", [](Tensor weight) {
        const bool turned = weight.size(1) > 1 && weight.stride(1) != 1;
        return Weight{
            {}, weight.data(), dtype_of(weight), weight.stride(turned ? 1 : 0), weight.size(0), weight.size(1), turned};
      });

  m.def(
      "nf4_dequantize",
      [](const Weight& weight, int64_t row_first, int64_t row_last, int64_t col_first, int64_t col_last, Tensor out,
         int num_threads) {
        launch(&Isa::nf4, &Nf4Kernels::dequantize,
               Nf4Dequantize{weight.nf4, row_first, row_last, col_first, col_last, out.data(), dtype_of(out),
                             out.stride(0), num_threads});
      },
      py::kw_only(), py::arg("weight"), py::arg("row_first"), py::arg("row_last"), py::arg("col_first"),
      py::arg("col_last"), py::arg("out"), py::arg("num_threads"));

  m.def(
      "take_large_results_from",
      [](py::object new_, int64_t bytes) { results.take_large_from(std::move(new_), bytes); }, py::arg("new"),
      py::arg("bytes"));
  m.attr("FEW_ROWS") = kFewRows;
  m.attr("MAX_LAYERS") = kMaxLayers;
  // A view of tensors that must outlive it and stay where they are.
  py::class_<Layer>(m, "Layer")
      .def(py::init([](const Weight& weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor bias, Tensor lora_e,
                       Tensor column_scale) {
        return Layer{weight,
                     lora_a.data(),
                     dtype_of(lora_a),
                     lora_b.data(),
                     dtype_of(lora_b),
                     scaling,
                     bias.data(),
                     lora_e.data(),
                     lora_e.is_none() ? DType::kFloat32 : dtype_of(lora_e),
                     column_scale.data<float>(),
                     lora_a.size(0)};
      }));

  // Arguments of the next two by position: their names would take as long as a small layer. x [M, K] and dy [M, N] have
  // contiguous rows. (y of each layer, h of each).
  m.def("layers_forward", [](const std::vector<const Layer*>& layers, Tensor x, bool in_bfloat16, Tensor rng,
                             uint32_t threshold, int num_threads) {
    check_layers(layers, {});
    LayersForward p{};
    p.count = (int)layers.size(), p.x = x.data(), p.x_dtype = dtype_of(x), p.ld_x = x.stride(0);
    p.M = x.size(0), p.K = layers[0]->weight.K;
    py::list ys(p.count), hs(p.count);
    for (int i = 0; i < p.count; ++i) {
      const Result y = results.of(p.x_dtype, p.M, layers[i]->weight.N),
                   h = results.of(DType::kFloat32, p.M, layers[i]->R);
      p.layers[i] = layers[i], p.y[i] = y.data, p.h[i] = static_cast<float*>(h.data);
      ys[i] = y.tensor, hs[i] = h.tensor;
    }
    p.product_dtype = in_bfloat16 ? DType::kBFloat16 : DType::kFloat32;
    p.dropout = dropout(rng, threshold), p.num_threads = num_threads;
    run(layers_forward, p);
    return py::make_tuple(ys, hs);
  });
  // needs: of each layer which of the gradients of lora_a, lora_b and lora_e are computed. (dx or None, those of each
  // layer or None).
  m.def("layers_backward",
        [](const std::vector<const Layer*>& layers, const std::vector<Tensor>& dy, const std::vector<Tensor>& h,
           Tensor x, bool need_x, const std::vector<std::array<bool, 3>>& needs, bool in_bfloat16, Tensor rng,
           uint32_t threshold, int num_threads) {
          check_layers(layers, {dy.size(), h.size(), needs.size()});
          LayersBackward p{};
          p.count = (int)layers.size(), p.x_dtype = dtype_of(dy[0]), p.M = dy[0].size(0), p.K = layers[0]->weight.K;
          bool reads_x = false;
          py::list gradients(p.count);
          for (int i = 0; i < p.count; ++i) {
            const Layer& layer = *layers[i];
            const int64_t N = layer.weight.N, R = layer.R;
            const auto [need_a, need_b, need_e] = needs[i];
            const Result a = need_a ? results.of(layer.lora_a_dtype, R, p.K) : Result(),
                         b = need_b ? results.of(layer.lora_b_dtype, N, R) : Result(),
                         e = need_e ? results.of(layer.lora_e_dtype, R) : Result();
            p.layers[i] = &layer, p.dy[i] = dy[i].data(), p.ld_dy[i] = dy[i].stride(0), p.h[i] = h[i].data<float>();
            p.dlora_a[i] = a.data, p.dlora_b[i] = b.data, p.dlora_e[i] = e.data;
            gradients[i] = py::make_tuple(a.tensor, b.tensor, e.tensor);
            reads_x |= need_a;
          }
          if (reads_x) p.x = x.data(), p.ld_x = x.stride(0);
          const Result dx = need_x ? results.of(p.x_dtype, p.M, p.K) : Result();
          p.dx = dx.data;
          p.product_dtype = in_bfloat16 ? DType::kBFloat16 : DType::kFloat32;
          p.dropout = dropout(rng, threshold), p.num_threads = num_threads;
          run(layers_backward, p);
          return py::make_tuple(dx.tensor, gradients);
        });

  m.def(
      "product",
      // A term: (weight, in, scale).
      [](const std::vector<std::tuple<Weight, Tensor, float>>& terms, bool transposed, Tensor column_scale, Tensor bias,
         Tensor out, int num_threads) {
        std::vector<ProductTerm> list;
        for (const auto& [weight, in, scale] : terms) list.push_back({weight, in.data(), in.stride(0), scale});
        const DType in_dtype = dtype_of(std::get<Tensor>(terms.at(0)));
        launch(
            &Isa::product, &ProductKernels::product,
            Product{list.data(), (int)list.size(), in_dtype, transposed, column_scale.data<float>(), bias.data<float>(),
                    out.data(), dtype_of(out), out.stride(0), out.size(0), out.size(1), num_threads});
      },
      py::kw_only(), py::arg("terms"), py::arg("transposed"), py::arg("column_scale"), py::arg("bias"), py::arg("out"),
      py::arg("num_threads"));

  m.def(
      "rms_norm_fwd",
      [](Tensor x, Tensor weight, float eps, float offset, Tensor y, Tensor rstd, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::rms_norm_fwd,
               RmsNormFwd{x.data(), weight.data(), eps, offset, y.data(), rstd.data<float>(), rstd.numel(),
                          weight.size(0), dtype_of(x), num_threads});
      },
      py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("offset"), py::arg("y"), py::arg("rstd"),
      py::arg("num_threads"));

  m.def(
      "rms_norm_bwd",
      [](Tensor dy, Tensor x, Tensor rstd, Tensor weight, float offset, Tensor dx, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::rms_norm_bwd,
               RmsNormBwd{dy.data(), x.data(), rstd.data<float>(), weight.data(), offset, dx.data(), rstd.numel(),
                          weight.size(0), dtype_of(x), num_threads});
      },
      py::kw_only(), py::arg("dy"), py::arg("x"), py::arg("rstd"), py::arg("weight"), py::arg("offset"), py::arg("dx"),
      py::arg("num_threads"));

  m.def(
      "swiglu_fwd",
      [](Tensor gate, Tensor up, Tensor y, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::swiglu_fwd,
               SwigluFwd{gate.data(), up.data(), y.data(), gate.numel(), dtype_of(gate), num_threads});
      },
      py::kw_only(), py::arg("gate"), py::arg("up"), py::arg("y"), py::arg("num_threads"));

  m.def(
      "swiglu_bwd",
      [](Tensor dy, Tensor gate, Tensor up, Tensor dgate, Tensor dup, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::swiglu_bwd,
               SwigluBwd{dy.data(), gate.data(), up.data(), dgate.data(), dup.data(), gate.numel(), dtype_of(gate),
                         num_threads});
      },
      py::kw_only(), py::arg("dy"), py::arg("gate"), py::arg("up"), py::arg("dgate"), py::arg("dup"),
      py::arg("num_threads"));

  m.def(
      "rotary",
      [](Tensor x, Tensor cos, Tensor sin, bool transposed, Tensor y, int num_threads) {
        const int64_t T = x.size(2), D = x.size(3);
        launch(&Isa::decoder, &DecoderKernels::rotary,
               Rotary{heads(x), heads(y), cos.data(), sin.data(), cos.size(0) == 1 ? 0 : T * D, transposed, x.size(0),
                      x.size(1), T, D, dtype_of(x), num_threads});
      },
      py::kw_only(), py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("transposed"), py::arg("y"),
      py::arg("num_threads"));

  m.def(
      "cross_entropy",
      [](Tensor logits, Tensor target, float scale, bool with_gradient, Tensor nll, int num_threads) {
        launch(&Isa::decoder, &DecoderKernels::cross_entropy,
               CrossEntropy{logits.data(), target.data<int64_t>(), scale, with_gradient, nll.data<float>(),
                            logits.size(0), logits.size(1), dtype_of(logits), num_threads});
      },
      py::kw_only(), py::arg("logits"), py::arg("target"), py::arg("scale"), py::arg("with_gradient"), py::arg("nll"),
      py::arg("num_threads"));

  m.def(
      "attention_fwd",
      [](Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, int num_threads) {
        launch(&Isa::attention, &AttentionKernels::forward,
               AttentionFwd{heads(q), heads(k), heads(v), heads(o), lse.data<float>(),
                            attention_shape(q, k, scale, num_threads)});
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("lse"), py::arg("scale"),
      py::arg("num_threads"));

  m.def(
      "attention_bwd",
      [](Tensor q, Tensor k, Tensor v, Tensor o, Tensor dout, Tensor dq, Tensor dk, Tensor dv, Tensor lse, float scale,
         int num_threads) {
        launch(&Isa::attention, &AttentionKernels::backward,
               AttentionBwd{heads(q), heads(k), heads(v), heads(o), heads(dout), heads(dq), heads(dk), heads(dv),
                            lse.data<float>(), attention_shape(q, k, scale, num_threads)});
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("dout"), py::arg("dq"),
      py::arg("dk"), py::arg("dv"), py::arg("lse"), py::arg("scale"), py::arg("num_threads"));

  m.def(
      "adamw_step",
      [](const std::vector<uintptr_t>& param, const std::vector<Tensor>& grad, const std::vector<uintptr_t>& exp_avg,
         const std::vector<uintptr_t>& exp_avg_sq, const std::vector<uintptr_t>& step,
         const std::vector<uintptr_t>& master, const std::vector<int64_t>& numel, const std::vector<int>& param_dtype,
         const std::vector<int>& group, const std::vector<std::array<double, 5>>& settings, double max_grad_norm,
         Tensor grad_norm, int num_threads) {
        std::vector<AdamWTensor> tensors;
        for (size_t i = 0; i < param.size(); ++i)
          tensors.push_back({pointer(param[i]), pointer<float>(master.at(i)), grad.at(i).data(),
                             pointer<float>(exp_avg.at(i)), pointer<float>(exp_avg_sq.at(i)),
                             pointer<float>(step.at(i)), numel.at(i), DType(param_dtype.at(i)), dtype_of(grad.at(i)),
                             group.at(i)});
        std::vector<AdamWGroup> groups;
        for (const auto& [lr, beta1, beta2, eps, weight_decay] : settings)
          groups.push_back({lr, beta1, beta2, eps, weight_decay});
        launch(&Isa::adamw, &AdamWKernels::step,
               AdamWStep{tensors.data(), int64_t(tensors.size()), groups.data(), max_grad_norm, grad_norm.data<float>(),
                         num_threads});
      },
      py::kw_only(), py::arg("param"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("step"),
      py::arg("master"), py::arg("numel"), py::arg("param_dtype"), py::arg("group"), py::arg("settings"),
      py::arg("max_grad_norm"), py::arg("grad_norm"), py::arg("num_threads"));
}
