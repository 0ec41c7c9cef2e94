// Instructions that multiply bfloat16, which the builds for AVX-512 take where they are there.
#pragma once

// Compilers that bring these headers come with assemblers that know the instructions.
#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#define LK_HAS_AVX512_BF16
#endif
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxtileintrin.h>)
#define LK_HAS_AMX
#endif

namespace lora_kernels::cpu {

// Whether they were built in, this processor has them, and the system lets this process use their registers.
bool avx512_bf16_supported();
bool amx_supported();

}  // namespace lora_kernels::cpu
