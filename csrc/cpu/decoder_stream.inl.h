// Products of few rows with panels that come from memory. Included by decoder_step.inl.h.
//
// gemm.h's chunk leaves fetching to the processor, which is enough where a panel serves many rows; with one row the
// reading is all there is, and each group of a panel asks for the one that is AHEAD bytes further, and the
// last ones for the beginning of what the thread reads next. Towards L2: a step of base in int8 takes 4.03 ms so, 4.35
// with prefetches towards L1, of which a core holds fewer (AMD EPYC Zen 4, two threads).
#pragma once

namespace miss {
namespace MISS_ISA {
namespace decode {
namespace {

// What a thread reads after what it is reading: behind `end` (of its panels) it goes on at `next`.
struct Ahead {
  const char *end, *next;

  const char* of(const char* at) const { return at + AHEAD < end ? at + AHEAD : next + (at + AHEAD - end); }
};

// One panel's product with up to ROWS rows, the panel being on its way from memory.
template <class Dot, int NUM_ROWS>
inline void stream(const Rows& a, const char* b, typename Dot::Sum* sums, bool fresh, const Ahead& ahead) {
  for (int c = 0; c < PANEL; c += VECS * LANES, sums += VECS * LANES) {
    typename Dot::Acc acc[NUM_ROWS][VECS];
    const char* rows[NUM_ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < NUM_ROWS; ++r) {
      rows[r] = a.data + r * a.stride;
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) acc[r][v] = Dot::none();
    }
    const char *at = b + c * 4, *fetch = ahead.of(b);
    for (int64_t k = 0; k < a.bytes; k += 4, at += STEP) {
      if (c == 0) {
#pragma GCC unroll 4
        for (int line = 0; line < STEP; line += 64) _mm_prefetch(fetch + line, _MM_HINT_T1);
        fetch += STEP;
        if (fetch == ahead.end) fetch = ahead.next;
      }
      step_all<Dot>(rows, k, at, acc);
    }
#pragma GCC unroll 6
    for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        auto* to = sums + r * PANEL + v * LANES;
        store(to, fresh ? acc[r][v] : Dot::add(load(to), acc[r][v]));
      }
  }
}

template <class Dot>
inline void stream_rows(int num_rows, const Rows& a, const char* b, typename Dot::Sum* sums, bool fresh,
                        const Ahead& ahead) {
  switch (num_rows) {
    case 1: stream<Dot, 1>(a, b, sums, fresh, ahead); break;
    case 2: stream<Dot, 2>(a, b, sums, fresh, ahead); break;
    case 3: stream<Dot, 3>(a, b, sums, fresh, ahead); break;
    case 4: stream<Dot, 4>(a, b, sums, fresh, ahead); break;
    case 5: stream<Dot, 5>(a, b, sums, fresh, ahead); break;
    default: stream<Dot, 6>(a, b, sums, fresh, ahead); break;
  }
}

// multiply_chunk, whose first rows of each panel fetch it. A's rows are whole groups.
template <class Dot, class Epilogue>
void stream_chunk(const Rows& a, int64_t first_row, int num_rows, const char* panels, int64_t columns, int64_t first,
                  int64_t last, const char* next, const Epilogue& epilogue) {
  const Ahead ahead = {panels + last * panel_bytes(a.bytes), next};
  using Sum = typename Dot::Sum;
  alignas(64) Sum sums[MOST_ROWS * PANEL];
  for (int64_t p = first; p < last; ++p) {
    const char* panel = panels + p * panel_bytes(a.bytes);
    const int num_columns = static_cast<int>(columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL);
    for (int64_t k = 0; k < a.bytes; k += Dot::SPAN) {
      const int64_t bytes = a.bytes - k < Dot::SPAN ? a.bytes - k : Dot::SPAN;
      const char* b = panel + k / 4 * STEP;
      for (int r = 0; r < num_rows; r += ROWS) {
        const int count = num_rows - r < ROWS ? num_rows - r : ROWS;
        if (r == 0) stream_rows<Dot>(count, a.from(0, k, bytes), b, sums, k == 0, ahead);
        else product<Dot>(count, a.from(r, k, bytes), b, sums + r * PANEL, PANEL, k == 0);
      }
    }
    for (int r = 0; r < num_rows; r += ROWS)
      epilogue(first_row + r, num_rows - r < ROWS ? num_rows - r : ROWS, p * PANEL, num_columns, sums + r * PANEL,
               int64_t{PANEL});
  }
}

}  // namespace
}  // namespace decode
}  // namespace MISS_ISA
}  // namespace miss
