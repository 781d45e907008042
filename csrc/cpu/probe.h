// For tests alone: vec_*.h, functions.h and micro.h as seen from outside, one function at a time.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "types.h"

namespace miss {

enum class Function : int32_t { exp, normal_cdf, gelu, gelu_slope, power_of_two, round, sum, max_of, min_of };

struct ProbeKernels {
  // y = function(x), whole vectors first and then the rest, as every kernel goes. sum, max_of and min_of give a vector's
  // value in each of its lanes.
  void (*apply)(Function function, const float* x, float* y, int64_t count);
  void (*to_bf16)(const float* x, bf16* y, int64_t count);
  void (*to_bytes)(const float* x, uint8_t* y, int64_t count);  // whole numbers in 0 … 255, to the nearest
  void (*to_float)(const char* x, Type type, float* y, int64_t count);
  // 1 to 6 rows of f32, bf16 or u8 (then with s8) times the first columns of a panel: sums (rows, 64).
  void (*product)(Type type, int num_rows, const char* a, int64_t row_bytes, int64_t bytes, const char* panel, char* sums,
                  bool fresh, int columns);
  int lanes;
};

MISS_TABLE(ProbeKernels, probe_kernels)

}  // namespace miss
