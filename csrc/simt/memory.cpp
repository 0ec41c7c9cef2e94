#include "memory.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdio>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>

#include "engine.h"

namespace lora_kernels::simt {

Running running;

namespace {

constexpr int kSeveral = -1;
constexpr size_t kPageBytes = 4096;

// The latest load, or store, of one byte of shared memory; of loads since the last barrier, all of them.
struct Access {
  uint64_t epoch = 0;  // 0: none
  uint64_t warp_epoch = 0;
  int thread = 0, warp = 0;
  const void* pc = nullptr;
};

struct SharedByte {
  Access load, store;
  bool in_flight = false;  // a cp.async will write it
};

struct Page {
  std::bitset<kPageBytes> loaded, stored;
  std::array<int32_t, kPageBytes> loaded_by, stored_by;  // block, where loaded or stored
};

unsigned char* shared = nullptr;
size_t shared_bytes = 0;
std::vector<SharedByte> shared_state;
uint64_t epoch = 1;                   // barriers of all blocks so far
std::array<uint64_t, 32> warp_epoch;  // __syncwarp so far, of each warp
bool blocks_ordered = false;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t latest_page_number = 0;
Page* latest_page = nullptr;

std::vector<Buffer> buffers;  // empty: all of memory
std::bitset<1024> waited;     // threads of the block, for the previous kernel

bool recording = false;
std::vector<Traffic> recorded;

// This library or program, whose own data are constants.
struct Module {
  const unsigned char *begin = nullptr, *end = nullptr;
  Module();
};

Module::Module() {
  const auto visit = [](dl_phdr_info* info, size_t, void* result) {
    const auto* here = reinterpret_cast<const unsigned char*>(&memory_start_launch);
    const unsigned char *begin = nullptr, *end = nullptr;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const ElfW(Phdr) & header = info->dlpi_phdr[i];
      if (header.p_type != PT_LOAD) continue;
      const auto* start = reinterpret_cast<const unsigned char*>(info->dlpi_addr + header.p_vaddr);
      if (!begin) begin = start;
      end = start + header.p_memsz;
    }
    if (here < begin || here >= end) return 0;
    static_cast<Module*>(result)->begin = begin;
    static_cast<Module*>(result)->end = end;
    return 1;
  };
  dl_iterate_phdr(+visit, this);
}

const Module module;

// The kernel's file:line where addr2line and debugging information are at hand, else the place in the binary.
std::string describe(const void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info)) return "unknown place";
  char where[32];
  const ptrdiff_t offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(where, sizeof(where), "0x%zx", size_t(offset));
  std::string text = std::string(info.dli_fname) + "+" + where;
  const std::string command = "addr2line -s -i -e '" + std::string(info.dli_fname) + "' " + where + " 2>/dev/null";
  if (FILE* pipe = popen(command.c_str(), "r")) {
    // Innermost first: the functions of this directory's headers were inlined into the kernel.
    for (char line[1024]; std::fgets(line, sizeof(line), pipe);) {
      if (line[0] == '?') break;
      text = line;
      if (!std::strstr(line, ".h:")) break;
    }
    pclose(pipe);
  }
  return text.substr(0, text.find_first_of(" \n"));
}

// Whether nothing orders `before`, of another thread, and what the calling thread does now.
bool races(const Access& before) {
  if (before.epoch != epoch || before.thread == running.thread) return false;
  return before.warp != running.warp || before.warp_epoch == warp_epoch[running.warp];
}

void remember(Access& access, const void* pc, bool store) {
  Access now{epoch, warp_epoch[running.warp], running.thread, running.warp, pc};
  if (!store && access.epoch == epoch) {
    if (access.warp != running.warp) {
      now.warp = now.thread = kSeveral;
    } else if (access.warp_epoch == now.warp_epoch && access.thread != running.thread) {
      now.thread = kSeveral;
    }
  }
  access = now;
}

