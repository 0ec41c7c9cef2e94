// What the kernels load and store: finds data races, and counts the bytes. GCC and Clang call __tsan_read4(address) and
// so on at every access in code that is compiled with -fsanitize=thread; memory.cpp defines those functions, so
// ThreadSanitizer itself is not linked. Without that flag only cp.async and ldmatrix are seen.
//
// A data race is two accesses, at least one of them a store, by two threads that nothing orders, in whatever order they
// ran:
// - to shared memory, between two barriers of the block, and in the same warp between two __syncwarp;
// - to global memory, by two blocks, unless the kernel uses atomics or __threadfence to order them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lora_kernels::simt {

// Who runs. in_kernel: accesses are the kernel's, and not the emulator's for it.
struct Running {
  bool in_kernel;
  int thread, warp;
  uint32_t block;
  const unsigned char *stack_begin, *stack_end;
};
extern Running running;

// In functions that a kernel calls: templates of the standard library may be linked in the form that was compiled for a
// kernel.
struct OutsideKernel {
  const bool before = running.in_kernel;
  OutsideKernel() { running.in_kernel = false; }
  ~OutsideKernel() { running.in_kernel = before; }
};

// The global memory that the launches from now on may access; if none is named, all of it.
struct Buffer {
  std::string name;
  uintptr_t address;
  size_t bytes;
  // The kernel before may still write it: a thread has to wait for that one first.
  bool is_late = false;
};
void memory_set_buffers(std::vector<Buffer> allowed);

void memory_start_launch();
// What lies up to kGuardBytes before and after smem belongs to nobody.
constexpr size_t kGuardBytes = 1024;
void memory_start_block(unsigned char* smem, size_t smem_bytes);
void memory_block_synchronised();
void memory_previous_kernel_finished();  // as the calling thread knows now
void memory_warp_synchronised();
// From the start to the end of a cp.async nothing may access its destination.
void memory_in_flight(const void* smem, size_t bytes, bool in_flight);
// Of a launch with fences or atomics: how its blocks are ordered is not followed.
void memory_blocks_ordered();
void memory_atomic(const void* address, size_t bytes);

// Of the calling thread, at code address pc. Returns what is wrong, with the other access, or nothing.
std::string memory_access(const void* address, size_t bytes, bool store, const void* pc);

struct Traffic {
  std::string kernel;
  uint64_t loaded, stored;  // distinct bytes of global memory
};
void memory_end_launch(const std::string& kernel);
// What was recorded since the last call with start = true; start = false ends recording.
std::vector<Traffic> take_traffic(bool start);

}  // namespace lora_kernels::simt
