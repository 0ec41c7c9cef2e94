#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "memory.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace lora_kernels::simt {
namespace {

constexpr size_t kCopyBytes = 16;

struct Copy {
  unsigned char* smem;
  unsigned char data[kCopyBytes];
  int group;
  Site site;
  const void* pc;
};

enum class State { kReady, kAtBarrier, kInWarpOp, kExited };

struct Thread {
  Fiber fiber;
  dim3 index;
  int linear = 0;
  State state = State::kExited;
  // What it waits for.
  const char* name = nullptr;
  Site site;
  WarpOp op = nullptr;
  unsigned mask = 0;
  void* argument = nullptr;
  int predicate = 0;  // of a barrier; after it, how many were true

  std::vector<Copy> copies;  // in flight, oldest first
  int groups = 0;            // committed
};

std::string to_string(dim3 i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string to_string(Site site) {
  return std::string(site.function) + ", " + base_name(site.file) + ":" + std::to_string(site.line);
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}

struct Stop {};  // unwinds a thread that failed

struct Machine {
  Machine();

  std::mutex mutex;
  Order order = Order::kForward;
  uint64_t seed = 0;
  std::string skipped_file;
  int skipped_line = 0;
  std::string environment_error;
  size_t shared_memory_limit = 99 << 10;
  bool idle = false;
  std::string error;  // of the launch that runs or ran last; empty if none
  bool failed = false;

  std::string kernel;
  Body body = nullptr;
  const void* body_kernel = nullptr;
  const void* body_params = nullptr;
  std::unique_ptr<Thread[]> threads;
  int max_threads = 0;
  int num_threads = 0;
  int at_barrier = 0;
  std::vector<unsigned> in_warp_op;  // of each warp, the lanes in State::kInWarpOp
  Thread* current = nullptr;
  uint64_t random = 0;
  std::vector<int> warp_order, lane_order;

  unsigned char* smem = nullptr;
  size_t smem_bytes = 0;
};

Machine m;

Machine::Machine() {
  const char* text = std::getenv("LORA_KERNELS_SIMT_SCHEDULE");
  const std::string name = text ? text : "forward";
  if (name == "reversed") {
    order = Order::kReversed;
  } else if (name.rfind("shuffled:", 0) == 0) {
    order = Order::kShuffled;
    seed = std::strtoull(name.c_str() + 9, nullptr, 10);
  } else if (name != "forward") {
    environment_error = "LORA_KERNELS_SIMT_SCHEDULE is '" + name + "'; allowed: forward, reversed, shuffled:SEED";
  }
}

uint32_t next_random() {
  m.random = m.random * 6364136223846793005u + 1442695040888963407u;
  return m.random >> 33;
}

// Indices 0 .. count-1 in the schedule's order.
template <class Int>
void reorder(std::vector<Int>& order, size_t count) {
  order.resize(count);
  for (size_t i = 0; i < count; ++i) order[i] = m.order == Order::kReversed ? count - 1 - i : i;
  if (m.order == Order::kShuffled)
    for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

void record(const Thread& thread, const std::string& message) {
  m.failed = true;
  m.error = "kernel of " + m.kernel + ", block " + to_string(blockIdx) + ", thread " + to_string(thread.index) + ": " +
            message;
}

void suspend(Thread& thread, State state, const char* name, Site site) {
  thread.state = state;
  thread.name = name;
  thread.site = site;
  Fiber::suspend();
}

Thread& calling_thread(Site site) {
  Thread* thread = m.current;
  if (!thread) throw std::logic_error("a kernel's function was called outside a launch (" + to_string(site) + ")");
  return *thread;
}

// ---- asynchronous copies

// Of the 16 bytes of one copy.
void access(const void* address, bool store, const void* pc, Site site) {
  const std::string problem = memory_access(address, kCopyBytes, store, pc);
  if (!problem.empty()) fail(problem, site);
}

void finish_copies(Thread& thread, int groups_in_flight) {
  size_t done = 0;
  for (; done < thread.copies.size() && thread.copies[done].group < thread.groups - groups_in_flight; ++done) {
    const Copy& copy = thread.copies[done];
    for (size_t i = 0; i < kCopyBytes; ++i)
      if (copy.smem[i] != kPoison)
        fail("the destination of this cp.async was written, by a store or another one, while it was in flight",
             copy.site);
    memory_in_flight(copy.smem, kCopyBytes, false);
    access(copy.smem, true, copy.pc, copy.site);
    std::memcpy(copy.smem, copy.data, kCopyBytes);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
}

// ---- one block

void run_thread() {
  Thread& thread = *m.current;
  try {
    running.in_kernel = true;
    m.body(m.body_kernel, m.body_params);
    running.in_kernel = false;
    ++thread.groups;  // copies that were never committed or waited for do arrive some time
    finish_copies(thread, 0);
  } catch (const Stop&) {
    running.in_kernel = false;
  }
  thread.state = State::kExited;
  Fiber::suspend(true);
}

void resume(Thread& thread) {
  m.current = &thread;
  threadIdx = thread.index;
  running.thread = thread.linear;
  running.warp = thread.linear / kWarpSize;
  running.stack_begin = thread.fiber.stack_begin();
  running.stack_end = thread.fiber.stack_end();
  thread.fiber.resume();
  m.current = nullptr;
}

// Until every lane waits for another warp or has exited. Shuffled, it may stop earlier.
bool run_warp(int warp) {
  const int first = warp * kWarpSize, lanes = std::min(kWarpSize, m.num_threads - first);
  bool any = false;
  for (bool progress = true; progress;) {
    progress = false;
    reorder(m.lane_order, lanes);
    for (int lane : m.lane_order) {
      Thread& thread = m.threads[first + lane];
      if (thread.state != State::kReady) continue;
      resume(thread);
      if (m.failed) return true;
      progress = any = true;
    }
    if (m.order == Order::kShuffled && next_random() % 4 == 0) break;
  }
  return any;
}

// Some thread waits for what can't happen: say for what, and because of whom.
void record_deadlock() {
  Thread* waiting = nullptr;
  for (int i = 0; i < m.num_threads; ++i) {
    Thread& thread = m.threads[i];
    if (thread.state != State::kExited && (!waiting || thread.state == State::kInWarpOp)) waiting = &thread;
    if (waiting && waiting->state == State::kInWarpOp) break;
  }
  std::string message = "waits for ever in " + std::string(waiting->name) + ": ";
  const bool barrier = waiting->state == State::kAtBarrier;
  const int first = barrier ? 0 : waiting->linear / kWarpSize * kWarpSize;
  const int count = barrier ? m.num_threads : kWarpSize;
  for (int i = 0; i < count; ++i) {
    if (!barrier && !(waiting->mask >> i & 1)) continue;
    if (first + i >= m.num_threads) {
      message += "lane " + std::to_string(i) + " of its mask does not exist";
      break;
    }
    const Thread& other = m.threads[first + i];
    if (other.state == State::kExited) {
      message += "thread " + to_string(other.index) + " has exited";
      break;
    }
    if (barrier ? other.state != State::kAtBarrier
                : other.op != waiting->op || other.mask != waiting->mask || !same(other.site, waiting->site) ||
                      other.state != State::kInWarpOp) {
      message += "thread " + to_string(other.index) + " waits in " + other.name + " (" + to_string(other.site) + ")";
      break;
    }
  }
  record(*waiting, message + " (" + to_string(waiting->site) + ")");
}

void run_block() {
  unsigned char* const begin = m.smem - kGuardBytes;
  unsigned char* const end = m.smem + m.smem_bytes;
  std::memset(begin, kPoison, m.smem_bytes + 2 * kGuardBytes);
#ifdef LK_ASAN
  __asan_poison_memory_region(begin, kGuardBytes);
  __asan_poison_memory_region(end, kGuardBytes);
#endif
  memory_start_block(m.smem, m.smem_bytes);
  m.at_barrier = 0;
  m.in_warp_op.assign((m.num_threads + kWarpSize - 1) / kWarpSize, 0);
  for (int i = 0; i < m.num_threads; ++i) {
    Thread& thread = m.threads[i];
    thread.linear = i;
    thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    thread.state = State::kReady;
    thread.copies.clear();
    thread.groups = 0;
    thread.fiber.start(&run_thread);
  }
  for (bool progress = true; progress;) {
    progress = false;
    reorder(m.warp_order, m.in_warp_op.size());
    for (int warp : m.warp_order) {
      progress |= run_warp(warp);
      if (m.failed) return;
    }
  }
  for (int i = 0; i < m.num_threads; ++i)
    if (m.threads[i].state != State::kExited) return record_deadlock();
#ifdef LK_ASAN
  __asan_unpoison_memory_region(begin, kGuardBytes);
  __asan_unpoison_memory_region(end, kGuardBytes);
#endif
  for (size_t i = 0; i < kGuardBytes; ++i)
    if (begin[i] != kPoison || end[i] != kPoison)
      return record(m.threads[0], "some thread wrote beyond the block's " + std::to_string(m.smem_bytes) +
                                      " bytes of dynamic shared memory");
}

}  // namespace

void fail(const std::string& message, Site site) {
  const OutsideKernel outside;
  record(calling_thread(site), message + " (" + to_string(site) + ")");
  throw Stop();
}

void stop(std::string message) {
  record(*m.current, message);
  message = std::string();
  Fiber::suspend(true);
  std::abort();
}

void warp_collective(const char* name, WarpOp op, unsigned mask, void* argument, Site site) {
  const OutsideKernel outside;
  Thread& self = calling_thread(site);
  const int lane = self.linear % kWarpSize;
  if (!(mask >> lane & 1)) fail(std::string(name) + ": the calling lane is not in its own mask", site);
  self.op = op;
  self.mask = mask;
  self.argument = argument;

  unsigned& waiting = m.in_warp_op[self.linear / kWarpSize];
  bool all_here = !(mask & ~(waiting | 1u << lane));
  Thread* const warp = &self - lane;
  void* arguments[kWarpSize] = {};
  for (int i = 0; all_here && i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    arguments[i] = warp[i].argument;
    all_here = warp[i].op == op && warp[i].mask == mask && (i == lane || same(warp[i].site, site));
  }
  if (!all_here) {
    waiting |= 1u << lane;
    return suspend(self, State::kInWarpOp, name, site);
  }
  op(arguments);
  waiting &= ~mask;
  for (int i = 0; i < kWarpSize; ++i)
    if (mask >> i & 1) warp[i].state = State::kReady;
}

int lane_index() { return calling_thread({}).linear % kWarpSize; }

int block_barrier(const char* name, bool predicate, Site site) {
  const OutsideKernel outside;
  Thread& self = calling_thread(site);
  self.predicate = predicate;
  if (is_skipped(site)) return predicate;
  if (++m.at_barrier < m.num_threads) {
    suspend(self, State::kAtBarrier, name, site);
    return self.predicate;
  }
  int count = 0;
  for (int i = 0; i < m.num_threads; ++i) {
    Thread& other = m.threads[i];
    count += other.predicate;
    if (&other != &self && !same(other.site, site))
      fail(std::string(name) + ": thread " + to_string(other.index) + " waits at another barrier, " + other.name +
               " (" + to_string(other.site) + ")",
           site);
  }
  for (int i = 0; i < m.num_threads; ++i) {
    m.threads[i].predicate = count;
    m.threads[i].state = State::kReady;
  }
  m.at_barrier = 0;
  memory_block_synchronised();
  return count;
}

void fail_alignment(const char* what, size_t alignment, Site site) {
  const OutsideKernel outside;
  fail(std::string(what) + ": the address is not a multiple of " + std::to_string(alignment), site);
}

void check_shared16(const void* address, const char* what, Site site) {
  const OutsideKernel outside;
  check_alignment(address, 16, what, site);
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - m.smem;
  if (offset < 0 || offset + 16 > ptrdiff_t(m.smem_bytes))
    fail(std::string(what) + ": the address is " + std::to_string(offset) + " bytes from the start of " +
             std::to_string(m.smem_bytes) + " bytes of dynamic shared memory",
         site);
}

void async_copy16(void* smem, const void* gmem, bool valid, Site site) {
  const OutsideKernel outside;
  Thread& self = calling_thread(site);
  check_shared16(smem, "cp.async destination", site);
  const void* pc = __builtin_return_address(0);
  Copy copy{static_cast<unsigned char*>(smem), {}, self.groups, site, pc};
  if (valid) {
    check_alignment(gmem, kCopyBytes, "cp.async source", site);
    access(gmem, false, pc, site);
    std::memcpy(copy.data, gmem, kCopyBytes);
  }
  access(smem, true, pc, site);
  memory_in_flight(smem, kCopyBytes, true);
  std::memset(smem, kPoison, kCopyBytes);
  self.copies.push_back(copy);
}

void async_commit(Site site) {
  if (!is_skipped(site)) ++calling_thread(site).groups;
}

void async_wait(int groups_in_flight, Site site) {
  const OutsideKernel outside;
  if (!is_skipped(site)) finish_copies(calling_thread(site), groups_in_flight);
}

void* dynamic_shared() { return m.smem; }

Status run_grid(const std::string& name, dim3 grid, dim3 block, size_t dynamic_smem, size_t dynamic_smem_limit,
                Body body, const void* kernel, const void* params) {
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.failed = false;
  m.kernel = name;
  const auto refuse = [&](const std::string& message) {
    m.error = "kernel of " + name + ", grid " + to_string(grid) + ", block " + to_string(block) + ": " + message;
    return Status::kInvalidLaunch;
  };
  if (!m.environment_error.empty()) return refuse(m.environment_error);
  if (dynamic_smem > dynamic_smem_limit)
    return refuse(std::to_string(dynamic_smem) +
                  " bytes of dynamic shared memory; allowed: " + std::to_string(dynamic_smem_limit));
  const uint64_t num_threads = uint64_t(block.x) * block.y * block.z;
  if (num_threads < 1 || num_threads > 1024 || block.z > 64)
    return refuse("a block has 1 to 1024 threads, at most 64 in z");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return refuse("a grid has at least 1 block in each direction, and at most 65535 in y and z");

  void* memory = nullptr;
  if (posix_memalign(&memory, 128, dynamic_smem + 2 * kGuardBytes)) throw std::bad_alloc();
  const std::unique_ptr<void, void (*)(void*)> owner(memory, &std::free);
  m.smem = static_cast<unsigned char*>(memory) + kGuardBytes;
  m.smem_bytes = dynamic_smem;
  m.body = body;
  m.body_kernel = kernel;
  m.body_params = params;
  m.num_threads = num_threads;
  if (m.max_threads < m.num_threads) {
    m.threads.reset(new Thread[m.num_threads]);
    m.max_threads = m.num_threads;
  }
  m.random = m.seed;
  gridDim = grid;
  blockDim = block;

  memory_start_launch();
  std::vector<uint64_t> blocks;
  reorder(blocks, uint64_t(grid.x) * grid.y * grid.z);
  for (uint64_t i : blocks) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / (uint64_t(grid.x) * grid.y));
    running.block = i;
    run_block();
    if (m.failed) return Status::kFailed;
  }
  memory_end_launch(name);
  return Status::kSuccess;
}

void refuse_launch(const std::string& message) { m.error = message; }
const std::string& last_error() { return m.error; }

void set_schedule(Order order, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.order = order;
  m.seed = seed;
}

void set_skipped(const std::string& file, int line) {
  m.skipped_file = file;
  m.skipped_line = line;
}

bool is_skipped(Site site) { return site.line == m.skipped_line && m.skipped_file == base_name(site.file); }

void set_shared_memory_limit(size_t bytes) { m.shared_memory_limit = bytes; }

void set_idle(bool idle) { m.idle = idle; }
bool is_idle() { return m.idle; }
size_t shared_memory_limit() { return m.shared_memory_limit; }

}  // namespace lora_kernels::simt
