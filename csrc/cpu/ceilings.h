// Loops that reach the processor's limits, for the benchmarks to compare with.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace miss {

// Each runs on every thread of the pool and returns the operations that were done (a multiply-add counts as two).
struct CeilingKernels {
  double (*fp32)(int64_t turns);  // fused multiply-adds in registers
  double (*bf16)(int64_t turns);  // the bf16 dot product, or what stands in for it
  double (*int8)(int64_t turns);  // the u8 x s8 dot product, or what stands in for it
  void (*read)(const float* p, int64_t count);            // sums what is there
  void (*copy)(const float* from, float* to, int64_t count);
};

MISS_TABLE(CeilingKernels, ceiling_kernels)

}  // namespace miss
