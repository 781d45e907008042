// Linear and cross entropy: the loss's parts from a tile of logits as it is summed, and the logits' gradient.
//
// The product is taken the other way round, weight (V, C) times packed hidden rows: the weight, which is large and new
// at each training step, is read once as it lies, and a vector holds one token's logits of 16 rows.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "types.h"

namespace miss {

constexpr int64_t ENTROPY_BLOCK = 48;  // tokens that are summed in one go: the order of all sums is a function of V alone

struct EntropyArgs {
  const char* weight;  // (tokens, k) contiguous
  const char* bias;    // (tokens,) or nullptr, of the same type
  const char* panels;  // of hidden (rows, k), of the same type
  Type type;           // float32 or bf16
  int64_t rows, tokens, k;
  const int64_t* labels;  // (rows,) in 0 … tokens - 1
  char* logits;           // (tokens, rows), of the same type; nullptr: not kept
  float* partial;         // blocks * 3 * padded(rows): each block's largest logit, sum of exponentials, sum of logits
  // What comes out, (padded(rows),): the log of the sum of exponentials is shift + log(total).
  float *shift, *total, *sum, *at_label;

  static int64_t padded(int64_t rows) { return (rows + 63) / 64 * 64; }
  static int64_t blocks(int64_t tokens) { return (tokens + ENTROPY_BLOCK - 1) / ENTROPY_BLOCK; }
};

struct EntropyGradArgs {
  char* logits;  // (tokens, rows): becomes their gradient
  Type type;
  int64_t rows, tokens;
  const int64_t* labels;
  const float *lse, *dloss;  // (rows,)
  float smoothing;
  float* dbias;     // (tokens,)
  float* at_label;  // room for rows
};

struct EntropyKernels {
  void (*forward)(const EntropyArgs& args);
  void (*gradient)(const EntropyGradArgs& args);
};

MISS_TABLE(EntropyKernels, entropy_kernels)

}  // namespace miss
