// The builds of all ops for one instruction set, and which of them this processor can run.
#pragma once

#include "adamw.h"
#include "attention.h"
#include "decoder.h"
#include "few_rows.h"
#include "lora_linear.h"
#include "nf4.h"
#include "product.h"

namespace lora_kernels::cpu {

struct Isa {
  const char* name;
  const AdamWKernels* adamw;
  const AttentionKernels* attention;
  const DecoderKernels* decoder;
  const FewRowsKernels* few_rows;
  const LoraLinearKernels* lora_linear;
  const Nf4Kernels* nf4;
  const ProductKernels* product;
};

constexpr int kMaxIsas = 6;
// Writes the builds this processor can run, best first, and returns how many. The last ones may be slow, for tests.
int supported_isas(const Isa** out);

}  // namespace lora_kernels::cpu
