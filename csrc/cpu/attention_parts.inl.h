// What attention's forward and backward share: packing keys and values into panels, a product over part of a panel,
// the power of two. Knows micro.h's panels; does not know queries.
#pragma once

#include "attention.h"
#include "dropout.inl.h"
#include "shuffle.h"

namespace miss {
namespace MISS_ISA {
namespace attend {
namespace {

template <class Dot>
struct Element {
  using Value = float;
  static constexpr int POWER_TERMS = 6;  // of exp2's polynomial: 2e-9, so that only rounding is left
};
template <>
struct Element<DotBf16> {
  using Value = bf16;
  static constexpr int POWER_TERMS = 3;  // 1e-4, where the result is rounded to 2e-3
};

struct Drop {  // dropout of a row
  const int16_t* fields;
  int threshold;
  float keep;
};

constexpr float LOG2E = 1.44269504088896341f;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// 2 ** x for x <= 0 or a little above; 0 below -150, infinity's too; NaN at NaN.
template <int TERMS>
inline vf exp2(vf x) {
  if (TERMS == 3) {  // exact at whole numbers, where the largest score's stands
    const vf f = fraction(x);
    vf p = fma(f, set1(7.826794625e-02f), set1(2.263077078e-01f));
    p = fma(p, f, set1(6.954243459e-01f));
    return scale_by_floor(fma(p, f, set1(1.0f)), x);
  }
  x = max(set1(-160.0f), x);
  vf n = round(x), r = sub(x, n);
  vf p = fma(r, set1(1.535336182e-04f), set1(1.339887445e-03f));
  p = fma(p, r, set1(9.618437358e-03f));
  p = fma(p, r, set1(5.550332471e-02f));
  p = fma(p, r, set1(2.402264791e-01f));
  p = fma(p, r, set1(6.931472029e-01f));
  return scale_by(fma(p, r, set1(1.0f)), n);
}

template <class Dot, int VECTORS>
inline void rows_by_vectors(int num_rows, const Rows& a, const char* b, float* sums, int64_t stride, bool fresh) {
  if (a.step == 4) micro_rows<Dot, 4, VECTORS>(num_rows, a, b, sums, stride, fresh);
  else micro_rows<Dot, STEP, VECTORS>(num_rows, a, b, sums, stride, fresh);
}

// micro.h's product of a panel's first columns only, to whole vectors: a source's last panel has 1 key of 64 at 577
// tokens, and heads may be 32 wide.
template <class Dot>
inline void tile(int num_rows, const Rows& a, const char* panel, float* sums, int64_t stride, bool fresh,
                 int64_t columns) {
  for (int64_t k = 0; k < a.bytes; k += Dot::SPAN) {
    const Rows part = a.from(0, k, least(Dot::SPAN, a.bytes - k));
    const bool first = fresh && k == 0;
    const char* b = panel + k / 4 * STEP;
    int64_t at = 0;
    for (; at + VECS * LANES <= round_up(columns, LANES); at += VECS * LANES)
      rows_by_vectors<Dot, VECS>(num_rows, part, b + at * 4, sums + at, stride, first);
    switch ((columns - at + LANES - 1) / LANES) {
      case 1: rows_by_vectors<Dot, 1>(num_rows, part, b + at * 4, sums + at, stride, first); break;
      case 2: rows_by_vectors<Dot, 2>(num_rows, part, b + at * 4, sums + at, stride, first); break;
      case 3: rows_by_vectors<Dot, 3>(num_rows, part, b + at * 4, sums + at, stride, first); break;
      default: break;
    }
  }
}

// So many rows ahead of the one that is packed are asked for: where rows lie in pages of their own, and in each page anew,
// the processor does not look ahead.
constexpr int64_t AHEAD = 2 * LANES;

// Rows become columns: panels[row / 64][word][row % 64], a row being `bytes` (a multiple of a vector's) long.
inline void pack_as_columns(const char* from, int64_t stride, int64_t rows, int64_t bytes, char* panels) {
  for (int64_t row = 0; row < round_up(rows, LANES); row += LANES) {
    char* to = panels + row / PANEL * (bytes / 4 * STEP) + row % PANEL * 4;
    for (int64_t at = 0; at < bytes; at += LANES * 4) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) __builtin_prefetch(from + (row + i + AHEAD) * stride + at, 0, 3);
      vi words[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        words[i] = row + i < rows ? load(reinterpret_cast<const int32_t*>(from + (row + i) * stride + at)) : zeroi();
      transpose(words);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(reinterpret_cast<int32_t*>(to + (at / 4 + i) * STEP), words[i]);
    }
  }
}

// Rows stay rows: panels[column / 64][row / GROUP][column % 64]; rows beyond are zeros up to a whole group.
template <class Dot>
inline void pack_as_rows(const char* from, int64_t stride, int64_t rows, int64_t columns, char* panels) {
  constexpr int GROUP = Dot::GROUP, BYTES = 4 / GROUP;
  constexpr int64_t WIDE = LANES * GROUP;  // columns of one vector
  const int64_t groups = (rows + GROUP - 1) / GROUP;
  for (int64_t group = 0; group < groups; ++group) {
    const char* a = from + group * GROUP * stride;
    for (int64_t column = 0; column < columns; column += WIDE) {
      char* to = panels + (column / PANEL * groups + group) * STEP + column % PANEL * 4;
      for (int64_t i = 0; i < GROUP; ++i) __builtin_prefetch(a + (i + AHEAD) * stride + column * BYTES, 0, 3);
      vi low = load(reinterpret_cast<const int32_t*>(a + column * BYTES));
      if (GROUP == 2) {
        bool pair = group * 2 + 1 < rows;
        vi other = pair ? load(reinterpret_cast<const int32_t*>(a + stride + column * BYTES)) : zeroi(), high;
        interleave(low, other, low, high);
        store(reinterpret_cast<int32_t*>(to + LANES * 4), high);
      }
      store(reinterpret_cast<int32_t*>(to), low);
    }
  }
}

inline int64_t bytes_as_columns(int64_t rows, int64_t bytes) { return round_up(rows, PANEL) * bytes; }
inline int64_t bytes_as_rows(int64_t rows, int64_t columns, int group) {
  return round_up(columns, PANEL) / PANEL * ((rows + group - 1) / group) * STEP;
}

}  // namespace
}  // namespace attend
}  // namespace MISS_ISA
}  // namespace miss
