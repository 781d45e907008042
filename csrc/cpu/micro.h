// The inner kernel of every product here (linears, attention, the head): a few rows of A times a panel of B.
// Knows registers and the panel's layout; does not know matrices, caches or epilogues.
//
// A panel is 64 columns of B cut into groups of 4 bytes along k (1 float, 2 bf16, or 4 int8 of one column):
//   panel[g][column]: 4 bytes, 256 bytes a group. Beyond K it holds zeros.
// A's rows are read 4 bytes at a time, and a row's last, partial group only up to its own end.
// Every sum runs over k from first to last in one accumulator, then over the spans of a row that are longer than
// Dot::SPAN (one float32 accumulator over 768 products has 2.5 times the error of MKL's; over 256 it has less): a row's
// result does not depend on what it is computed with.
#pragma once

namespace miss {
namespace {

constexpr int PANEL = 64;                              // columns of a panel
constexpr int ROWS = 6;                                // rows of the inner kernel: 6 x 64 sums fill 24 of 32 registers
constexpr int STEP = PANEL * 4;                        // bytes of a group
constexpr int VECS = REGISTERS == 32 ? 4 : 2;          // vectors of sums a row
constexpr int PARTS = PANEL / (VECS * LANES);          // turns to cover a panel: 1 with AVX-512, 4 with AVX2

struct DotF32 {
  static constexpr int GROUP = 1;
  static constexpr int64_t SPAN = 1024;  // bytes of a row that are summed in one go
  using Sum = float;
  using Acc = vf;
  static Acc none() { return zero(); }
  static Acc add(Acc a, Acc b) { return miss::add(a, b); }
  static Acc multiply(vi a, vi b, Acc c) { return fma(as_float(a), as_float(b), c); }
};

struct DotBf16 {
  static constexpr int GROUP = 2;
  static constexpr int64_t SPAN = 2048;
  using Sum = float;
  using Acc = vf;
  static Acc none() { return zero(); }
  static Acc add(Acc a, Acc b) { return miss::add(a, b); }
  static Acc multiply(vi a, vi b, Acc c) { return dot_bf16(a, b, c); }
};

struct DotU8S8 {  // A 0 … 255, B -128 … 127
  static constexpr int GROUP = 4;
  static constexpr int64_t SPAN = 4096;
  using Sum = int32_t;
  using Acc = vi;
  static Acc none() { return zeroi(); }
  static Acc add(Acc a, Acc b) { return addi(a, b); }
  static Acc multiply(vi a, vi b, Acc c) { return dot_u8s8(a, b, c); }
};

// Always inlined: left to itself the compiler stops inlining when a file grows, and the sums go through memory (40 % of
// the rate).
template <class Dot, int NUM_ROWS, int NUM_VECS>
__attribute__((always_inline)) inline void step_all(const char* const* a, int64_t at, const char* b,
                                                    typename Dot::Acc (&acc)[NUM_ROWS][NUM_VECS]) {
  vi columns[NUM_VECS];
#pragma GCC unroll 4
  for (int v = 0; v < NUM_VECS; ++v) columns[v] = load(reinterpret_cast<const int32_t*>(b + v * LANES * 4));
#pragma GCC unroll 6
  for (int r = 0; r < NUM_ROWS; ++r) {
    int32_t word;
    memcpy(&word, a[r] + at, 4);
    vi row = set1i(word);
#pragma GCC unroll 4
    for (int v = 0; v < NUM_VECS; ++v) acc[r][v] = Dot::multiply(row, columns[v], acc[r][v]);
  }
}

// A's rows of one product: row r starts at data + r * stride, and its next 4 bytes stand `step` further: 4 where A is
// row-major, STEP where A is itself packed in panels (then `stride` is 4 and its end is padded with zeros).
struct Rows {
  const char* data;
  int64_t stride;
  int64_t bytes;  // of a row
  int64_t step = 4;

