// Layer normalization, plain and after residual and dropout, forward and backward, and written as int8 codes.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace miss {

// The mask of kernels/dropout.py: element `index` is kept where its 16 bits of the hash are at least `threshold`.
struct Dropout {
  bool on = false;
  int64_t seed = 0;
  int32_t threshold = 0;
  float scale = 1.0f;  // of what is kept
};

// Rows lie one behind another. nullptr: an output that is not wanted, a residual that there is not.
struct NormForward {
  const void *x, *residual;
  const float *weight, *bias;
  int64_t rows, width;
  float eps;
  Dropout dropout;
  void *y, *summed;
  float *mean, *rstd;
  uint8_t* codes;
  float* scale;
};

struct NormBackward {
  const void *dy, *dsummed, *x;
  const float *weight, *mean, *rstd;
  int64_t rows, width;
  Dropout dropout;
  void *dx, *dresidual;
  float *dweight, *dbias;
  float* partial;  // room for NORM_BLOCKS * 2 * width
};

// Backward sums weights' gradients over at most so many blocks of rows, then over the blocks: the order is a function of
// the number of rows alone.
constexpr int NORM_BLOCKS = 32;

struct NormKernels {
  void (*forward_f32)(const NormForward&);
  void (*forward_bf16)(const NormForward&);
  void (*backward_f32)(const NormBackward&);
  void (*backward_bf16)(const NormBackward&);
};

MISS_TABLE(NormKernels, norm_kernels)

}  // namespace miss
