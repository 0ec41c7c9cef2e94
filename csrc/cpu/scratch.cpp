#include "scratch.h"

#include <cstdlib>

namespace lora_kernels::cpu {
namespace {

// A buffer larger than this is not kept.
constexpr int64_t kMostKept = 64 << 20;

// One block, of which what is in use is the beginning. What did not fit it is allocated by itself; the next time that
// nothing is in use, the block is made as large as all of it together.
struct Arena {
  char* data = nullptr;
  int64_t size = 0, used = 0;
  int64_t taken = 0, most_taken = 0;
  ~Arena() { free(data); }
};
thread_local Arena arena;

int64_t bytes_of(int64_t floats) { return (floats * (int64_t)sizeof(float) + 127) / 64 * 64; }

}  // namespace

float* take_scratch(int64_t floats) {
  const int64_t bytes = bytes_of(floats);
  if (bytes > kMostKept) return (float*)aligned_alloc(64, bytes);
  if (arena.taken == 0 && arena.size < arena.most_taken) {
    free(arena.data);
    arena.data = (char*)aligned_alloc(64, arena.most_taken);
    arena.size = arena.data ? arena.most_taken : 0;
  }
  arena.taken += bytes;
  if (arena.taken > arena.most_taken) arena.most_taken = arena.taken;
  if (arena.used + bytes > arena.size) return (float*)aligned_alloc(64, bytes);
  float* const scratch = (float*)(arena.data + arena.used);
  arena.used += bytes;
  return scratch;
}

void give_scratch(float* scratch, int64_t floats) {
  const int64_t bytes = bytes_of(floats);
  if (bytes > kMostKept) return free(scratch);
  arena.taken -= bytes;
  if ((char*)scratch >= arena.data && (char*)scratch < arena.data + arena.size)
    arena.used -= bytes;
  else
    free(scratch);
}

}  // namespace lora_kernels::cpu
