// The emulator's machine: runs a kernel's grid on the CPU, each thread of a block as a fiber. What a kernel sees is in
// runtime.h (CUDA's names) and ptx.h (its instructions).
//
// Blocks run one after another, threads one at a time. A warp runs until it can go no further before the next one
// starts, and a lane until it waits for the others, so data that a barrier should protect are as early or as late as
// they can be: reversing or shuffling the order shows a missing one. Shared memory starts as 0xff bytes: a NaN in every
// floating-point type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The calling thread's place in the grid.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace lora_kernels::simt {

// Where in a kernel's source: the caller's line, if it is a function's default argument.
struct Site {
  const char* file;
  int line;
  const char* function;
  Site(const char* file = __builtin_FILE(), int line = __builtin_LINE(), const char* function = __builtin_FUNCTION())
      : file(file), line(line), function(function) {}
};

// Ends the launch: the message is prefixed by kernel, block and thread. Unwinds the calling thread.
[[noreturn]] void fail(const std::string& message, Site site);
// The same where no exception may pass: the calling thread just never goes on.
[[noreturn]] void stop(std::string message);

constexpr int kWarpSize = 32;
constexpr int kPoison = 0xff;  // every byte of shared memory that nobody has written yet

// An operation of a whole warp: of every lane in `mask`, the calling one included. The last to arrive runs it on what
// all of them brought (null for lanes outside the mask).
using WarpOp = void (*)(void* const (&arguments)[kWarpSize]);
void warp_collective(const char* name, WarpOp op, unsigned mask, void* argument, Site site);
int lane_index();

// Waits for every thread of the block; returns how many of them came with a true predicate.
int block_barrier(const char* name, bool predicate, Site site);

// See ptx.h. Until the wait, the destination holds 0xff bytes; nothing else may write to it meanwhile.
void async_copy16(void* smem, const void* gmem, bool valid, Site site);
void async_commit(Site site);
void async_wait(int groups_in_flight, Site site);

// Fails unless address is a multiple of alignment.
[[noreturn]] void fail_alignment(const char* what, size_t alignment, Site site);
inline void check_alignment(const void* address, size_t alignment, const char* what, Site site) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(address);
  asm("" : "+r"(bits));  // else the compiler takes the type's word for it
  if (bits % alignment) fail_alignment(what, alignment, site);
}
// Fails unless the 16 bytes at address are in the block's dynamic shared memory, and aligned.
void check_shared16(const void* address, const char* what, Site site);

void* dynamic_shared();

enum class Status { kSuccess, kInvalidLaunch, kFailed };
// Runs body(kernel, params) once for every thread of the grid. `name` is the kernel's in messages.
using Body = void (*)(const void* kernel, const void* params);
Status run_grid(const std::string& name, dim3 grid, dim3 block, size_t dynamic_smem, size_t dynamic_smem_limit,
                Body body, const void* kernel, const void* params);
// For launches that are refused before run_grid: sets last_error.
void refuse_launch(const std::string& message);
// What went wrong in the last launch that did not return kSuccess.
const std::string& last_error();

enum class Order : int { kForward = 0, kReversed = 1, kShuffled = 2 };
// The order of blocks, warps and lanes from now on. The environment variable LORA_KERNELS_SIMT_SCHEDULE (forward,
// reversed, or shuffled:SEED) sets it at the start.
void set_schedule(Order order, uint64_t seed);

// For tests of tests: barriers, __syncwarp and the commits and waits of cp.async on this line of this file (without its
// folder) do nothing. Line 0: none.
void set_skipped(const std::string& file, int line);
bool is_skipped(Site site);

// The most dynamic shared memory that a kernel may ask for. 99 KiB to begin with, what the smaller chips have.
void set_shared_memory_limit(size_t bytes);
size_t shared_memory_limit();

// For timing what queues them: launches do nothing from now on, or again something.
void set_idle(bool idle);
bool is_idle();

}  // namespace lora_kernels::simt
