// Products of float rows with packed int8 and int4 weights. Included by the file of each instruction set.
//
// The arithmetic of a row is the same on both ways, so that it does not depend on how many rows there are: codes as
// exact floats or bf16, sums over a span (int8) or a group (int4) in float32, then times the scale.
//   few rows:  codes are decoded in registers, once a row of the batch: the weight is read at the speed of memory
//   more rows: a panel is decoded into scratch once and multiplied as any panel is
#include "weight_only.h"

namespace miss {
namespace MISS_ISA {
namespace {

constexpr int64_t FEW = 4;  // rows up to which decoding in registers is faster
// Bytes to ask for ahead of the reading; 1.5 to 16 KB do alike, past the caches (NTA) is 20 % slower.
constexpr int64_t AHEAD = 4096;

// An int8 code times 2 ** 24, which the columns' scales take back: two instructions instead of three.
constexpr float CODE_UNIT = 1.0f / 16777216.0f;

template <int I>
vf byte_number(vi word) {
  return to_float(top_byte<I>(word));
}
template <int I>
vi byte_pair(vi word) {
  return either(right_zero<16>(as_int(byte_number<I>(word))), both(as_int(byte_number<I + 1>(word)), set1i(-65536)));
}

// How a word of codes meets x. NUMBERS: how many k of x a word holds. step(word, x, acc): x points at the first of them.
template <class T, bool INT4>
struct Codes;

template <>
struct Codes<float, false> {
  static constexpr int NUMBERS = 4;
  using Dot = DotF32;
  template <class Use>
  __attribute__((always_inline)) static void each(vi word, const Use& use) {
    use(0, as_int(byte_number<0>(word)));
    use(1, as_int(byte_number<1>(word)));
    use(2, as_int(byte_number<2>(word)));
    use(3, as_int(byte_number<3>(word)));
  }
};
template <>
struct Codes<bf16, false> {
  static constexpr int NUMBERS = 4;
  using Dot = DotBf16;
  template <class Use>
  __attribute__((always_inline)) static void each(vi word, const Use& use) {
    use(0, byte_pair<0>(word));
    use(1, byte_pair<2>(word));
  }
};
template <>
struct Codes<float, true> {
  static constexpr int NUMBERS = 8;
  using Dot = DotF32;
  template <class Use>
  __attribute__((always_inline)) static void each(vi word, const Use& use) {
    use(0, as_int(nibble(word)));
    use(1, as_int(nibble(right_zero<16>(word))));
    use(2, as_int(nibble(right_zero<4>(word))));
    use(3, as_int(nibble(right_zero<20>(word))));
    use(4, as_int(nibble(right_zero<8>(word))));
    use(5, as_int(nibble(right_zero<24>(word))));
    use(6, as_int(nibble(right_zero<12>(word))));
    use(7, as_int(nibble(right_zero<28>(word))));
  }
};
template <>
struct Codes<bf16, true> {
  static constexpr int NUMBERS = 8;
  using Dot = DotBf16;
  template <class Use>
  __attribute__((always_inline)) static void each(vi word, const Use& use) {
    use(0, nibble_pair(word));
    use(1, nibble_pair(right_zero<4>(word)));
    use(2, nibble_pair(right_zero<8>(word)));
    use(3, nibble_pair(right_zero<12>(word)));
  }
};

// x as the kernels read it: rows padded with zeros to whole words of codes (or groups), and sums over its groups.
template <class T>
struct Padded {
  const T* data;
  int64_t stride;
  const float* group_sums;  // (rows, groups) in int4 with zeros; else nullptr
  int64_t groups;
};

// acc += rows of x times `steps` words of codes. words: the panel's, from the part's first column on.
template <class C, class T, int NUM_ROWS>
__attribute__((always_inline)) inline void decode_and_sum(const char* words, int64_t steps, const T* x, int64_t stride,
                                                          vf (&acc)[NUM_ROWS][VECS]) {
  for (int64_t s = 0; s < steps; ++s, words += STEP, x += C::NUMBERS) {
#pragma GCC unroll 4
    for (int line = 0; line < VECS * LANES * 4; line += 64) _mm_prefetch(words + AHEAD + line, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      vi word = load(reinterpret_cast<const int32_t*>(words + v * LANES * 4));
      C::each(word, [&](int i, vi numbers) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < NUM_ROWS; ++r) {
          int32_t bits;
          memcpy(&bits, reinterpret_cast<const char*>(x + r * stride) + i * 4, 4);
          acc[r][v] = C::Dot::multiply(set1i(bits), numbers, acc[r][v]);
        }
      });
    }
  }
}

// total += sums * scale (+ the part of the zeros), a group's, for one vector of columns.
inline vf scaled(vf sums, vf total, const uint16_t* scale, const uint8_t* zero, float group_sum) {
  vf s = load_half(scale);
  if (zero != nullptr) total = fma(mul(sub(set1(8.0f), load(zero)), s), set1(group_sum), total);
  return fma(sums, s, total);
}

template <class T>
struct WeightOnly {
  const WeightOnlyArgs& args;
  Padded<T> x;

