// Whether AMX, Intel's instructions for products of bfloat16 matrices, is there and to be used.
#pragma once

// Compilers that bring this header come with assemblers that know the instructions.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxtileintrin.h>)
#define LK_HAS_AMX
#endif

namespace lora_kernels::cpu {

// Whether it was built in, this processor has AMX-BF16, and the system lets this process use it.
bool amx_supported();
// Whether kernels use it: where it is supported, unless it was switched off.
bool amx_enabled();
// Returns false, and does nothing, where it can't be switched on.
bool enable_amx(bool enabled);

}  // namespace lora_kernels::cpu
