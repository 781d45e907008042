// Linear layers over packed panels. Included by the file of each instruction set.
#include "linear.h"

namespace miss {
namespace MISS_ISA {
namespace {

// What becomes of a tile of sums. One for each pair of sums' and output's type.
template <class Sum, class Out>
struct Finish {
  const LinearArgs& args;
  Out* y;              // the row `base` of the output
  int64_t base;
  const float* row_scale;  // of the row `base`

  vf number(const float* sums, int64_t, int64_t, int) const { return load(sums); }

  // (sum - 128 * the column's codes) * row's scale * column's scale
  vf number(const int32_t* sums, int64_t row, int64_t column, int n) const {
    vi offset = n == LANES ? load(args.offset + column) : load_ints(args.offset + column, n);
    vf scale = n == LANES ? load(args.column_scale + column) : load_n(args.column_scale + column, n);
    return mul(mul(to_float(subi(load(sums), offset)), set1(row_scale[row - base])), scale);
  }

  static vi load_ints(const int32_t* p, int n) {
    int32_t some[LANES] = {};
    memcpy(some, p, static_cast<size_t>(n) * 4);
    return load(some);
  }

  template <class T>
  static vf part(const T* p, int n) {
    return n == LANES ? load(p) : load_n(p, n);
  }
  static void put(Out* p, vf v, int n) {
    if (n == LANES) store(p, v);
    else store_n(p, v, n);
  }

  vf bias(int64_t column, int n) const {
    if (args.bias_type == Type::f32) return part(reinterpret_cast<const float*>(args.bias) + column, n);
    return part(reinterpret_cast<const bf16*>(args.bias) + column, n);
  }

  inline __attribute__((always_inline)) void vector(const Sum* sums, int64_t row, int64_t column, int n) const {
    vf v = number(sums, row, column, n);
    if (args.bias != nullptr) v = add(v, bias(column, n));
    int64_t at = (row - base) * args.columns + column;
    if (args.pre != nullptr) put(reinterpret_cast<Out*>(args.pre) + row * args.columns + column, v, n);
    if (args.gelu) v = gelu(v);
    if (args.residual != nullptr)
      v = add(v, part(reinterpret_cast<const Out*>(args.residual) + row * args.residual_stride + column, n));
    put(y + at, v, n);
  }

  void operator()(int64_t row, int num_rows, int64_t column, int num_columns, const Sum* sums, int64_t stride) const {
    for (int r = 0; r < num_rows; ++r) {
      int c = 0;
      for (; c + LANES <= num_columns; c += LANES) vector(sums + r * stride + c, row + r, column + c, LANES);
      if (c < num_columns) vector(sums + r * stride + c, row + r, column + c, num_columns - c);
    }
  }
};

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

// Threads share out the rows: each finishes its own, from quantising x to quantising y.
template <class Dot, class Out>
void by_rows(const LinearArgs& args, const Source& source) {
  for_chunks(args.rows, [&](int64_t row, int count) {
    const float* row_scale;
    Rows a = source.rows(row, count, &row_scale);
    if (args.codes == nullptr) {
      Finish<typename Dot::Sum, Out> finish{args, reinterpret_cast<Out*>(args.y) + row * args.columns, row, row_scale};
      multiply_chunk<Dot>(a, row, count, args.panels, args.columns, 0, blocks(args.columns, PANEL), finish);
      return;
    }
    float* y = scratch_of<float>(2, count * args.columns);
    Finish<typename Dot::Sum, float> finish{args, y, row, row_scale};
    multiply_chunk<Dot>(a, row, count, args.panels, args.columns, 0, blocks(args.columns, PANEL), finish);
    quantise_rows(y, 0, count, args.columns, args.columns, args.codes + row * args.columns, args.codes_scale + row);
  });
}

// Few rows: threads share out the panels. `y`: where the whole of it is gathered.
template <class Dot, class Out>
void by_panels(const LinearArgs& args, const Source& source, Out* y) {
  const float* row_scale;
  Rows a = source.rows(0, static_cast<int>(args.rows), &row_scale);
  multiply<Dot>(a, args.rows, args.panels, args.columns, Finish<typename Dot::Sum, Out>{args, y, 0, row_scale});
}

template <class Dot>
void run(const LinearArgs& args, bool quantised) {
  Source source{args, quantised};
  bool wide = args.codes != nullptr || args.y_type == Type::f32;
  if (split_rows(args.rows)) return wide ? by_rows<Dot, float>(args, source) : by_rows<Dot, bf16>(args, source);
  if (args.codes != nullptr) {
    float* y = scratch_of<float>(2, args.rows * args.columns);
    by_panels<Dot, float>(args, source, y);
    quantise(reinterpret_cast<const char*>(y), Type::f32, args.rows, args.columns, args.columns, args.codes,
             args.codes_scale);
    return;
  }
  if (wide) by_panels<Dot, float>(args, source, reinterpret_cast<float*>(args.y));
  else by_panels<Dot, bf16>(args, source, reinterpret_cast<bf16*>(args.y));
}

void forward(const LinearArgs& args) {
  if (args.column_scale != nullptr) run<DotU8S8>(args, args.x_type != Type::u8);
  else if (args.x_type == Type::f32) run<DotF32>(args, false);
  else run<DotBf16>(args, false);
}

// One panel: 64 rows of `from` side by side, cut into groups along k.
template <class From, class To>
void pack_panel(const PackArgs& args, int64_t panel) {
  constexpr int GROUP = 4 / sizeof(To);
  int64_t groups = blocks(args.k, GROUP);
  To* to = reinterpret_cast<To*>(args.panels) + panel * groups * PANEL * GROUP;
  const From* from = reinterpret_cast<const From*>(args.from);
  memset(static_cast<void*>(to), 0, static_cast<size_t>(groups) * STEP);
  int64_t rows = args.rows - panel * PANEL < PANEL ? args.rows - panel * PANEL : PANEL;
  // Blocks of 16 x 64 elements: whichever of the two strides is 1, lines are used up while they are in L1.
  for (int64_t k0 = 0; k0 < args.k; k0 += 64) {
    int64_t k1 = k0 + 64 < args.k ? k0 + 64 : args.k;
    for (int64_t r0 = 0; r0 < rows; r0 += 16) {
      int64_t r1 = r0 + 16 < rows ? r0 + 16 : rows;
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t r = r0; r < r1; ++r)
          convert(from[(panel * PANEL + r) * args.row_stride + k * args.k_stride],
                  to[(k / GROUP * PANEL + r) * GROUP + k % GROUP]);
    }
  }
  if (args.offset == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t total = 0;
    for (int64_t k = 0; k < args.k; ++k) total += static_cast<int32_t>(as_code(to[(k / GROUP * PANEL + r) * GROUP + k % GROUP]));
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

}  // namespace

extern const LinearKernels linear_kernels = {forward, pack, quantise};

}  // namespace MISS_ISA
}  // namespace miss