  int64_t panel_size() const {
    return args.group == 0 ? panel_bytes(args.k) : x.groups * int4_group_bytes(args.group, args.zeros);
  }

  void finish(const float* totals, int64_t row, int num_rows, int64_t panel) const {
    LinearArgs plain = {};
    plain.columns = args.columns;
    plain.bias = args.bias;
    plain.bias_type = args.bias_type;
    plain.gelu = args.gelu;
    Finish<float, T> finish{plain, reinterpret_cast<T*>(args.y), 0, nullptr};
    int64_t left = args.columns - panel * PANEL;
    finish(row, num_rows, panel * PANEL, static_cast<int>(left < PANEL ? left : PANEL), totals, PANEL);
  }

  // int8's sums times the columns' scales.
  void scale_columns(float* totals, int num_rows, int64_t panel) const {
    for (int64_t c = 0; c < PANEL && panel * PANEL + c < args.columns; c += LANES) {
      int64_t at = panel * PANEL + c;
      int n = static_cast<int>(args.columns - at < LANES ? args.columns - at : LANES);
      vf scale = mul(part(args.column_scale + at, n), set1(CODE_UNIT));
      for (int r = 0; r < num_rows; ++r) store(totals + r * PANEL + c, mul(load(totals + r * PANEL + c), scale));
    }
  }

  template <int NUM_ROWS>
  void int8_in_registers(const char* panel, float* totals) const {
    using C = Codes<T, false>;
    constexpr int64_t SPAN = C::Dot::SPAN / static_cast<int64_t>(sizeof(T));  // numbers
    for (int c = 0; c < PANEL; c += VECS * LANES) {
      vf total[NUM_ROWS][VECS];
      for (int64_t k = 0; k < args.k; k += SPAN) {
        vf acc[NUM_ROWS][VECS];
#pragma GCC unroll 4
        for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < VECS; ++v) acc[r][v] = zero();
        int64_t steps = blocks(args.k - k < SPAN ? args.k - k : SPAN, C::NUMBERS);
        decode_and_sum<C, T, NUM_ROWS>(panel + k / C::NUMBERS * STEP + c * 4, steps, x.data + k, x.stride, acc);
#pragma GCC unroll 4
        for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < VECS; ++v) total[r][v] = k == 0 ? acc[r][v] : add(total[r][v], acc[r][v]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) store(totals + r * PANEL + c + v * LANES, total[r][v]);
    }
  }

