#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <new>

#if defined(__x86_64__) && !defined(LK_SIMT_UCONTEXT)
// swapcontext makes a system call each time. This saves what the ABI says that a called function saves.
extern "C" void lk_simt_switch(void** saved_stack_pointer, void* stack_pointer);
asm(R"(
.text
.globl lk_simt_switch
.hidden lk_simt_switch
.type lk_simt_switch, @function
lk_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lk_simt_switch, .-lk_simt_switch
)");
#define LK_OWN_SWITCH 1
#endif

namespace lora_kernels::simt {
namespace {

#ifdef LK_ASAN
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

size_t page_bytes() {
  static const size_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

Fiber* current = nullptr;
void* scheduler_stack_pointer = nullptr;
#ifdef LK_ASAN
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif
#ifndef LK_OWN_SWITCH
ucontext_t scheduler_context;
#endif

}  // namespace

void Fiber::first() {
#ifdef LK_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  current->entry_();
  __builtin_unreachable();
}

// A page that can't be accessed lies below the stack.
Fiber::Fiber() {
  const size_t bytes = kStackBytes + page_bytes();
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<unsigned char*>(memory);
  mprotect(memory_, page_bytes(), PROT_NONE);
#ifndef LK_OWN_SWITCH
  stack_pointer_ = new ucontext_t;
#endif
}

Fiber::~Fiber() {
  munmap(memory_, kStackBytes + page_bytes());
#ifndef LK_OWN_SWITCH
  delete static_cast<ucontext_t*>(stack_pointer_);
#endif
}

const unsigned char* Fiber::stack_begin() const { return memory_ + page_bytes(); }
const unsigned char* Fiber::stack_end() const { return memory_ + page_bytes() + kStackBytes; }

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  unsigned char* bottom = memory_ + page_bytes();
#ifdef LK_ASAN
  __asan_unpoison_memory_region(bottom, kStackBytes);
  fake_stack_ = nullptr;
#endif
#ifdef LK_OWN_SWITCH
  // Six registers, the address that `ret` goes to, and a return address for it that nobody uses.
  void** top = reinterpret_cast<void**>(bottom + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&first);
  stack_pointer_ = top;
#else
  auto* context = static_cast<ucontext_t*>(stack_pointer_);
  getcontext(context);
  context->uc_stack.ss_sp = bottom;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, &first, 0);
#endif
}

void Fiber::resume() {
  current = this;
#ifdef LK_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, memory_ + page_bytes(), kStackBytes);
#endif
#ifdef LK_OWN_SWITCH
  lk_simt_switch(&scheduler_stack_pointer, stack_pointer_);
#else
  swapcontext(&scheduler_context, static_cast<ucontext_t*>(stack_pointer_));
#endif
#ifdef LK_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

void Fiber::suspend([[maybe_unused]] bool for_ever) {
  Fiber* self = current;
#ifdef LK_ASAN
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &self->fake_stack_, scheduler_stack, scheduler_stack_bytes);
#endif
#ifdef LK_OWN_SWITCH
  lk_simt_switch(&self->stack_pointer_, scheduler_stack_pointer);
#else
  swapcontext(static_cast<ucontext_t*>(self->stack_pointer_), &scheduler_context);
#endif
#ifdef LK_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack_, nullptr, nullptr);
#endif
}

}  // namespace lora_kernels::simt
