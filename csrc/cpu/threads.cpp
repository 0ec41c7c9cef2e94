#include "threads.h"

#include <algorithm>
#include <atomic>

namespace lora_kernels::cpu {
namespace {

std::atomic<bool> spare{true};
std::atomic<int> most{0};

}  // namespace

int thread_count(int requested, int64_t parts, int64_t work, int64_t min_work) {
  int64_t threads = std::min<int64_t>(requested, parts);
  if (spare) threads = std::min(threads, work / min_work);
  threads = std::max<int64_t>(threads, 1);
  for (int seen = most; seen < threads && !most.compare_exchange_weak(seen, (int)threads);) {
  }
  return (int)threads;
}

void spare_threads(bool enabled) { spare = enabled; }

int take_most_threads() { return most.exchange(0); }

}  // namespace lora_kernels::cpu
