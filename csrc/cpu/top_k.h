// The language-model head: the best logits of each row and the logarithm of the sum of all, no logit being kept.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "types.h"

namespace miss {

constexpr int MOST_K = 16;

struct TopKArgs {
  const char* x;  // (rows, k) contiguous; float32 or bf16
  Type x_type;
  int64_t rows, columns, k;
  const char* panels;         // of x's type, or int8: then x is quantised row by row
  const float* column_scale;  // of int8 weights, with 128 times a column's sum of codes; else nullptr
  const int32_t* offset;
  const float* bias;  // nullptr: none
  int count;          // how many are wanted: 1 … MOST_K
  float* values;      // (rows, count), descending; ties go to the lower index
  int64_t* indices;
  // What the logarithm of the sum of exponentials is: shift + log(total). total is NaN where a logit is; then values
  // are NaN and indices 0, 1, ….
  float *shift, *total;
};

struct TopKKernels {
  void (*forward)(const TopKArgs& args);
};

MISS_TABLE(TopKKernels, top_k_kernels)

}  // namespace miss
