// Numbers from one type to another.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "types.h"

namespace miss {

struct ConvertKernels {
  void (*widen)(const bf16* from, float* to, int64_t count);
  void (*narrow)(const float* from, bf16* to, int64_t count);
};

MISS_TABLE(ConvertKernels, convert_kernels)

}  // namespace miss
