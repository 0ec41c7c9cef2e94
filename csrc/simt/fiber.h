// Computations that can be suspended and resumed, all on one operating-system thread.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define LK_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LK_ASAN 1
#endif
#endif
#ifdef LK_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lora_kernels::simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry on an empty stack; what ran here before is forgotten. entry must not return: its last
  // act is suspend(true).
  void start(void (*entry)());
  // Runs this fiber until it suspends itself. Not to be called by a fiber.
  void resume();
  // Called by a fiber: continues after the resume() that started or continued it.
  static void suspend(bool for_ever = false);

  const unsigned char* stack_begin() const;
  const unsigned char* stack_end() const;

 private:
  static void first();

  unsigned char* memory_;
  void (*entry_)() = nullptr;
  void* stack_pointer_ = nullptr;  // where there is no own switch: a ucontext_t
  void* fake_stack_ = nullptr;     // AddressSanitizer's
};

}  // namespace lora_kernels::simt
