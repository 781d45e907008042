// A whole decode step of an answer decoder: one token a row through embeddings, every layer, and the head.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "team.h"
#include "types.h"

namespace miss {

// A linear layer over what `pack_panels`, `pack_int8` or `pack_int4` made of its weight (columns, k).
struct DecoderMatrix {
  enum class Kind : int32_t { plain, w8a8, weight_only };
  Kind kind;
  const char* panels;
  int64_t columns, k;
  const float* column_scale;  // of int8
  const int32_t* offset;      // of W8A8: 128 times a column's sum of codes
  const char* bias;           // (columns), may be null
  Type bias_type;
  int group;                  // of int4; 0: int8
  bool zeros;                 // of int4
};

struct DecoderNorm {
  const float *weight, *bias;
  float eps;
};

struct DecoderLayer {
  DecoderMatrix qkv, self_output, query, cross_output, input, output;
  DecoderNorm self_norm, cross_norm, mlp_norm;
};

struct DecoderModel {
  Type type;  // of activations, tables and caches: float32 or bf16
  int64_t width, inner, heads, head_width;  // width a multiple of 64, heads 32 or 64 wide, inner a multiple of 4
  const char *words, *positions;            // (…, width)
  DecoderNorm norm;
  const DecoderLayer* layers;
  int64_t num_layers;
  DecoderMatrix transform;
  DecoderNorm transform_norm;
  DecoderMatrix vocabulary;  // plain or W8A8; its bias is float32
};

// Keys and values of all layers: (layers, slots, tokens, heads, head width), strides in bytes, a token's heads one run.
struct DecoderCache {
  char *k, *v;
  int64_t k_layer, k_slot, k_token, v_layer, v_slot, v_token;
};

// What a step writes between its phases; bytes_of_scratch says how much. Nothing is allocated in a step.
struct DecoderCall {
  int64_t rows;
  const int64_t* tokens;
  const int32_t *slots, *positions, *questions;
  DecoderCache self, cross;
  const int32_t* question_lengths;
  int64_t question_length;  // states that the cache has room for: no more are read
  int64_t most_keys;        // of any row, in either cache
  char* states;       // (rows, width): what the vocabulary is multiplied with
  int count;          // best next tokens that are wanted; 0: the states alone
  float* values;      // (rows, count)
  int64_t* indices;
  float *shift, *total;  // the log-sum-exp is shift + log(total), as top_k.h's
  char* scratch;
  int64_t threads;    // members that the scratch has room for
};

struct DecoderKernels {
  int64_t (*scratch_bytes)(const DecoderModel& model, int64_t rows, int64_t threads);
  // Has this thread's own memory ready; after that nothing in `run` allocates, hence throws.
  void (*reserve)(const DecoderModel& model, const DecoderCall& call);
  // One thread's part in a step: every thread of the team calls it with the same arguments.
  void (*run)(const DecoderModel& model, const DecoderCall& call, Team& team);
};

MISS_TABLE(DecoderKernels, decoder_kernels)

}  // namespace miss
