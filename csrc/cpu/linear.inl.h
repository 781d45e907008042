// Linear layers over packed panels. Included by the file of each instruction set.
#include "linear.h"

namespace miss {
namespace MISS_ISA {
namespace {

template <class T>
vf part(const T* p, int n) {
  return n == LANES ? load(p) : load_n(p, n);
}
template <class T>
void put(T* p, vf v, int n) {
  if (n == LANES) store(p, v);
  else store_n(p, v, n);
}
vi part(const int32_t* p, int n) {
  if (n == LANES) return load(p);
  int32_t some[LANES] = {};
  memcpy(some, p, static_cast<size_t>(n) * 4);
  return load(some);
}

// What becomes of a tile of sums: numbers, plus bias, gelu, plus residual, stored as Out. Column by column, so that what
// belongs to a column is loaded once for all rows of the tile.
template <class Sum, class Out>
struct Finish {
  const LinearArgs& args;
  Out* y;                  // the row `base` of the output
  int64_t base;
  const float* row_scale;  // of the row `base`; nullptr where the sums are numbers already

  struct Column {
    vf scale, bias;
    vi offset;
  };

  // Inlined always: as a call it handed its three vectors over in memory, four times a tile.
  __attribute__((always_inline)) Column column(int64_t at, int n) const {
    Column c = {set1(1.0f), zero(), zeroi()};
    if (args.bias != nullptr)
      c.bias = args.bias_type == Type::f32 ? part(reinterpret_cast<const float*>(args.bias) + at, n)
                                           : part(reinterpret_cast<const bf16*>(args.bias) + at, n);
    if (Sum{1} / 2 == 0) {  // whole numbers: of int8
      c.scale = part(args.column_scale + at, n);
      c.offset = part(args.offset + at, n);
    }
    return c;
  }

  static vf number(const float* sums, const Column& c, const float*) { return add(load(sums), c.bias); }

  // (sum - 128 * the column's codes) * row's scale * column's scale, each step rounded as NumPy's would be.
  static vf number(const int32_t* sums, const Column& c, const float* row_scale) {
    return add(mul(mul(to_float(subi(load(sums), c.offset)), set1(*row_scale)), c.scale), c.bias);
  }

  // What a tile reads and writes besides its sums; pointers are to its first number.
  struct Tile {
    const float* scale;  // of its first row
    Out* to;
    Out* pre;
    const Out* residual;
    int64_t to_stride, columns, residual_stride;
  };

  // A tile of `num_rows` x `num_columns`; WHOLE: of ROWS x PANEL, known when compiled. Not inlined: inside of the
  // product's loops the compiler found no registers for it (5 % of a product over k = 768).
  template <bool GELU, bool KEEP, bool ADD, bool WHOLE>
  __attribute__((noinline)) void tile(const Sum* sums, int64_t stride, int num_rows, int64_t column, int num_columns,
                                      const Tile& given) const {
    Tile t = given;
    if (WHOLE) num_rows = ROWS, num_columns = PANEL, stride = t.to_stride = PANEL;
    for (int c = 0; c < num_columns; c += LANES) {
      const int n = WHOLE || num_columns - c >= LANES ? LANES : num_columns - c;
      const Column own = this->column(column + c, n);
#pragma GCC unroll 6
      for (int r = 0; r < num_rows; ++r) {
        vf v = number(sums + r * stride + c, own, t.scale + r);
        if (KEEP) put(t.pre + r * t.columns + c, v, n);
        if (GELU) v = gelu(v);
        if (ADD) v = add(v, part(t.residual + r * t.residual_stride + c, n));
        put(t.to + r * t.to_stride + c, v, n);
      }
    }
  }

  void prefetch(int64_t row, int num_rows, int64_t column, int num_columns) const {
    const char* to = reinterpret_cast<const char*>(y + (row - base) * args.columns + column);
    for (int r = 0; r < num_rows; ++r, to += args.columns * static_cast<int64_t>(sizeof(Out)))
      for (size_t at = 0; at < num_columns * sizeof(Out); at += 64) __builtin_prefetch(to + at, 1, 3);
  }

