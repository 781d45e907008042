// Attention of queries over the keys and values of sources: one table for self-attention, packed sequences,
// cross-attention by index and decoding, which differ only in which queries read which source.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "types.h"

namespace miss {

// A source of keys and values, and the queries that read it: `rows` times `tokens` of them, in order.
struct AttentionGroup {
  int64_t k, v;        // bytes to its first key and value, head 0
  int64_t keys;        // how many are valid
  int64_t q, out;      // bytes to the first query and output, head 0
  int64_t lse;         // elements to the first log-sum-exp, head 0
  int64_t mask;        // index of the first element of dropout's mask, head 0
  int64_t rows, tokens;
  int64_t dk, all_keys;  // of gradients: bytes to the first key's, head 0; keys that dk and dv have
  int64_t first_task;  // number of the group's first task: there are heads * chunks of its queries
};

struct AttentionArgs {
  Type type;  // of q, k, v, out: f32 or bf16
  const char *q, *k, *v;
  char* out;
  float* lse;  // may be null for `single`
  int64_t heads, width;                      // width: a multiple of 32, at most 64 or a multiple of 64
  int64_t q_row, q_token, q_head;            // bytes
  int64_t k_token, k_head, v_token, v_head;  // bytes
  int64_t out_row, out_token, out_head;      // bytes
  int64_t lse_row, lse_token, lse_head;      // elements
  float scale;                               // above 0
  bool causal;
  int64_t shift;                             // causal: token t sees keys up to t + shift
  bool dropout;
  int64_t seed, mask_row, mask_token, mask_head;
  int threshold;                             // an element is kept where its 16 bits are at least this
  float keep;                                // 1 / (1 - p)
  const AttentionGroup* groups;
  int64_t num_groups, num_tasks, grain;
  int64_t chunk;                             // queries of a forward task
};

// The backward's: dq, dk, dv dense; dq and dout with the strides of out, dv with those of dk. A task is a group's head.
struct AttentionGradArgs {
  AttentionArgs forward;  // its `out` is null
  const char *dout, *out;
  char *dq, *dk, *dv;
  int64_t dk_token, dk_head;  // bytes
};

constexpr int64_t SINGLE_HEADS = 12;     // heads of a task of single queries

// Rows of each head times the head's own weight: (rows, heads, in) to (rows, heads, out).
struct HeadProductArgs {
  Type type;
  const char *a, *weight, *bias;  // bias (heads, out) or null
  char* out;
  const uint8_t* biased;          // which outer rows take the bias; null: all
  int64_t heads, inner, columns;  // inner: what is summed over; both multiples of 32
  int64_t outer, tokens;          // rows are outer x tokens
  int64_t a_outer, a_token, a_head, out_token, out_head;  // bytes; out is dense over rows
  int64_t weight_row, weight_head;                        // bytes
  bool transposed;                // the weight's rows are columns of the result: weight (columns, inner), else (inner, columns)
};

struct AttentionKernels {
  void (*forward)(const AttentionArgs& args);
  void (*coded)(const AttentionArgs& args);   // forward, scores of int8 codes; all keys seen, no dropout, no lse
  void (*single)(const AttentionArgs& args);  // forward, one token a row, no dropout, heads 32 or 64 wide
  void (*head_product)(const HeadProductArgs& args);
  void (*backward)(const AttentionGradArgs& args);
};

MISS_TABLE(AttentionKernels, attention_kernels)

}  // namespace miss
