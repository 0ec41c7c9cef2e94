// h [M,R] as the kernel that makes it leaves it for those that read it.
#pragma once

namespace lora_kernels::cuda {

struct RankParts {
  const float* parts;  // [splits,M,R], which add up to h
  int splits;
  float* sum;  // [M,R], where the reader keeps h for the backward pass, or null
};

}  // namespace lora_kernels::cuda
