// Patch embedding from raw pixels: patches are cut and normalised where the product reads them.
#pragma once

#include <stdint.h>

#include "linear.h"

namespace miss {

struct PatchArgs {
  const char* pixels;  // (images, rows * size, columns * size, 3) contiguous, u8 or f32
  Type pixels_type;
  int64_t images, rows, columns, size;  // of patches
  const float *scale, *shift;           // 3 each
  // x is not set: a row of it is a patch, its values by channel, then by line. rows, columns (the width), k, panels,
  // bias and y are.
  LinearArgs linear;
};

struct PatchKernels {
  void (*forward)(const PatchArgs& args);
};

MISS_TABLE(PatchKernels, patch_kernels)

}  // namespace miss
