// Products of row-major matrices with packed panels: which thread does what, in which order, and who gets the sums.
// Knows caches and threads; does not know what is done with a sum (the epilogue's matter).
//
// On Zen 4 (32 KB L1, 1 MB L2, one 512-bit multiply a cycle) a tile of 6 x 64 sums takes 24 cycles a group of k, in
// which 256 bytes of panel come from L2 and 6 words of A from L1: the multiplier never waits for either.
#pragma once

namespace miss {
namespace {

constexpr int CHUNK = 8 * ROWS;         // at most so many rows share a panel while it is in L2, and their A stays there
constexpr int MOST_ROWS = PANEL;        // of a chunk: where A is packed, a chunk is a panel of it
constexpr int64_t BLOCKS_A_THREAD = 8;  // with fewer blocks of rows, threads share out the panels instead

inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t panel_bytes(int64_t bytes) { return blocks(bytes, 4) * STEP; }

// Block `block` of `num_blocks` that read the panel one after the other: its product, and its part of fetching what comes
// behind the panel's `bytes / 4` groups: 4 lines a group, in the time of the first 1, 2 or 4 blocks.
template <class Dot>
inline void fetching_product(int block, int num_blocks, int num_rows, const Rows& a, const char* panel, const char* next,
                             typename Dot::Sum* sums, bool fresh) {
  const int64_t part = a.bytes / 4 * 64;
  if (a.step != 4 || block >= 4) product<Dot>(num_rows, a, panel, sums, PANEL, fresh);
  else if (num_blocks >= 4) product_fetching<Dot, 1>(num_rows, a, panel, sums, PANEL, fresh, next + block * part);
  else if (num_blocks == 1) product_fetching<Dot, 4>(num_rows, a, panel, sums, PANEL, fresh, next);
  else if (block < 2) product_fetching<Dot, 2>(num_rows, a, panel, sums, PANEL, fresh, next + block * 2 * part);
  else product<Dot>(num_rows, a, panel, sums, PANEL, fresh);
}

// At most MOST_ROWS rows of A times panels first … last - 1, on this thread.
// epilogue(row, num_rows, column, num_columns, sums, stride) is called once a tile; `row` counts from first_row.
// epilogue.prefetch(row, num_rows, column, num_columns) comes before the tile's product, in whose time the lines that
// will be written can arrive.
template <class Dot, class Epilogue>
void multiply_chunk(const Rows& a, int64_t first_row, int num_rows, const char* panels, int64_t columns, int64_t first,
                    int64_t last, const Epilogue& epilogue) {
  using Sum = typename Dot::Sum;
  alignas(64) Sum sums[MOST_ROWS * PANEL];
  const int num_blocks = static_cast<int>(blocks(num_rows, ROWS));
  for (int64_t p = first; p < last; ++p) {
    const char* panel = panels + p * panel_bytes(a.bytes);
    int num_columns = static_cast<int>(columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL);
    for (int64_t k = 0; k < a.bytes || k == 0; k += Dot::SPAN) {
      int64_t bytes = a.bytes - k < Dot::SPAN ? a.bytes - k : Dot::SPAN;
      bool last_k = k + Dot::SPAN >= a.bytes;
      const char* next = last_k && p + 1 == last ? panels + first * panel_bytes(a.bytes) : panel + (k + bytes) / 4 * STEP;
      for (int r = 0; r < num_rows; r += ROWS) {
        int count = num_rows - r < ROWS ? num_rows - r : ROWS;
        if (last_k) epilogue.prefetch(first_row + r, count, p * PANEL, num_columns);
        fetching_product<Dot>(r / ROWS, num_blocks, count, a.from(r, k, bytes), panel + k / 4 * STEP, next,
                              sums + r * PANEL, k == 0);
        if (last_k) epilogue(first_row + r, count, p * PANEL, num_columns, sums + r * PANEL, int64_t{PANEL});
      }
    }
  }
}

// Whether threads share out the rows (each then finishes whole rows) or the panels. The sums are the same either way.
inline bool split_rows(int64_t rows) { return blocks(rows, ROWS) >= BLOCKS_A_THREAD * num_threads(); }

// body(first row, number of rows) for blocks begin … end - 1 in chunks of like size: each reads all panels anew, for few
// rows at the speed of memory. One block more than CHUNK has goes along.
template <class Body>
void chunks_of(int64_t begin, int64_t end, int64_t rows, const Body& body) {
  static_assert(CHUNK + ROWS <= MOST_ROWS, "a chunk has room for one block more");
  const int64_t num_chunks = end - begin > 1 ? blocks((end - begin - 1) * ROWS, CHUNK) : end - begin;
  for (int64_t c = 0; c < num_chunks; ++c) {
    const int64_t row = (begin + (end - begin) * c / num_chunks) * ROWS;
    const int64_t stop = (begin + (end - begin) * (c + 1) / num_chunks) * ROWS;
    body(row, static_cast<int>((stop < rows ? stop : rows) - row));
  }
}

// body(first row, number of rows) for chunks of rows, each thread its share. Whole blocks are shared out and whoever has
// the last takes what is left: as a block like the others, the 577th row gave one of two threads 294 rows (2 % of a
// product over 577).
template <class Body>
void for_chunks(int64_t rows, const Body& body) {
  const int64_t whole = rows / ROWS, all = blocks(rows, ROWS);
  parallel(whole > 0 ? whole : all, 1, [&](int64_t begin, int64_t end) {
    chunks_of(begin, end == whole ? all : end, rows, body);
  });
}

// A (rows) times panels of `columns` columns, on all threads; the epilogue is called concurrently.
template <class Dot, class Epilogue>
void multiply(const Rows& a, int64_t rows, const char* panels, int64_t columns, const Epilogue& epilogue) {
  int64_t num_panels = blocks(columns, PANEL);
  if (split_rows(rows)) {
    for_chunks(rows, [&](int64_t row, int count) {
      multiply_chunk<Dot>(a.from(row, 0, a.bytes), row, count, panels, columns, 0, num_panels,
                          epilogue);
    });
    return;
  }
  parallel(num_panels, 1, [&](int64_t begin, int64_t end) {
    chunks_of(0, blocks(rows, ROWS), rows, [&](int64_t row, int count) {
      multiply_chunk<Dot>(a.from(row, 0, a.bytes), row, count, panels, columns, begin, end, epilogue);
    });
  });
}

// A packed in panels too (bytes of a row as given, rest of its last group zero): threads share out A's panels.
template <class Dot, class Epilogue>
void multiply_packed(const char* a, int64_t rows, int64_t bytes, const char* panels, int64_t columns,
                     const Epilogue& epilogue) {
  parallel(blocks(rows, PANEL), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      int count = static_cast<int>(rows - p * PANEL < PANEL ? rows - p * PANEL : PANEL);
      multiply_chunk<Dot>({a + p * panel_bytes(bytes), 4, bytes, STEP}, p * PANEL, count, panels, columns, 0,
                          blocks(columns, PANEL), epilogue);
    }
  });
}

// An epilogue that is a plain function and writes nothing worth fetching.
template <class Function>
struct Plainly {
  const Function& function;
  void prefetch(int64_t, int, int64_t, int) const {}
  template <class... Args>
  void operator()(Args... args) const {
    function(args...);
  }
};

template <class Dot, class Function>
void gemm(const char* a, int64_t rows, int64_t row_bytes, int64_t bytes, const char* panels, int64_t columns,
          const Function& function) {
  multiply<Dot>({a, row_bytes, bytes}, rows, panels, columns, Plainly<Function>{function});
}

}  // namespace
}  // namespace miss