  // A whole tile is finished where it is small, then copied by lines: bf16 vectors are half lines, and stored one by one
  // between the arithmetic they took 3 % of a product over k = 768.
  void operator()(int64_t row, int num_rows, int64_t column, int num_columns, const Sum* sums, int64_t stride) const {
    Out* to = y + (row - base) * args.columns + column;
    if (num_rows < ROWS || num_columns < PANEL)
      return write<false>(row, num_rows, column, num_columns, sums, stride, to, args.columns);
    alignas(64) Out tile[ROWS * PANEL];
    write<true>(row, ROWS, column, PANEL, sums, stride, tile, PANEL);
    for (int r = 0; r < ROWS; ++r, to += args.columns) copy_row(tile + r * PANEL, to);
  }

  static void copy_row(const Out* from, Out* to) {
    constexpr int WORDS = PANEL * static_cast<int>(sizeof(Out)) / 4;
#pragma GCC unroll 8
    for (int i = 0; i < WORDS; i += LANES)
      store(reinterpret_cast<int32_t*>(to) + i, load(reinterpret_cast<const int32_t*>(from) + i));
  }

  // The tile to `to`, its rows `to_stride` apart. WHOLE: of ROWS rows and PANEL columns.
  template <bool WHOLE>
  void write(int64_t row, int num_rows, int64_t column, int num_columns, const Sum* sums, int64_t stride, Out* to,
             int64_t to_stride) const {
    Out* pre = args.pre == nullptr ? nullptr : reinterpret_cast<Out*>(args.pre) + row * args.columns + column;
    const Out* residual = args.residual == nullptr
                              ? nullptr
                              : reinterpret_cast<const Out*>(args.residual) + row * args.residual_stride + column;
    const float* scale = row_scale == nullptr ? nullptr : row_scale + (row - base);
    const Tile t = {scale, to, pre, residual, to_stride, args.columns, args.residual_stride};
    auto run = [&](auto form) { (this->*form)(sums, stride, num_rows, column, num_columns, t); };
    switch ((args.gelu ? 1 : 0) + (pre != nullptr ? 2 : 0) + (residual != nullptr ? 4 : 0)) {
      case 0: run(&Finish::tile<false, false, false, WHOLE>); break;
      case 1: run(&Finish::tile<true, false, false, WHOLE>); break;
      case 2: run(&Finish::tile<false, true, false, WHOLE>); break;
      case 3: run(&Finish::tile<true, true, false, WHOLE>); break;
      case 4: run(&Finish::tile<false, false, true, WHOLE>); break;
      case 5: run(&Finish::tile<true, false, true, WHOLE>); break;
      case 6: run(&Finish::tile<false, true, true, WHOLE>); break;
      default: run(&Finish::tile<true, true, true, WHOLE>); break;
    }
  }
};

// The same for y in pieces: a tile is finished where it is small, then copied.
template <class Sum, class Out>
struct Spread {
  Finish<Sum, Out> finish;

  Out* place(int64_t row, int64_t column) const {
    const LinearArgs& a = finish.args;
    return finish.y + a.places[column / a.piece] + row / a.y_tokens * a.y_outer + row % a.y_tokens * a.y_token;
  }

  template <class Body>
  void pieces(int64_t row, int num_rows, int64_t column, int num_columns, const Body& body) const {
    const int piece = static_cast<int>(finish.args.piece);
    for (int c = 0; c < num_columns; c += piece)
      for (int r = 0; r < num_rows; ++r) body(place(row + r, column + c), r, c);
  }

  void prefetch(int64_t row, int num_rows, int64_t column, int num_columns) const {
    pieces(row, num_rows, column, num_columns, [&](Out* to, int, int) {
      for (size_t at = 0; at < finish.args.piece * sizeof(Out); at += 64)
        __builtin_prefetch(reinterpret_cast<char*>(to) + at, 1, 3);
    });
  }