  template <int NUM_ROWS>
  void int4_in_registers(const char* panel, float* totals) const {
    using C = Codes<T, true>;
    int64_t size = int4_group_bytes(args.group, args.zeros), codes = args.group / 8 * STEP;
    for (int c = 0; c < PANEL; c += VECS * LANES) {
      vf total[NUM_ROWS][VECS];
#pragma GCC unroll 4
      for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) total[r][v] = zero();
      for (int64_t g = 0; g < x.groups; ++g) {
        const char* at = panel + g * size;
        vf acc[NUM_ROWS][VECS];
#pragma GCC unroll 4
        for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < VECS; ++v) acc[r][v] = zero();
        decode_and_sum<C, T, NUM_ROWS>(at + c * 4, args.group / 8, x.data + g * args.group, x.stride, acc);
        const uint16_t* scale = reinterpret_cast<const uint16_t*>(at + codes) + c;
        const uint8_t* zeros = args.zeros ? reinterpret_cast<const uint8_t*>(at + codes + 128) + c : nullptr;
#pragma GCC unroll 4
        for (int r = 0; r < NUM_ROWS; ++r) {
          float sums = args.zeros ? x.group_sums[r * x.groups + g] : 0.0f;
#pragma GCC unroll 4
          for (int v = 0; v < VECS; ++v)
            total[r][v] = scaled(acc[r][v], total[r][v], scale + v * LANES,
                                 zeros == nullptr ? nullptr : zeros + v * LANES, sums);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < NUM_ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) store(totals + r * PANEL + c + v * LANES, total[r][v]);
    }
  }

  // `steps` words of 64 columns each as a panel of T.
  template <bool INT4>
  static char* decode(const char* words, int64_t steps, char* to) {
    using C = Codes<T, INT4>;
    constexpr int GROUPS = C::NUMBERS / C::Dot::GROUP;  // of the panel of T, a word
    for (int64_t s = 0; s < steps; ++s, words += STEP, to += GROUPS * STEP)
      for (int c = 0; c < PANEL; c += LANES)
        C::each(load(reinterpret_cast<const int32_t*>(words + c * 4)), [&](int i, vi numbers) {
          store(reinterpret_cast<int32_t*>(to + i * STEP + c * 4), numbers);
        });
    return to;
  }

  Rows rows_of_x(int64_t row, int64_t k, int64_t numbers) const {
    constexpr int64_t SIZE = sizeof(T);
    return {reinterpret_cast<const char*>(x.data + row * x.stride + k), x.stride * SIZE, numbers * SIZE};
  }

  void int8_rows(const char* decoded, int64_t row, int num_rows, float* totals) const {
    using Dot = typename Codes<T, false>::Dot;
    constexpr int64_t SPAN = Dot::SPAN / static_cast<int64_t>(sizeof(T));
    for (int64_t k = 0; k < x.stride; k += SPAN) {
      int64_t numbers = x.stride - k < SPAN ? x.stride - k : SPAN;
      product<Dot>(num_rows, rows_of_x(row, k, numbers), decoded + k / Dot::GROUP * STEP, totals, PANEL, k == 0);
    }
  }

  void int4_rows(const char* panel, const char* decoded, int64_t row, int num_rows, float* totals) const {
    using Dot = typename Codes<T, true>::Dot;
    int64_t size = int4_group_bytes(args.group, args.zeros), codes = args.group / 8 * STEP;
    alignas(64) float sums[ROWS * PANEL];
    for (int64_t g = 0; g < x.groups; ++g) {
      product<Dot>(num_rows, rows_of_x(row, g * args.group, args.group), decoded + g * args.group / Dot::GROUP * STEP,
                   sums, PANEL, true);
      const char* at = panel + g * size + codes;
      for (int c = 0; c < PANEL; c += LANES)
        for (int r = 0; r < num_rows; ++r) {
          vf total = g == 0 ? zero() : load(totals + r * PANEL + c);
          float group_sum = args.zeros ? x.group_sums[(row + r) * x.groups + g] : 0.0f;
          total = scaled(load(sums + r * PANEL + c), total, reinterpret_cast<const uint16_t*>(at) + c,
                         args.zeros ? reinterpret_cast<const uint8_t*>(at + 128) + c : nullptr, group_sum);
          store(totals + r * PANEL + c, total);
        }
    }
  }

  template <int NUM_ROWS>
  void in_registers(const char* at, float* totals) const {
    if (args.group == 0) int8_in_registers<NUM_ROWS>(at, totals);
    else int4_in_registers<NUM_ROWS>(at, totals);
  }

  void few_rows(const char* at, int64_t panel) const {
    alignas(64) float totals[FEW * PANEL];
    switch (args.rows) {
      case 1: in_registers<1>(at, totals); break;
      case 2: in_registers<2>(at, totals); break;
      case 3: in_registers<3>(at, totals); break;
      default: in_registers<4>(at, totals); break;
    }
    if (args.group == 0) scale_columns(totals, static_cast<int>(args.rows), panel);
    finish(totals, 0, static_cast<int>(args.rows), panel);
  }

  void many_rows(const char* at, int64_t panel) const {
    alignas(64) float totals[ROWS * PANEL];
    char* decoded = scratch_of<char>(0, (x.stride + 8) * PANEL * static_cast<int64_t>(sizeof(T)));
    if (args.group == 0) decode<false>(at, blocks(args.k, 4), decoded);
    else {
      char* to = decoded;
      for (int64_t g = 0; g < x.groups; ++g)
        to = decode<true>(at + g * int4_group_bytes(args.group, args.zeros), args.group / 8, to);
    }
    for (int64_t row = 0; row < args.rows; row += ROWS) {
      int count = static_cast<int>(args.rows - row < ROWS ? args.rows - row : ROWS);
      if (args.group == 0) {
        int8_rows(decoded, row, count, totals);
        scale_columns(totals, count, panel);
      } else {
        int4_rows(at, decoded, row, count, totals);
      }
      finish(totals, row, count, panel);
    }
  }

  void run(int64_t first, int64_t last) const {
    for (int64_t p = first; p < last; ++p) {
      const char* at = args.panels + p * panel_size();
      if (args.rows <= FEW) few_rows(at, p);
      else many_rows(at, p);
    }
  }
};

