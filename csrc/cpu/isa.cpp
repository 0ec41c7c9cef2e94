#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lora_kernels::cpu {

// *_kernels.cpp is compiled once per instruction set and names its table <op>_<isa>.
#define LK_ISA_TABLE(isa)                                                            \
  extern const AdamWKernels adamw_##isa;                                             \
  extern const AttentionKernels attention_##isa;                                     \
  extern const DecoderKernels decoder_##isa;                                         \
  extern const FewRowsKernels few_rows_##isa;                                        \
  extern const LoraLinearKernels lora_linear_##isa;                                  \
  extern const Nf4Kernels nf4_##isa;                                                 \
  extern const ProductKernels product_##isa;                                         \
  static const Isa isa_##isa = {#isa,           &adamw_##isa,    &attention_##isa,   \
                                &decoder_##isa, &few_rows_##isa, &lora_linear_##isa, \
                                &nf4_##isa,     &product_##isa};

LK_ISA_TABLE(generic)
#if defined(__x86_64__)
LK_ISA_TABLE(avx2)
LK_ISA_TABLE(avx512)
#if defined(LK_HAS_AVX2_WIDE)
LK_ISA_TABLE(avx2_wide)
#endif

static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

int supported_isas(const Isa** out) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    out[count++] = &isa_avx512;
  if (avx2) out[count++] = &isa_avx2;
#endif
  out[count++] = &isa_generic;
#if defined(LK_HAS_AVX2_WIDE)
  if (avx2) out[count++] = &isa_avx2_wide;
#endif
  return count;
}

}  // namespace lora_kernels::cpu
