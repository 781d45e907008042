// The memory of a decode step between its phases. Included by decoder_step.inl.h.
#pragma once

#include "decoder_step.h"

namespace miss {
namespace MISS_ISA {
namespace decode {
namespace {

inline int64_t whole_lines(int64_t bytes) { return blocks(bytes, 64) * 64; }

// Where everything lies that a step writes between its phases.
template <class T>
struct Room {
  T *x, *qkv, *attended, *product, *inner, *padded;
  float *wide, *code_scale, *group_sums, *largest;
  uint8_t* codes;
  Candidates* candidates;
  int* members;  // that have candidates
  int64_t bytes = 0;

  Room(char* base, const DecoderModel& m, int64_t rows, int64_t threads) : base_(base) {
    const int64_t most = m.width > m.inner ? m.width : m.inner, panels = blocks(m.vocabulary.columns, PANEL);
    take(x, rows * m.width);
    take(qkv, rows * 3 * m.width);
    take(attended, rows * m.width);
    take(product, rows * m.width);
    take(inner, rows * m.inner);
    take(padded, rows * (most + 128));
    take(wide, rows * m.inner);
    take(code_scale, rows);
    take(group_sums, rows * blocks(most, 32));
    take(largest, 2 * rows * panels);
    take(codes, rows * most);
    take(candidates, threads * rows);
    take(members, 1);
  }

 private:
  template <class Item>
  void take(Item*& to, int64_t count) {
    to = reinterpret_cast<Item*>(base_ + bytes);
    bytes += whole_lines(count * static_cast<int64_t>(sizeof(Item)));
  }
  char* base_;
};

}  // namespace
}  // namespace decode
}  // namespace MISS_ISA
}  // namespace miss