  void operator()(int64_t row, int num_rows, int64_t column, int num_columns, const Sum* sums, int64_t stride) const {
    alignas(64) Out tile[ROWS * PANEL];
    if (num_rows == ROWS && num_columns == PANEL)
      finish.template write<true>(row, ROWS, column, PANEL, sums, stride, tile, PANEL);
    else finish.template write<false>(row, num_rows, column, num_columns, sums, stride, tile, PANEL);
    if (finish.args.piece == PANEL) {
      for (int r = 0; r < num_rows; ++r) Finish<Sum, Out>::copy_row(tile + r * PANEL, place(row + r, column));
      return;
    }
    const size_t bytes = static_cast<size_t>(finish.args.piece) * sizeof(Out);
    pieces(row, num_rows, column, num_columns, [&](Out* to, int r, int c) { memcpy(to, tile + r * PANEL + c, bytes); });
  }
};

// The same for what becomes codes: numbers that are read once more, and the largest of each row on the way.
template <class Sum, bool GELU>
struct Coded {
  Finish<Sum, float> finish;
  int32_t* most;    // LANES a row, of the row `base` first, as in Largest; nullptr: not wanted
  int64_t y_stride;  // of finish.y, in numbers

  void prefetch(int64_t, int, int64_t, int) const {}  // finish.y is this thread's own, in L2

  void operator()(int64_t row, int num_rows, int64_t column, int num_columns, const Sum* sums, int64_t stride) const {
    if (num_rows == ROWS && num_columns == PANEL) tile<true>(row, ROWS, column, PANEL, sums, PANEL);
    else tile<false>(row, num_rows, column, num_columns, sums, stride);
  }

