#include "bfloat16.h"

#if defined(LK_HAS_AVX512_BF16) || defined(LK_HAS_AMX)
#include <cpuid.h>
#endif
#if defined(LK_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lora_kernels::cpu {

bool avx512_bf16_supported() {
#if defined(LK_HAS_AVX512_BF16)
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
#else
  return false;
#endif
}

bool amx_supported() {
#if defined(LK_HAS_AMX)
  // AMX-BF16 and AMX-TILE; their registers, which the system must know; and its leave for this process to use them
  // (Linux, Documentation/arch/x86/xstate.rst).
  constexpr unsigned kInstructions = 1u << 22 | 1u << 24, kRegisters = 1u << 17 | 1u << 18;
  constexpr int kGetPermissions = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kInstructions) != kInstructions) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kRegisters) != kRegisters) return false;
  syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  unsigned long permissions = 0;
  return syscall(SYS_arch_prctl, kGetPermissions, &permissions) == 0 && permissions >> kTileData & 1;
#else
  return false;
#endif
}

}  // namespace lora_kernels::cpu
