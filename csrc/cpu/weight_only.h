// Linear layers over int8 and int4 weights with float activations.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "types.h"

namespace miss {

// y (rows, columns) = x W^T + bias.
//   int8  W[n, k] = code * scale[n]: panels of 4 codes a word, as linear.h packs them.
//   int4  W[n, k] = (code - zero[n, g]) * scale[n, g] in groups of 32, 64 or 128 along k: a panel is, group by group,
//         group / 8 steps of 64 words (8 codes each: those of k = 0, 2, 4, 6 from bit 0 on, of 1, 3, 5, 7 from bit 16 on),
//         64 float16 scales, and 64 uint8 zeros where there are any (else 8 stands for them).
struct WeightOnlyArgs {
  const char* x;  // rows x_stride elements apart
  Type type;      // of x, y and bias (which may be float32 too)
  int64_t rows, columns, k, x_stride;
  const char* panels;
  int group;                  // 0: int8
  bool zeros;
  const float* column_scale;  // int8
  const char* bias;           // nullptr: none
  Type bias_type;
  char* y;
  bool gelu;                  // of the result
};

struct PackInt4Args {
  const uint8_t* codes;   // (rows, groups * group), what is beyond k included
  const uint16_t* scale;  // float16 (rows, groups)
  const uint8_t* zero;    // (rows, groups) or nullptr
  int64_t rows, groups;
  int group;
  char* panels;
};

// Bytes of a group of a panel of int4.
inline int64_t int4_group_bytes(int group, bool zeros) { return group / 8 * 256 + 128 + (zeros ? 64 : 0); }

struct WeightOnlyKernels {
  void (*forward)(const WeightOnlyArgs& args);
  void (*pack)(const PackInt4Args& args);
};

MISS_TABLE(WeightOnlyKernels, weight_only_kernels)

}  // namespace miss