  template <bool WHOLE>
  __attribute__((noinline)) void tile(int64_t row, int num_rows, int64_t column, int num_columns, const Sum* sums,
                                      int64_t stride) const {
    if (WHOLE) num_rows = ROWS, num_columns = PANEL, stride = PANEL;
    const int64_t first = row - finish.base, to_stride = y_stride;
    float* y = finish.y + first * to_stride + column;
    const float* scale = finish.row_scale + first;
    vi largest[ROWS];
    for (int r = 0; r < ROWS; ++r) largest[r] = zeroi();
    for (int c = 0; c < num_columns; c += LANES) {
      const int n = WHOLE || num_columns - c >= LANES ? LANES : num_columns - c;
      const auto own = finish.column(column + c, n);
#pragma GCC unroll 6
      for (int r = 0; r < num_rows; ++r) {
        vf v = Finish<Sum, float>::number(sums + r * stride + c, own, scale + r);
        if (GELU) v = gelu_for_codes(v);
        put(y + r * to_stride + c, v, n);
        largest[r] = maxi(largest[r], as_ints(abs(WHOLE || n == LANES ? v : load_n(y + r * to_stride + c, n))));
      }
    }
    if (most == nullptr) return;
#pragma GCC unroll 6
    for (int r = 0; r < num_rows; ++r) {
      int32_t* to = most + (first + r) * LANES;
      store(to, column == 0 ? largest[r] : maxi(load(to), largest[r]));
    }
  }
};

// Rows of numbers (count, columns) as codes, `most` as Coded leaves it, or nullptr.
void write_codes(const float* y, int64_t y_stride, const int32_t* most, int64_t count, int64_t columns, uint8_t* codes,
                 float* scale) {
  for (int64_t r = 0; r < count; ++r) {
    Largest largest;
    if (most != nullptr) largest.most[0] = load(most + r * LANES);
    else spans(columns, [&](int64_t i, auto span) { largest.see(get(y + r * y_stride + i, span), span); });
    scale[r] = to_codes<true>(y + r * y_stride, columns, largest.value(), codes + r * columns);
  }
}

template <class T>
void quantise_rows(const T* x, int64_t first, int64_t last, int64_t k, int64_t stride, uint8_t* codes, float* scale) {
  for (int64_t r = first; r < last; ++r) scale[r - first] = quantise_row(x + r * stride, k, codes + (r - first) * k);
}

void quantise_any(const char* x, Type type, int64_t first, int64_t last, int64_t k, int64_t stride, uint8_t* codes,
                  float* scale) {
  if (type == Type::f32) quantise_rows(reinterpret_cast<const float*>(x), first, last, k, stride, codes, scale);
  else quantise_rows(reinterpret_cast<const bf16*>(x), first, last, k, stride, codes, scale);
}

void quantise(const char* x, Type type, int64_t rows, int64_t k, int64_t stride, uint8_t* codes, float* scale) {
  parallel(rows, 8, [&](int64_t begin, int64_t end) {
    quantise_any(x, type, begin, end, k, stride, codes + begin * k, scale + begin);
  });
}

int64_t size_of(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

// The rows of A as the product wants them: as they are, or quantised into scratch.
struct Source {
  const LinearArgs& args;
  bool quantised;  // here and now: x is float32 or bf16 and the panels int8

  int64_t stride() const { return quantised ? args.k : args.x_stride * size_of(args.x_type); }
  int64_t bytes() const { return args.k * (quantised ? 1 : size_of(args.x_type)); }

  // Rows from `row` on, and their scales.
  Rows rows(int64_t row, int count, const float** row_scale) const {
    if (!quantised) {
      *row_scale = args.row_scale == nullptr ? nullptr : args.row_scale + row;
      return {args.x + row * stride(), stride(), bytes()};
    }
    auto* codes = scratch_of<uint8_t>(0, count * args.k);
    auto* scale = scratch_of<float>(1, count);
    quantise_any(args.x, args.x_type, row, row + count, args.k, args.x_stride, codes, scale);
    *row_scale = scale;
    return {reinterpret_cast<const char*>(codes), stride(), bytes()};
  }
};

// Threads share out the rows: each finishes its own.
template <class Dot, class Out>
void by_rows(const LinearArgs& args, const Source& source) {
  for_chunks(args.rows, [&](int64_t row, int count) {
    const float* row_scale;
    Rows a = source.rows(row, count, &row_scale);
    if (args.places != nullptr) {
      const Spread<typename Dot::Sum, Out> spread{{args, reinterpret_cast<Out*>(args.y), row, row_scale}};
      multiply_chunk<Dot>(a, row, count, args.panels, args.columns, 0, blocks(args.columns, PANEL), spread);
      return;
    }
    Finish<typename Dot::Sum, Out> finish{args, reinterpret_cast<Out*>(args.y) + row * args.columns, row, row_scale};
    multiply_chunk<Dot>(a, row, count, args.panels, args.columns, 0, blocks(args.columns, PANEL), finish);
  });
}

// Few rows: threads share out the panels.
template <class Dot, class Out>
void by_panels(const LinearArgs& args, const Source& source) {
  const float* row_scale;
  Rows a = source.rows(0, static_cast<int>(args.rows), &row_scale);
  const Finish<typename Dot::Sum, Out> finish{args, reinterpret_cast<Out*>(args.y), 0, row_scale};
  if (args.places == nullptr) multiply<Dot>(a, args.rows, args.panels, args.columns, finish);
  else multiply<Dot>(a, args.rows, args.panels, args.columns, Spread<typename Dot::Sum, Out>{finish});
}

constexpr int64_t PADDING = 80;  // numbers between rows, an odd number of lines

// Codes for the next product: of int8 products, without a residual. A row's are the same either way.
template <bool GELU>
void to_codes_of(const LinearArgs& args, const Source& source) {
  const int64_t columns = args.columns;
  if (split_rows(args.rows)) {
    for_chunks(args.rows, [&](int64_t row, int count) {
      const float* row_scale;
      const Rows a = source.rows(row, count, &row_scale);
      // Rows of 3,072 numbers would all lie in the same sets of L1.
      const int64_t stride = blocks(columns, LANES) * LANES + PADDING;
      float* y = scratch_of<float>(2, count * stride);
      alignas(64) int32_t most[MOST_ROWS * LANES] = {};
      const Coded<int32_t, GELU> coded{{args, y, row, row_scale}, most, stride};
      multiply_chunk<DotU8S8>(a, row, count, args.panels, columns, 0, blocks(columns, PANEL), coded);
      write_codes(y, stride, most, count, columns, args.codes + row * columns, args.codes_scale + row);
    });
    return;
  }
  float* y = scratch_of<float>(2, args.rows * columns);
  const float* row_scale;
  const Rows a = source.rows(0, static_cast<int>(args.rows), &row_scale);
  multiply<DotU8S8>(a, args.rows, args.panels, columns, Coded<int32_t, GELU>{{args, y, 0, row_scale}, nullptr, columns});
  parallel(args.rows, 8, [&](int64_t begin, int64_t end) {
    write_codes(y + begin * columns, columns, nullptr, end - begin, columns, args.codes + begin * columns,
                args.codes_scale + begin);
  });
}

template <class Dot>
void run(const LinearArgs& args, bool quantised) {
  Source source{args, quantised};
  bool wide = args.y_type == Type::f32;
  if (split_rows(args.rows)) return wide ? by_rows<Dot, float>(args, source) : by_rows<Dot, bf16>(args, source);
  if (wide) by_panels<Dot, float>(args, source);
  else by_panels<Dot, bf16>(args, source);
}

void forward(const LinearArgs& args) {
  const bool numbers = args.x_type != Type::u8;
  if (args.codes != nullptr) args.gelu ? to_codes_of<true>(args, {args, numbers}) : to_codes_of<false>(args, {args, numbers});
  else if (args.column_scale != nullptr) run<DotU8S8>(args, numbers);
  else if (args.x_type == Type::f32) run<DotF32>(args, false);
  else run<DotBf16>(args, false);
}

// LANES words of a row from column k on.
inline vi words(const float* p, float) { return load(reinterpret_cast<const int32_t*>(p)); }
inline vi words(const bf16* p, bf16) { return load(reinterpret_cast<const int32_t*>(p)); }
inline vi words(const int8_t* p, int8_t) { return load(reinterpret_cast<const int32_t*>(p)); }
inline vi words(const float* p, bf16) { return pair_bf16(load(p), load(p + LANES)); }

// LANES words of group g from row r on, where rows lie side by side in memory.
template <class From>
inline vi side_by_side(const From* from, int64_t, float) {
  return load(reinterpret_cast<const int32_t*>(from));
}
template <class From>
inline vi side_by_side(const From* from, int64_t k_stride, bf16) {
  return zip_bf16(from, from + k_stride);
}

// One panel: 64 rows of `from` side by side, cut into groups along k. Whole blocks of LANES rows by LANES groups in
// registers (one element at a time took 0.42 ns, 17 % of the product of 577 rows at 768 x 768), edges by element.
template <class From, class To>
struct PanelPacker {
  static constexpr int GROUP = 4 / sizeof(To);
  const PackArgs& args;
  const From* from;  // the panel's first row
  To* to;
  int64_t rows, k;  // of the panel

  void by_element(int64_t r0, int64_t r1, int64_t k0, int64_t k1) const {
    for (int64_t i = k0; i < k1; ++i)
      for (int64_t r = r0; r < r1; ++r)
        convert(from[r * args.row_stride + i * args.k_stride], to[(i / GROUP * PANEL + r) * GROUP + i % GROUP]);
  }

  int32_t* target(int64_t group, int64_t row) const { return reinterpret_cast<int32_t*>(to) + group * PANEL + row; }

  void transposed_block(int64_t r, int64_t i) const {
    vi block[LANES];
#pragma GCC unroll 16
    for (int n = 0; n < LANES; ++n) block[n] = words(from + (r + n) * args.row_stride + i, To{});
    transpose(block);
#pragma GCC unroll 16
    for (int n = 0; n < LANES; ++n) store(target(i / GROUP + n, r), block[n]);
  }

  void pack() const {
    constexpr int BLOCK = LANES * GROUP;
    if (args.k_stride == 1) {
      for (int64_t i = 0; i < k; i += BLOCK)
        for (int64_t r = 0; r < rows; r += LANES) {
          if (r + LANES <= rows && i + BLOCK <= k) transposed_block(r, i);
          else by_element(r, r + LANES < rows ? r + LANES : rows, i, i + BLOCK < k ? i + BLOCK : k);
        }
      return;
    }
    bool vectors = args.row_stride == 1 && GROUP <= 2;
    for (int64_t i = 0; i < k; i += GROUP)
      for (int64_t r = 0; r < rows; r += LANES) {
        if (vectors && r + LANES <= rows && i + GROUP <= k) pack_side_by_side(r, i);
        else by_element(r, r + LANES < rows ? r + LANES : rows, i, i + GROUP < k ? i + GROUP : k);
      }
  }

  void pack_side_by_side(int64_t r, int64_t i) const {
    if constexpr (GROUP <= 2)
      store(target(i / GROUP, r), side_by_side(from + r + i * args.k_stride, args.k_stride, To{}));
  }
};

template <class From, class To>
void pack_panel(const PackArgs& args, int64_t panel) {
  constexpr int GROUP = 4 / sizeof(To);
  int64_t groups = blocks(args.k, GROUP);
  int64_t rows = args.rows - panel * PANEL < PANEL ? args.rows - panel * PANEL : PANEL;
  To* to = reinterpret_cast<To*>(args.panels) + panel * groups * PANEL * GROUP;
  if (groups > 0 && (rows < PANEL || args.k % GROUP != 0))  // without groups there is no memory
    memset(static_cast<void*>(to), 0, static_cast<size_t>(groups) * STEP);
  const From* from = reinterpret_cast<const From*>(args.from) + panel * PANEL * args.row_stride;
  PanelPacker<From, To>{args, from, to, rows, args.k}.pack();
  if (args.offset == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t total = 0;
    for (int64_t k = 0; k < args.k; ++k) total += as_code(from[r * args.row_stride + k * args.k_stride]);
    args.offset[panel * PANEL + r] = 128 * total;
  }
}

void pack(const PackArgs& args) {
  parallel(blocks(args.rows, PANEL), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      if (args.to_type == Type::s8) pack_panel<int8_t, int8_t>(args, p);
      else if (args.to_type == Type::f32) pack_panel<float, float>(args, p);
      else if (args.from_type == Type::f32) pack_panel<float, bf16>(args, p);
      else pack_panel<bf16, bf16>(args, p);
    }
  });
}

template <class Dot, class Out>
void packed_product_of(const PackedProductArgs& args) {
  LinearArgs plain = {};
  plain.columns = args.columns;
  Finish<float, Out> finish{plain, reinterpret_cast<Out*>(args.y), 0, nullptr};
  multiply_packed<Dot>(args.a, args.rows, args.k * size_of(args.type), args.b, args.columns, finish);
}

void packed_product(const PackedProductArgs& args) {
  if (args.type == Type::f32) packed_product_of<DotF32, float>(args);
  else if (args.y_type == Type::f32) packed_product_of<DotBf16, float>(args);
  else packed_product_of<DotBf16, bf16>(args);
}

template <class T>
void gelu_backward_of(const T* dy, const T* pre, int64_t count, T* dz) {
  parallel(blocks(count, 4096), 1, [&](int64_t begin, int64_t end) {
    int64_t stop = end * 4096 < count ? end * 4096 : count;
    for (int64_t i = begin * 4096; i < stop; i += LANES) {
      int n = stop - i < LANES ? static_cast<int>(stop - i) : LANES;
      put(dz + i, mul(part(dy + i, n), gelu_slope(part(pre + i, n))), n);
    }
  });
}

void gelu_backward(const char* dy, const char* pre, Type type, int64_t count, char* dz) {
  if (type == Type::f32)
    gelu_backward_of(reinterpret_cast<const float*>(dy), reinterpret_cast<const float*>(pre), count,
                     reinterpret_cast<float*>(dz));
  else
    gelu_backward_of(reinterpret_cast<const bf16*>(dy), reinterpret_cast<const bf16*>(pre), count,
                     reinterpret_cast<bf16*>(dz));
}

// Each thread its own columns, a line of them at a time; in spans of 256 rows, as the products' sums are.
template <class T>
void column_sums_of(const T* x, int64_t rows, int64_t columns, T* y) {
  parallel(blocks(columns, PANEL), 1, [&](int64_t begin, int64_t end) {
    int64_t stop = end * PANEL < columns ? end * PANEL : columns;
    for (int64_t c = begin * PANEL; c < stop; c += LANES) {
      int n = stop - c < LANES ? static_cast<int>(stop - c) : LANES;
      vf total = zero();
      for (int64_t r0 = 0; r0 < rows; r0 += 256) {
        vf some = zero();
        for (int64_t r = r0; r < rows && r < r0 + 256; ++r) some = add(some, part(x + r * columns + c, n));
        total = add(total, some);
      }
      put(y + c, total, n);
    }
  });
}

void column_sums(const char* x, Type type, int64_t rows, int64_t columns, char* y) {
  if (type == Type::f32)
    column_sums_of(reinterpret_cast<const float*>(x), rows, columns, reinterpret_cast<float*>(y));
  else
    column_sums_of(reinterpret_cast<const bf16*>(x), rows, columns, reinterpret_cast<bf16*>(y));
}

}  // namespace

extern const LinearKernels linear_kernels = {forward,       pack,        packed_product,
                                             gelu_backward, column_sums, quantise};

}  // namespace MISS_ISA
}  // namespace miss
