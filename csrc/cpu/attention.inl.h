#pragma once
// Attention, forward. Included by the file of each instruction set.
//
// A task is some of the queries of one source and head. The source's keys and values are packed once into this
// thread's scratch; then 6 queries at a time go over the keys in blocks: scores, their softmax with a running maximum,
// probabilities times values with the sums in registers. No matrix of queries x keys is ever in memory, and what is
// not visible is not computed: every row has its own number of visible keys.
#include "attention_parts.inl.h"

namespace miss {
namespace MISS_ISA {
namespace attend {
namespace {

constexpr int STRIP = 4 * ROWS;  // most queries that go over the keys together
constexpr int64_t KEYS = 1088;  // of a block: 6 rows of scores of all keys of the longest image stay in cache

template <class Dot>
struct Source {  // a source's head, packed
  const char *keys, *values;
  int64_t value_panel;  // bytes of 64 columns of all values
};

// What a strip of queries carries from block to block.
struct Running {
  float top[STRIP], total[STRIP];
};

// The largest of a row's scores, lane by lane; `high`: of those that were seen before.
inline vf largest_of(const float* scores, int64_t visible, vf high) {
  const int64_t whole = visible / LANES * LANES;
  const int rest = static_cast<int>(visible - whole);
  vf high2 = high;
  int64_t i = 0;
  for (; i + 2 * LANES <= whole; i += 2 * LANES) {
    high = max(high, load(scores + i));
    high2 = max(high2, load(scores + i + LANES));
  }
  if (i < whole) high = max(high, load(scores + i));
  if (rest) high2 = max(high2, first_of(load_n(scores + whole, rest), rest, high));
  return max(high, high2);
}

// Scores, of which `most` is the largest, become probabilities relative to the running maximum, in place; zeros up to
// `padded`. Returns the factor that brings what was summed before to the new maximum.
template <class Dot, bool DROPOUT>
inline float softmax_row(float* scores, int64_t visible, int64_t padded, float scale, float most, float& top,
                         float& total, const Drop& drop) {
  using Value = typename Element<Dot>::Value;
  constexpr int TERMS = Element<Dot>::POWER_TERMS;
  Value* to = reinterpret_cast<Value*>(scores);
  const int64_t whole = visible / LANES * LANES;
  const int rest = static_cast<int>(visible - whole);
  const float before = top;
  top = before > most ? before : most;
  const float offset = top == -__builtin_inff() ? 0.0f : top * scale;
  const vf factor = set1(scale), shift = set1(-offset);
  vf sums = zero();
  int64_t i = 0;
  for (; i < whole; i += LANES) {
    vf p = exp2<TERMS>(fma(load(scores + i), factor, shift));
    sums = add(sums, p);
    if (DROPOUT) p = mul(kept(p, drop.fields + i, drop.threshold), set1(drop.keep));
    store(to + i, p);
  }
  if (rest) {
    vf p = exp2<TERMS>(fma(load_n(scores + whole, rest), factor, shift));
    sums = add(sums, first_of(p, rest, zero()));
    if (DROPOUT) p = mul(kept(p, drop.fields + whole, drop.threshold), set1(drop.keep));
    store_n(to + whole, p, rest);
  }
  for (i = visible; i < padded; ++i) to[i] = Value{};
  if (before == -__builtin_inff()) {
    total += sum(sums);
    return 1.0f;
  }
  float some[LANES];
  store(some, exp2<TERMS>(set1(before * scale - offset)));
  total = total * some[0] + sum(sums);
  return some[0];
}

struct Strip {
  int num_rows;
  const char* q[STRIP];
  int64_t row[STRIP], token[STRIP], visible[STRIP], most;  // most: of visible
};

// Heads up to 64 wide: a source's keys are in L2, and rows of scores in L1. Wider ones (the tokens of the absorbed form,
// 0.9 MB twice) are in neither: more queries share each read.
inline int64_t strip_rows(const AttentionArgs& a) { return a.width > PANEL ? STRIP : ROWS; }

inline Strip strip_of(const AttentionArgs& a, const AttentionGroup& g, int64_t head, int64_t first, int64_t end) {
  Strip s;
  s.num_rows = static_cast<int>(least(strip_rows(a), end - first));
  s.most = 0;
  for (int r = 0; r < s.num_rows; ++r) {
    s.row[r] = (first + r) / g.tokens;
    s.token[r] = (first + r) % g.tokens;
    s.q[r] = a.q + g.q + s.row[r] * a.q_row + s.token[r] * a.q_token + head * a.q_head;
    s.visible[r] = a.causal ? least(g.keys, s.token[r] + a.shift + 1) : g.keys;
    s.most = s.visible[r] > s.most ? s.visible[r] : s.most;
  }
  return s;
}

// Asks for the strip's queries, and for the lines that it will write: both lie a token's stride apart, each in a page of
// its own, where no processor looks ahead.
inline void prefetch_strip(const AttentionArgs& a, const AttentionGroup& g, int64_t head, const Strip& s,
                           int64_t bytes) {
  for (int r = 0; r < s.num_rows; ++r) {
    const char* to = a.out + g.out + s.row[r] * a.out_row + s.token[r] * a.out_token + head * a.out_head;
    for (int64_t at = 0; at < bytes; at += 64) {
      __builtin_prefetch(s.q[r] + at, 0, 3);
      __builtin_prefetch(to + at, 1, 3);
    }
  }
}

template <class Dot>
inline void write_strip(const AttentionArgs& a, const AttentionGroup& g, int64_t head, const Strip& s,
                        const Running& running, const float* sums) {
  using Value = typename Element<Dot>::Value;
  for (int r = 0; r < s.num_rows; ++r) {
    Value* to = reinterpret_cast<Value*>(a.out + g.out + s.row[r] * a.out_row + s.token[r] * a.out_token +
                                         head * a.out_head);
    float& lse = a.lse[g.lse + s.row[r] * a.lse_row + s.token[r] * a.lse_token + head * a.lse_head];
    if (s.visible[r] <= 0) {  // a causal query before the first key
      memset(static_cast<void*>(to), 0, static_cast<size_t>(a.width) * sizeof(Value));
      lse = -__builtin_inff();
      continue;
    }
    const vf factor = set1(1.0f / running.total[r]);
    for (int64_t d = 0; d < a.width; d += LANES) store(to + d, mul(load(sums + r * a.width + d), factor));
    const float top = running.top[r] == -__builtin_inff() ? 0.0f : running.top[r];
    lse = top * a.scale + __builtin_logf(running.total[r]);
  }
}

inline int64_t mask_index(const AttentionArgs& a, const AttentionGroup& g, int64_t head, const Strip& s, int r) {
  return g.mask + s.row[r] * a.mask_row + head * a.mask_head + s.token[r] * a.mask_token;
}

template <class Dot, bool DROPOUT>
inline void forward_strip(const AttentionArgs& a, const AttentionGroup& g, int64_t head, const Strip& s,
                          const Source<Dot>& source, float* scores, float* sums, int16_t* fields) {
  constexpr int64_t SIZE = 4 / Dot::GROUP;
  const int64_t bytes = a.width * SIZE;
  Running running;
  char* q = reinterpret_cast<char*>(sums + strip_rows(a) * a.width);  // the strip's queries, one after the other
  for (int r = 0; r < s.num_rows; ++r) {
    running.top[r] = -__builtin_inff();
    running.total[r] = 0.0f;
    memcpy(q + r * bytes, s.q[r], static_cast<size_t>(bytes));
  }
  for (int64_t start = 0; start < s.most; start += KEYS) {
    const int64_t count = least(KEYS, s.most - start), padded = round_up(count, Dot::GROUP);
    for (int64_t at = 0; at < count; at += PANEL)
      for (int r = 0; r < s.num_rows; r += ROWS)
        tile<Dot>(static_cast<int>(least(ROWS, s.num_rows - r)), Rows{q + r * bytes, bytes, bytes},
                  source.keys + (start + at) * bytes, scores + r * KEYS + at, KEYS, true, least(PANEL, count - at));
    for (int r = 0; r < s.num_rows; ++r) {
      const int64_t rest = s.visible[r] - start, seen = rest < 0 ? 0 : least(rest, count);
      Drop drop{fields, a.threshold, a.keep};
      if (DROPOUT) drop.fields = keep_fields(a.seed, mask_index(a, g, head, s, r) + start, seen, fields);
      const float most = max_of(largest_of(scores + r * KEYS, seen, set1(-__builtin_inff())));
      const float factor = softmax_row<Dot, DROPOUT>(scores + r * KEYS, seen, padded, a.scale * LOG2E, most,
                                                     running.top[r], running.total[r], drop);
      if (start > 0)
        for (int64_t d = 0; d < a.width; d += LANES)
          store(sums + r * a.width + d, mul(load(sums + r * a.width + d), set1(factor)));
    }
    const Rows p{reinterpret_cast<const char*>(scores), KEYS * 4, padded * SIZE};
    for (int64_t d = 0; d < a.width; d += PANEL)
      for (int r = 0; r < s.num_rows; r += ROWS)
        tile<Dot>(static_cast<int>(least(ROWS, s.num_rows - r)), p.from(r, 0, p.bytes),
                  source.values + d / PANEL * source.value_panel + start / Dot::GROUP * STEP, sums + r * a.width + d,
                  a.width, start == 0, least(PANEL, a.width - d));
  }
  write_strip<Dot>(a, g, head, s, running, sums);
}

template <class Dot>
inline const char* pack_values(const AttentionArgs& a, const AttentionGroup& g, int64_t head, char* to) {
  pack_as_rows<Dot>(a.v + g.v + head * a.v_head, a.v_token, g.keys, a.width, to);
  return to;
}

template <class Dot>
inline Source<Dot> pack_source(const AttentionArgs& a, const AttentionGroup& g, int64_t head) {
  constexpr int64_t SIZE = 4 / Dot::GROUP;
  const int64_t bytes = a.width * SIZE, of_keys = bytes_as_columns(g.keys, bytes);
  char* to = scratch_of<char>(3, of_keys + bytes_as_rows(g.keys, a.width, Dot::GROUP));
  pack_as_columns(a.k + g.k + head * a.k_head, a.k_token, g.keys, bytes, to);
  return {to, pack_values<Dot>(a, g, head, to + of_keys), (g.keys + Dot::GROUP - 1) / Dot::GROUP * STEP};
}

template <class Dot>
inline void nothing_visible(const AttentionArgs& a, const AttentionGroup& g, int64_t head, int64_t first, int64_t end) {
  const int64_t bytes = a.width * 4 / Dot::GROUP;
  for (int64_t j = first; j < end; ++j) {
    const int64_t row = j / g.tokens, token = j % g.tokens;
    memset(a.out + g.out + row * a.out_row + token * a.out_token + head * a.out_head, 0, static_cast<size_t>(bytes));
    if (a.lse != nullptr) a.lse[g.lse + row * a.lse_row + token * a.lse_token + head * a.lse_head] = -__builtin_inff();
  }
}

// The group of a task: the last one whose first task is not after it.
inline int64_t group_of(const AttentionArgs& a, int64_t task) {
  int64_t low = 0, high = a.num_groups - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (a.groups[middle].first_task <= task) low = middle;
    else high = middle - 1;
  }
  return low;
}

template <class Dot, bool DROPOUT>
void forward_tasks(const AttentionArgs& a) {
  parallel(a.num_tasks, a.grain, [&](int64_t begin, int64_t end) {
    const int64_t strip = strip_rows(a);
    float* scores = scratch_of<float>(4, strip * (KEYS + 2 * a.width));
    int16_t* fields = scratch_of<int16_t>(5, KEYS + FIELD_SLACK);
    Source<Dot> source{};
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t number = group_of(a, task);
      const AttentionGroup& g = a.groups[number];
      const int64_t queries = g.rows * g.tokens, chunks = (queries + a.chunk - 1) / a.chunk;
      const int64_t head = (task - g.first_task) / chunks;
      const int64_t first = (task - g.first_task) % chunks * a.chunk;
      const int64_t last = least(queries, first + a.chunk);
      if (g.keys == 0) {
        nothing_visible<Dot>(a, g, head, first, last);
        continue;
      }
      if (packed != number * a.heads + head) source = pack_source<Dot>(a, g, head);
      packed = number * a.heads + head;
      Strip now = strip_of(a, g, head, first, last);
      for (int64_t j = first; j < last; j += strip) {
        const Strip next = strip_of(a, g, head, least(j + strip, last), last);
        prefetch_strip(a, g, head, next, a.width * 4 / Dot::GROUP);
        forward_strip<Dot, DROPOUT>(a, g, head, now, source, scores, scores + strip * KEYS, fields);
        now = next;
      }
    }
  });
}

template <class Dot>
void forward_of(const AttentionArgs& a) {
  a.dropout ? forward_tasks<Dot, true>(a) : forward_tasks<Dot, false>(a);
}

void forward(const AttentionArgs& a) {
  a.type == Type::bf16 ? forward_of<DotBf16>(a) : forward_of<DotF32>(a);
}

}  // namespace
}  // namespace attend
}  // namespace MISS_ISA
}  // namespace miss
