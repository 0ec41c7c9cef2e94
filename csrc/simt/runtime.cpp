#include "runtime.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : lora_kernels::simt::last_error().c_str();
}

namespace lora_kernels::simt {
namespace {

constexpr size_t kDefaultDynamicLimit = 48 << 10;
std::map<const void*, size_t> dynamic_limits;  // of kernels that opted in to more

std::string name_of(const std::type_info& type) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(type.name(), nullptr, nullptr, &status),
                                                    &std::free);
  const std::string full = status == 0 ? name.get() : type.name();
  const size_t scope = full.substr(0, full.find('<')).rfind("::");
  return scope == std::string::npos ? full : full.substr(scope + 2);
}

struct Shuffle {
  uint64_t value, result;
  int source;
  const char* name;
  Site site;
};

struct Vote {
  bool predicate;
  unsigned result;
};

}  // namespace

cudaError_t set_dynamic_limit(const std::type_info& params_type, const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > shared_memory_limit()) {
    refuse_launch("kernel of " + name_of(params_type) + ": " + std::to_string(bytes) +
                  " bytes of dynamic shared memory; allowed: " + std::to_string(shared_memory_limit()));
    return cudaErrorInvalidValue;
  }
  dynamic_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const std::type_info& params_type, dim3 grid, dim3 block, size_t dynamic_smem, Body body,
                const void* kernel, const void* params) {
  if (is_idle()) return cudaSuccess;
  const auto opted_in = dynamic_limits.find(kernel);
  const size_t limit = opted_in == dynamic_limits.end() ? kDefaultDynamicLimit : opted_in->second;
  switch (run_grid(name_of(params_type), grid, block, dynamic_smem, std::min(limit, shared_memory_limit()), body,
                   kernel, params)) {
    case Status::kSuccess:
      return cudaSuccess;
    case Status::kInvalidLaunch:
      return cudaErrorInvalidValue;
    case Status::kFailed:
      break;
  }
  return cudaErrorLaunchFailure;
}

void sync_warp(unsigned mask, Site site) {
  if (is_skipped(site)) return;
  warp_collective("__syncwarp", [](void* const(&)[kWarpSize]) { memory_warp_synchronised(); }, mask, nullptr, site);
}

int shuffle_source(ShuffleKind kind, int lane, int operand, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1;
  int source = lane;
  switch (kind) {
    case ShuffleKind::kIndex:
      return first + (operand & (width - 1));
    case ShuffleKind::kXor:
      source = lane ^ operand;
      break;
    case ShuffleKind::kUp:
      source = lane - operand;
      return source >= first ? source : lane;
    case ShuffleKind::kDown:
      source = lane + operand;
      break;
  }
  return source <= last ? source : lane;
}

uint64_t shuffle(const char* name, unsigned mask, uint64_t value, int source, Site site) {
  Shuffle argument{value, 0, source, name, site};
  const WarpOp op = [](void* const(&arguments)[kWarpSize]) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      auto* reader = static_cast<Shuffle*>(arguments[lane]);
      if (!reader) continue;
      const auto* read = static_cast<const Shuffle*>(arguments[reader->source]);
      if (!read)
        fail(std::string(reader->name) + ": lane " + std::to_string(lane) + " reads lane " +
                 std::to_string(reader->source) + ", which is not in its mask",
             reader->site);
      reader->result = read->value;
    }
  };
  warp_collective(name, op, mask, &argument, site);
  return argument.result;
}

unsigned ballot(const char* name, unsigned mask, bool predicate, Site site) {
  Vote argument{predicate, 0};
  const WarpOp op = [](void* const(&arguments)[kWarpSize]) {
    unsigned result = 0;
    for (int lane = 0; lane < kWarpSize; ++lane)
      if (arguments[lane] && static_cast<Vote*>(arguments[lane])->predicate) result |= 1u << lane;
    for (void* argument : arguments)
      if (argument) static_cast<Vote*>(argument)->result = result;
  };
  warp_collective(name, op, mask, &argument, site);
  return argument.result;
}

}  // namespace lora_kernels::simt
