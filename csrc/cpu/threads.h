// On how many threads a kernel runs.
#pragma once

#include <cstdint>

namespace lora_kernels::cpu {

// `requested`, but at most one for each of `parts` and for each `min_work` of `work`, and at least 1.
int thread_count(int requested, int64_t parts, int64_t work, int64_t min_work);

// For tests, whose kernels have little work: whether min_work counts, as it does by default.
void spare_threads(bool enabled);
// The largest thread_count since the last call.
int take_most_threads();

}  // namespace lora_kernels::cpu
