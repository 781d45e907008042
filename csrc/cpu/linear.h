// Linear layers over packed panels: float32, bfloat16, and int8 weights with int8 activations.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "types.h"

namespace miss {

// y = gelu?(x W^T + bias) + residual. Everything is row-major; rows are `…_stride` elements apart, columns 1.
struct LinearArgs {
  // What is multiplied: x float32 or bf16 with panels of the same type, or codes (u8, value + 128) with int8 panels.
  const char* x;
  Type x_type;
  int64_t rows, columns, k, x_stride;
  const char* panels;
  // Of int8 weights: a factor a column, 128 times a column's sum of codes, a factor a row of codes; else nullptr.
  const float* column_scale;
  const int32_t* offset;
  const float* row_scale;
  // The epilogue.
  const char* bias;  // of y's type or float32; nullptr: none
  Type bias_type;
  bool gelu;
  const char* residual;  // of y's type, nullptr: none
  int64_t residual_stride;
  char* pre;  // x W^T + bias as it was before gelu, y's type and shape; nullptr: not kept
  // Where to: y float32 or bf16 (rows, columns), contiguous; or codes for the next product, with a scale a row.
  char* y;
  Type y_type;
  // Not nullptr: y in pieces of `piece` columns (a divisor of 64, or 64), piece i of row r at
  // y + places[i] + r / y_tokens * y_outer + r % y_tokens * y_token, all in elements.
  const int64_t* places;
  int64_t piece, y_tokens, y_outer, y_token;
  uint8_t* codes;  // nullptr: y is written
  float* codes_scale;
};

struct PackArgs {
  const char* from;  // (rows, k) with any strides, in elements
  Type from_type, to_type;
  int64_t rows, k, row_stride, k_stride;
  char* panels;     // ceil(rows / 64) panels, each ceil(k / group) * 64 * group elements of to_type
  int32_t* offset;  // int8: 128 times each row's sum; nullptr: not wanted
};

// y (rows, columns) = A B^T, both packed over the k that they share, which is the rows of a batch: a weight's gradient.
struct PackedProductArgs {
  const char* a;  // panels of `rows` rows
  const char* b;  // panels of `columns` rows
  Type type;      // of A and B: float32 or bf16
  Type y_type;    // that, or float32
  int64_t rows, columns, k;
  char* y;
};

struct LinearKernels {
  // x float32 or bf16, quantised row by row first where the panels are int8; y_type Type::u8 asks for codes.
  void (*forward)(const LinearArgs& args);
  void (*pack)(const PackArgs& args);
  // codes (rows, k) u8 and scale (rows): x float32 or bf16, rows x_stride elements apart.
  void (*packed_product)(const PackedProductArgs& args);
  // dz = dy * gelu'(pre), `count` numbers of one type.
  void (*gelu_backward)(const char* dy, const char* pre, Type type, int64_t count, char* dz);
  // Sums over rows: x (rows, columns) -> y (columns), of one type.
  void (*column_sums)(const char* x, Type type, int64_t rows, int64_t columns, char* y);
  void (*quantise)(const char* x, Type type, int64_t rows, int64_t k, int64_t x_stride, uint8_t* codes, float* scale);
};

MISS_TABLE(LinearKernels, linear_kernels)

}  // namespace miss
