// Attention of one query a row, as in decoding. Included by the file of each instruction set.
//
// Packing would cost more than it gives: keys and values are read as they lie, some heads of a key side by side, each
// once for 8 rows of its source. Scores stand as (key, head), so that the softmax goes down the keys with a head a lane.
#include "attention_parts.inl.h"

namespace miss {
namespace MISS_ISA {
namespace attend {
namespace {

constexpr int64_t TOGETHER = 8;  // rows that read a block of keys while it is in cache
constexpr int64_t NEAR = 64;     // keys of such a block

template <class Dot, int WIDTH, int HEADS>
inline void single_scores(const AttentionArgs& a, const char* q, const char* k, int64_t count, float* scores) {
  constexpr int WORDS = WIDTH / Dot::GROUP / LANES;  // vectors of a head
  for (int64_t n = 0; n < count; ++n, k += a.k_token, scores += LANES) {
#pragma GCC unroll 12
    for (int h = 0; h < HEADS; ++h) {
      vf dot = zero();
#pragma GCC unroll 8
      for (int w = 0; w < WORDS; ++w)
        dot = Dot::multiply(load(reinterpret_cast<const int32_t*>(q + h * a.q_head + w * LANES * 4)),
                            load(reinterpret_cast<const int32_t*>(k + h * a.k_head + w * LANES * 4)), dot);
      scores[h] = sum(dot);
    }
  }
}

// Scores to exponentials, in place; returns their sums and, through `top`, the maxima, a head a lane.
template <class Dot>
inline vf single_softmax(const AttentionArgs& a, float* scores, int64_t keys, vf& top) {
  top = set1(-3e38f);  // not -infinity, whose difference from itself is NaN
  for (int64_t n = 0; n < keys; ++n) top = max(top, load(scores + n * LANES));
  const vf factor = set1(a.scale * LOG2E), shift = mul(top, set1(-a.scale * LOG2E));
  vf total = zero();
  for (int64_t n = 0; n < keys; ++n) {
    vf p = exp2<6>(fma(load(scores + n * LANES), factor, shift));
    total = add(total, p);
    store(scores + n * LANES, p);
  }
  return total;
}

template <class Dot, int WIDTH, int HEADS>
inline void single_values(const AttentionArgs& a, const float* p, const char* v, int64_t count, float* sums) {
  using Value = typename Element<Dot>::Value;
  constexpr int VECTORS = WIDTH / LANES;
  vf acc[HEADS][VECTORS];
#pragma GCC unroll 12
  for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) acc[h][i] = load(sums + h * WIDTH + i * LANES);
  for (int64_t n = 0; n < count; ++n, v += a.v_token, p += LANES) {
#pragma GCC unroll 12
    for (int h = 0; h < HEADS; ++h) {
      const vf factor = set1(p[h]);
      const Value* row = reinterpret_cast<const Value*>(v + h * a.v_head);
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) acc[h][i] = fma(factor, load(row + i * LANES), acc[h][i]);
    }
  }
#pragma GCC unroll 12
  for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) store(sums + h * WIDTH + i * LANES, acc[h][i]);
}

template <class Dot, int WIDTH, int HEADS>
void single_heads(const AttentionArgs& a, const AttentionGroup& g, int64_t head, int64_t first, int64_t rows) {
  using Value = typename Element<Dot>::Value;
  float* scores = scratch_of<float>(4, rows * g.keys * LANES);
  float* sums = scratch_of<float>(5, rows * HEADS * WIDTH);
  memset(sums, 0, static_cast<size_t>(rows * HEADS * WIDTH * 4));
  const char *k = a.k + g.k + head * a.k_head, *v = a.v + g.v + head * a.v_head;
  for (int64_t start = 0; start < g.keys; start += NEAR)
    for (int64_t r = 0; r < rows; ++r)
      single_scores<Dot, WIDTH, HEADS>(a, a.q + g.q + (first + r) * a.q_row + head * a.q_head, k + start * a.k_token,
                                       least(NEAR, g.keys - start), scores + (r * g.keys + start) * LANES);
  float top[TOGETHER][LANES], total[TOGETHER][LANES];
  for (int64_t r = 0; r < rows; ++r) {
    vf most;
    store(total[r], single_softmax<Dot>(a, scores + r * g.keys * LANES, g.keys, most));
    store(top[r], most);
  }
  for (int64_t start = 0; start < g.keys; start += NEAR)
    for (int64_t r = 0; r < rows; ++r)
      single_values<Dot, WIDTH, HEADS>(a, scores + (r * g.keys + start) * LANES, v + start * a.v_token,
                                       least(NEAR, g.keys - start), sums + r * HEADS * WIDTH);
  for (int64_t r = 0; r < rows; ++r)
    for (int h = 0; h < HEADS; ++h) {
      Value* to = reinterpret_cast<Value*>(a.out + g.out + (first + r) * a.out_row + (head + h) * a.out_head);
      const vf factor = set1(1.0f / total[r][h]);
      for (int i = 0; i < WIDTH; i += LANES) store(to + i, mul(load(sums + (r * HEADS + h) * WIDTH + i), factor));
      if (a.lse != nullptr)
        a.lse[g.lse + (first + r) * a.lse_row + (head + h) * a.lse_head] =
            top[r][h] * a.scale + __builtin_logf(total[r][h]);
    }
}

// Heads whose sums fill the registers, and half as many; the last ones alone.
template <class Dot, int WIDTH>
inline void single_task(const AttentionArgs& a, const AttentionGroup& g, int64_t head, int64_t end) {
  constexpr int MANY = REGISTERS == 32 ? 384 / WIDTH : 4;
  for (int64_t first = 0; first < g.rows; first += TOGETHER) {
    const int64_t rows = least(TOGETHER, g.rows - first);
    int64_t h = head;
    for (; h + MANY <= end; h += MANY) single_heads<Dot, WIDTH, MANY>(a, g, h, first, rows);
    for (; h + MANY / 2 <= end; h += MANY / 2) single_heads<Dot, WIDTH, MANY / 2>(a, g, h, first, rows);
    for (; h < end; ++h) single_heads<Dot, WIDTH, 1>(a, g, h, first, rows);
  }
}

template <class Dot>
void single_of(const AttentionArgs& a) {
  parallel(a.num_tasks, a.grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const AttentionGroup& g = a.groups[group_of(a, task)];
      const int64_t head = (task - g.first_task) * SINGLE_HEADS, last = least(a.heads, head + SINGLE_HEADS);
      if (g.keys == 0) {
        for (int64_t h = head; h < last; ++h) nothing_visible<Dot>(a, g, h, 0, g.rows);
      } else if (a.width == 32) {
        single_task<Dot, 32>(a, g, head, last);
      } else {
        single_task<Dot, 64>(a, g, head, last);
      }
    }
  });
}

void single(const AttentionArgs& a) {
  a.type == Type::bf16 ? single_of<DotBf16>(a) : single_of<DotF32>(a);
}

}  // namespace
}  // namespace attend
}  // namespace MISS_ISA
}  // namespace miss