  Rows from(int64_t row, int64_t k, int64_t some) const { return {data + row * stride + k / 4 * step, stride, some, step}; }
};

// sums (NUM_ROWS, columns of NUM_VECS vectors; `stride` apart) = or += rows of A times part of a panel.
// fresh: do not add what stands in sums. A_STEP: a.step, known when compiled. FETCH: how many lines of what will be read
// after this, from `next` on, are brought towards L2 a group: a panel that comes from memory while its first rows are
// multiplied arrives at half the speed at which it could be read.
template <class Dot, int NUM_ROWS, int NUM_VECS, int64_t A_STEP = 4, int FETCH = 0>
inline void micro(const Rows& a, const char* b, typename Dot::Sum* sums, int64_t stride, bool fresh,
                  const char* next = nullptr) {
  typename Dot::Acc acc[NUM_ROWS][NUM_VECS];
  const char* rows[NUM_ROWS];
#pragma GCC unroll 6
  for (int r = 0; r < NUM_ROWS; ++r) {
    rows[r] = a.data + r * a.stride;
#pragma GCC unroll 4
    for (int v = 0; v < NUM_VECS; ++v) acc[r][v] = Dot::none();
  }
  int64_t at = 0, groups = A_STEP == 4 ? a.bytes / 4 : (a.bytes + 3) / 4, rest = A_STEP == 4 ? a.bytes % 4 : 0;
  for (int64_t g = 0; g < groups; ++g, at += A_STEP, b += STEP) {
#pragma GCC unroll 4
    for (int f = 0; f < FETCH; ++f) __builtin_prefetch(next + f * 64, 0, 2);
    next += FETCH * 64;
    step_all<Dot>(rows, at, b, acc);
  }
  if (rest != 0) {  // only up to the row's own end
    int32_t words[NUM_ROWS] = {};
    const char* tails[NUM_ROWS];
    for (int r = 0; r < NUM_ROWS; ++r) {
      memcpy(&words[r], rows[r] + at, static_cast<size_t>(rest));
      tails[r] = reinterpret_cast<const char*>(&words[r]);
    }
    step_all<Dot>(tails, 0, b, acc);
  }
#pragma GCC unroll 6
  for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NUM_VECS; ++v) {
      auto* to = sums + r * stride + v * LANES;
      store(to, fresh ? acc[r][v] : Dot::add(load(to), acc[r][v]));
    }
}

// 1 to ROWS rows.
template <class Dot, int64_t A_STEP, int NUM_VECS = VECS, int FETCH = 0>
inline void micro_rows(int num_rows, const Rows& a, const char* b, typename Dot::Sum* sums, int64_t stride, bool fresh,
                       const char* next = nullptr) {
  switch (num_rows) {
    case 1: micro<Dot, 1, NUM_VECS, A_STEP, FETCH>(a, b, sums, stride, fresh, next); break;
    case 2: micro<Dot, 2, NUM_VECS, A_STEP, FETCH>(a, b, sums, stride, fresh, next); break;
    case 3: micro<Dot, 3, NUM_VECS, A_STEP, FETCH>(a, b, sums, stride, fresh, next); break;
    case 4: micro<Dot, 4, NUM_VECS, A_STEP, FETCH>(a, b, sums, stride, fresh, next); break;
    case 5: micro<Dot, 5, NUM_VECS, A_STEP, FETCH>(a, b, sums, stride, fresh, next); break;
    default: micro<Dot, 6, NUM_VECS, A_STEP, FETCH>(a, b, sums, stride, fresh, next); break;
  }
}

// The same for 1 to ROWS rows and the panel's first `columns` (a multiple of VECS * LANES, at most 64).
template <class Dot>
inline void product(int num_rows, const Rows& a, const char* panel, typename Dot::Sum* sums, int64_t stride, bool fresh,
                    int columns = PANEL) {
  for (int c = 0; c < columns; c += VECS * LANES) {
    if (a.step == 4) micro_rows<Dot, 4>(num_rows, a, panel + c * 4, sums + c, stride, fresh);
    else micro_rows<Dot, STEP>(num_rows, a, panel + c * 4, sums + c, stride, fresh);
  }
}

// The same for row-major A and all of the panel's columns, fetching FETCH lines a group from `next` on meanwhile.
template <class Dot, int FETCH>
inline void product_fetching(int num_rows, const Rows& a, const char* panel, typename Dot::Sum* sums, int64_t stride,
                             bool fresh, const char* next) {
  micro_rows<Dot, 4, VECS, FETCH>(num_rows, a, panel, sums, stride, fresh, next);
  for (int c = VECS * LANES; c < PANEL; c += VECS * LANES)
    micro_rows<Dot, 4>(num_rows, a, panel + c * 4, sums + c, stride, fresh);
}

// Row-major A, `row_bytes` apart.
template <class Dot>
inline void product(int num_rows, const char* a, int64_t row_bytes, int64_t bytes, const char* panel,
                    typename Dot::Sum* sums, int64_t stride, bool fresh, int columns = PANEL) {
  product<Dot>(num_rows, Rows{a, row_bytes, bytes}, panel, sums, stride, fresh, columns);
}

}  // namespace
}  // namespace miss