std::string describe_race(const std::string& memory, bool store, const char* other, const std::string& who,
                          const void* pc, const void* other_pc) {
  return "data race on " + memory + ": " + (store ? "this store (" : "this load (") + describe(pc) + ") and a " +
         other + " by " + who + (other_pc ? " (" + describe(other_pc) + ")" : "");
}

std::string who(const Access& access) {
  return access.thread == kSeveral ? "several threads, one of them" : "thread " + std::to_string(access.thread);
}

std::string shared_access(ptrdiff_t offset, size_t bytes, bool store, const void* pc) {
  const auto outside = [](ptrdiff_t i) { return i < 0 || i >= ptrdiff_t(shared_bytes); };
  for (ptrdiff_t i = offset; i < offset + ptrdiff_t(bytes); ++i) {
    if (outside(i))
      return std::string(store ? "a store to" : "a load of") + " byte " + std::to_string(i) + " of " +
             std::to_string(shared_bytes) + " bytes of dynamic shared memory (" + describe(pc) + ")";
    SharedByte& byte = shared_state[i];
    if (byte.in_flight)
      return std::string(store ? "a store to" : "a load of") + " byte " + std::to_string(i) +
             " of dynamic shared memory, which a cp.async is still to write (" + describe(pc) + ")";
    for (const Access* before : {&byte.store, &byte.load})
      if ((store || before == &byte.store) && races(*before))
        return describe_race("byte " + std::to_string(i) + " of dynamic shared memory", store,
                             before == &byte.store ? "store" : "load", who(*before), pc, before->pc);
    remember(store ? byte.store : byte.load, pc, store);
  }
  return "";
}

Page& page_of(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  if (number != latest_page_number || !latest_page) {
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    latest_page_number = number;
    latest_page = page.get();
  }
  return *latest_page;
}

// "byte 12 of x" where x is the nearest buffer, before or after it.
std::string describe_global(uintptr_t address) {
  const auto distance = [&](const Buffer& buffer) {
    return address < buffer.address ? buffer.address - address
                                    : address - std::min(address, buffer.address + buffer.bytes);
  };
  const auto nearest = std::min_element(buffers.begin(), buffers.end(),
                                        [&](const Buffer& a, const Buffer& b) { return distance(a) < distance(b); });
  if (nearest == buffers.end()) return "address " + std::to_string(address);
  return "byte " + std::to_string(ptrdiff_t(address - nearest->address)) + " of " + nearest->name + ", which has " +
         std::to_string(nearest->bytes) + " bytes";
}

const Buffer* buffer_of(uintptr_t address, size_t bytes) {
  for (const Buffer& buffer : buffers)
    if (address - buffer.address < buffer.bytes && address + bytes <= buffer.address + buffer.bytes) return &buffer;
  return nullptr;
}

std::string global_access(uintptr_t address, size_t bytes, bool store, const void* pc) {
  const Buffer* buffer = buffer_of(address, bytes);
  const auto problem = [&](const char* rest) {
    return (store ? "a store to " : "a load of ") + std::to_string(bytes) + " bytes from " + describe_global(address) +
           rest + " (" + describe(pc) + ")";
  };
  if (buffer == nullptr && !buffers.empty()) return problem("");
  if (buffer != nullptr && buffer->is_late && !waited[running.thread])
    return problem(", before wait_for_previous_kernel");
  const auto block = int32_t(running.block);
  for (uintptr_t a = address; a < address + bytes; ++a) {
    Page& page = page_of(a);
    const size_t i = a % kPageBytes;
    const auto race = [&](const char* other, int32_t by) {
      const std::string who = by == kSeveral ? "several blocks" : "block " + std::to_string(by);
      return describe_race(describe_global(a), store, other, who, pc, nullptr);
    };
    if (!blocks_ordered) {
      if (page.stored[i] && page.stored_by[i] != block) return race("store", page.stored_by[i]);
      if (store && page.loaded[i] && page.loaded_by[i] != block) return race("load", page.loaded_by[i]);
    }
    if (store) {
      page.stored[i] = true;
      page.stored_by[i] = block;
    } else {
      page.loaded_by[i] = page.loaded[i] && page.loaded_by[i] != block ? kSeveral : block;
      page.loaded[i] = true;
    }
  }
  return "";
}

}  // namespace

