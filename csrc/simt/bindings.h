// The emulator's switches, for Python: called by csrc/cuda/bindings.cpp where it is compiled with LK_SIMT.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "memory.h"

namespace lora_kernels::simt {

inline void bind_simt(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "set_schedule",
      [](const std::string& order, uint64_t seed) {
        if (order == "forward") return set_schedule(Order::kForward, seed);
        if (order == "reversed") return set_schedule(Order::kReversed, seed);
        if (order == "shuffled") return set_schedule(Order::kShuffled, seed);
        throw py::value_error("order is '" + order + "'; allowed: forward, reversed, shuffled");
      },
      py::arg("order"), py::arg("seed") = 0,
      "The order in which blocks, warps and lanes run from now on: forward, reversed or shuffled by the seed.");
  m.def("set_skipped", &set_skipped, py::arg("file"), py::arg("line"),
        "Leave out the __syncthreads, __syncwarp, cp_async_commit, cp_async_wait and wait_for_previous_kernel on this "
        "line of this file of "
        "csrc/cuda, to show that a test needs it. Line 0: none.");
  m.def("set_idle", &set_idle, py::arg("idle"), "Launches do nothing from now on, or again something, for timing.");
  m.def("set_shared_memory_limit", &set_shared_memory_limit, py::arg("bytes"),
        "The most dynamic shared memory that a kernel may ask for (99 KiB to begin with).");
  m.def(
      "set_buffers",
      [](const std::map<std::string, std::pair<uintptr_t, size_t>>& named, const std::string& late) {
        std::vector<Buffer> buffers;
        for (const auto& [name, range] : named) buffers.push_back({name, range.first, range.second, name == late});
        memory_set_buffers(buffers);
      },
      py::arg("buffers"), py::arg("late") = "",
      "The global memory that kernels may access from now on, {name: (address, bytes)}; if empty, all of it. `late`: "
      "only after wait_for_previous_kernel.");
  m.def(
      "take_traffic",
      [](bool record) {
        py::list launches;
        for (const Traffic& traffic : take_traffic(record))
          launches.append(py::make_tuple(traffic.kernel, traffic.loaded, traffic.stored));
        return launches;
      },
      py::arg("record"),
      "[(kernel, distinct bytes of global memory loaded, stored)] of each launch since the last call, if that said to "
      "record.");
}

}  // namespace lora_kernels::simt
