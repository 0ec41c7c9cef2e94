// Which builds of lora_linear_kernels.cpp this processor can run.
#include "lora_linear.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lora_kernels::cpu {

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx2_wide;
extern const Kernels kernels_avx512;

static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

int supported_isas(const Kernels** out) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    out[count++] = &kernels_avx512;
  if (avx2) out[count++] = &kernels_avx2;
#endif
  out[count++] = &kernels_generic;
#if defined(__x86_64__)
  if (avx2) out[count++] = &kernels_avx2_wide;
#endif
  return count;
}

}  // namespace lora_kernels::cpu