// How many numbers of a row the kernels read.
inline int64_t padded_columns(int64_t k, int group) {
  const int64_t unit = group == 0 ? 4 : group;
  return blocks(k, unit) * unit;
}

template <class T>
void pad_row(const T* x, int64_t k, int64_t padded, T* to) {
  memcpy(static_cast<void*>(to), x, static_cast<size_t>(k) * sizeof(T));
  memset(static_cast<void*>(to + k), 0, static_cast<size_t>(padded - k) * sizeof(T));
}

template <class T>
void sum_groups(const T* x, int64_t groups, int64_t group, float* sums) {
  for (int64_t g = 0; g < groups; ++g) {
    vf some = zero();
    for (int64_t k = 0; k < group; k += LANES) some = add(some, load(x + g * group + k));
    sums[g] = sum(some);
  }
}

template <class T>
void weight_only_of(const WeightOnlyArgs& args) {
  const int64_t padded = padded_columns(args.k, args.group);
  Padded<T> x = {reinterpret_cast<const T*>(args.x), args.x_stride, nullptr, args.group == 0 ? 0 : padded / args.group};
  if (padded != args.k || args.x_stride != args.k) {
    T* copy = scratch_of<T>(1, args.rows * padded);
    for (int64_t r = 0; r < args.rows; ++r) pad_row(x.data + r * args.x_stride, args.k, padded, copy + r * padded);
    x.data = copy;
    x.stride = padded;
  }
  if (args.zeros) {
    float* sums = scratch_of<float>(2, args.rows * x.groups);
    for (int64_t r = 0; r < args.rows; ++r) sum_groups(x.data + r * x.stride, x.groups, args.group, sums + r * x.groups);
    x.group_sums = sums;
  }
  const WeightOnly<T> product{args, x};
  parallel(blocks(args.columns, PANEL), 1, [&](int64_t begin, int64_t end) { product.run(begin, end); });
}

void weight_only(const WeightOnlyArgs& args) {
  if (args.rows == 0) return;
  if (args.type == Type::f32) weight_only_of<float>(args);
  else weight_only_of<bf16>(args);
}

void pack_int4(const PackInt4Args& args) {
  int64_t size = int4_group_bytes(args.group, args.zero != nullptr), k = args.groups * args.group;
  parallel(blocks(args.rows, PANEL), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      char* panel = args.panels + p * args.groups * size;
      memset(panel, 0, static_cast<size_t>(args.groups * size));
      for (int64_t r = 0; r < PANEL && p * PANEL + r < args.rows; ++r)
        for (int64_t g = 0; g < args.groups; ++g) {
          int64_t row = p * PANEL + r;
          char* to = panel + g * size;
          for (int64_t i = 0; i < args.group; ++i) {
            uint32_t code = args.codes[row * k + g * args.group + i] & 15u;
            uint32_t word;
            char* at = to + i / 8 * STEP + r * 4;
            memcpy(&word, at, 4);
            word |= code << (i % 2 * 16 + i % 8 / 2 * 4);
            memcpy(at, &word, 4);
          }
          memcpy(to + args.group / 8 * STEP + r * 2, args.scale + row * args.groups + g, 2);
          if (args.zero != nullptr) to[args.group / 8 * STEP + 128 + r] = static_cast<char>(args.zero[row * args.groups + g]);
        }
    }
  });
}

}  // namespace

extern const WeightOnlyKernels weight_only_kernels = {weight_only, pack_int4};

}  // namespace MISS_ISA
}  // namespace miss
