// h [M,R] as the kernel that makes it leaves it for those that read it.
#pragma once

namespace lora_kernels::cuda {

struct RankParts {
  const float* parts;  // [splits,M,R], which add up to h
  int splits;
  float* sum;  // [M,R], where the reader keeps h for the backward pass, or null
  // lora_h, which makes the parts, is the kernel queued just before the reader. The reader then starts early, and waits
  // for lora_h only where it reads the parts. All else that it reads is there: lora_h is not launched early, so that
  // it, and hence its reader, starts when all before it has finished. Nor can the reader's stores come too soon: lora_h
  // touches no memory of theirs, and whatever else did has finished.
  bool just_queued;
};

}  // namespace lora_kernels::cuda
