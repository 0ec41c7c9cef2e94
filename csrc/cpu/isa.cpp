#include "isa.h"

#include "bfloat16.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lora_kernels::cpu {

// *_kernels.cpp is compiled once per instruction set and names its table <op>_<isa>. An extension of AVX-512 has a
// table of products of its own.
#define LK_ISA_TABLE(isa, kernels)                      \
  extern const ProductKernels product_##isa;            \
  static const Isa isa_##isa = {#isa,                   \
                                &adamw_##kernels,       \
                                &attention_##kernels,   \
                                &decoder_##kernels,     \
                                &few_rows_##kernels,    \
                                &lora_linear_##kernels, \
                                &nf4_##kernels,         \
                                &product_##isa};
#define LK_ISA_BUILD(isa)                           \
  extern const AdamWKernels adamw_##isa;            \
  extern const AttentionKernels attention_##isa;    \
  extern const DecoderKernels decoder_##isa;        \
  extern const FewRowsKernels few_rows_##isa;       \
  extern const LoraLinearKernels lora_linear_##isa; \
  extern const Nf4Kernels nf4_##isa;                \
  LK_ISA_TABLE(isa, isa)

LK_ISA_BUILD(generic)
#if defined(__x86_64__)
LK_ISA_BUILD(avx2)
LK_ISA_BUILD(avx512)
#if defined(LK_HAS_AVX512_BF16)
LK_ISA_TABLE(avx512_bf16, avx512)
#endif
#if defined(LK_HAS_AMX)
LK_ISA_TABLE(avx512_amx, avx512)
#endif
#if defined(LK_HAS_AVX2_WIDE)
LK_ISA_BUILD(avx2_wide)
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
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(LK_HAS_AMX)
    if (amx_supported()) out[count++] = &isa_avx512_amx;
#endif
#if defined(LK_HAS_AVX512_BF16)
    if (avx512_bf16_supported()) out[count++] = &isa_avx512_bf16;
#endif
    out[count++] = &isa_avx512;
  }
  if (avx2) out[count++] = &isa_avx2;
#endif
  out[count++] = &isa_generic;
#if defined(LK_HAS_AVX2_WIDE)
  if (avx2) out[count++] = &isa_avx2_wide;
#endif
  return count;
}

}  // namespace lora_kernels::cpu