void memory_start_launch() {
  blocks_ordered = false;
  pages.clear();
  latest_page = nullptr;
  shared_state.clear();
}

void memory_set_buffers(std::vector<Buffer> allowed) { buffers = std::move(allowed); }

void memory_start_block(unsigned char* smem, size_t smem_bytes) {
  shared = smem;
  shared_bytes = smem_bytes;
  shared_state.resize(smem_bytes);
  waited.reset();
  ++epoch;
}

void memory_in_flight(const void* smem, size_t bytes, bool in_flight) {
  const size_t offset = static_cast<const unsigned char*>(smem) - shared;
  for (size_t i = offset; i < offset + bytes; ++i) shared_state[i].in_flight = in_flight;
}

void memory_block_synchronised() { ++epoch; }
void memory_previous_kernel_finished() { waited[running.thread] = true; }
void memory_warp_synchronised() { ++warp_epoch[running.warp]; }
void memory_blocks_ordered() { blocks_ordered = true; }

std::string memory_access(const void* address, size_t bytes, bool store, const void* pc) {
  const OutsideKernel outside;
  const auto* a = static_cast<const unsigned char*>(address);
  if (a >= shared - kGuardBytes && a < shared + shared_bytes + kGuardBytes)
    return shared_access(a - shared, bytes, store, pc);
  if (a >= module.begin && a < module.end) return "";
  return global_access(reinterpret_cast<uintptr_t>(address), bytes, store, pc);
}

void memory_atomic(const void* address, size_t bytes) {
  const OutsideKernel outside;
  blocks_ordered = true;
  const auto a = reinterpret_cast<uintptr_t>(address);
  if (a - reinterpret_cast<uintptr_t>(shared) < shared_bytes) return;
  for (const bool store : {false, true})
    if (const std::string problem = global_access(a, bytes, store, __builtin_return_address(0)); !problem.empty())
      stop(problem);
}

void memory_end_launch(const std::string& kernel) {
  if (!recording) return;
  Traffic traffic{kernel, 0, 0};
  for (const auto& [number, page] : pages) {
    traffic.loaded += page->loaded.count();
    traffic.stored += page->stored.count();
  }
  recorded.push_back(traffic);
}

std::vector<Traffic> take_traffic(bool start) {
  std::vector<Traffic> result;
  result.swap(recorded);
  recording = start;
  return result;
}

namespace {

void hook(const void* address, size_t bytes, bool store, const void* pc) {
  const auto* a = static_cast<const unsigned char*>(address);
  if (!running.in_kernel || (a >= running.stack_begin && a < running.stack_end)) return;
  const OutsideKernel outside;
  if (const std::string problem = memory_access(address, bytes, store, pc); !problem.empty()) stop(problem);
}

}  // namespace
}  // namespace lora_kernels::simt

#define LK_HOOK(name, bytes, store) \
  void __tsan_##name(void* address) { lora_kernels::simt::hook(address, bytes, store, __builtin_return_address(0)); }
#define LK_HOOKS(bytes)                        \
  LK_HOOK(read##bytes, bytes, false)           \
  LK_HOOK(write##bytes, bytes, true)           \
  LK_HOOK(unaligned_read##bytes, bytes, false) \
  LK_HOOK(unaligned_write##bytes, bytes, true) \
  LK_HOOK(volatile_read##bytes, bytes, false)  \
  LK_HOOK(volatile_write##bytes, bytes, true)

extern "C" {
LK_HOOKS(1)
LK_HOOKS(2)
LK_HOOKS(4)
LK_HOOKS(8)
LK_HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) {
  lora_kernels::simt::hook(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  lora_kernels::simt::hook(address, bytes, true, __builtin_return_address(0));
}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}
}
