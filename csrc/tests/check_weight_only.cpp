// int8 and int4 weights under float activations, for few rows (decoded in registers) and more (decoded into scratch).
#include <math.h>

#include "cpu/weight_only.h"
#include "pack.h"

using check::blocks;
using check::Buffer;
using check::number;
using check::randomise;

// y = x weight^T + bias, with `weight` as the kernels' arguments have it and as plain numbers (columns, k).
template <class T>
static void compare(miss::WeightOnlyArgs args, Buffer<double>& weight, double tolerance) {
  const int64_t rows = args.rows, columns = args.columns, k = args.k, stride = k + 1;
  Buffer<T> x(rows > 0 ? (rows - 1) * stride + k : 0), bias(columns), y(rows * columns);
  randomise(x);
  randomise(bias);
  args.x = x.chars();
  args.x_stride = stride;
  args.type = args.bias_type = check::type_of<T>();
  args.bias = bias.chars();
  args.y = y.chars();
  miss::weight_only_kernels().forward(args);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      double wanted = number(bias[c]), size = 1;
      for (int64_t i = 0; i < k; ++i) {
        const double term = number(x[r * stride + i]) * weight[c * k + i];
        wanted += term;
        size += fabs(term);
      }
      check::near(number(y[r * columns + c]), wanted, tolerance * size, "weight-only linear");
    }
}

static void int8(int64_t rows, int64_t columns, int64_t k) {
  Buffer<int8_t> codes(columns * k), panels(blocks(columns, 64) * 64 * blocks(k, 4) * 4);
  Buffer<float> scale(columns);
  Buffer<int32_t> offset(columns);
  Buffer<double> weight(columns * k);
  randomise(codes);
  randomise(scale);
  for (int64_t i = 0; i < weight.count(); ++i) weight[i] = codes[i] * double{scale[i / k]};
  check::pack(codes, columns, k, false, panels, offset.data());
  miss::WeightOnlyArgs args = {};
  args.rows = rows;
  args.columns = columns;
  args.k = k;
  args.panels = panels.chars();
  args.column_scale = scale.data();
  compare<float>(args, weight, 1e-5);
  compare<miss::bf16>(args, weight, 8e-3);
}

static void int4(int64_t rows, int64_t columns, int64_t k, int group, bool zeros) {
  const int64_t groups = blocks(k, group), wide = groups * group;
  Buffer<uint8_t> codes(columns * wide), zero(columns * groups);
  Buffer<uint16_t> scale(columns * groups);
  Buffer<char> panels(blocks(columns, 64) * groups * miss::int4_group_bytes(group, zeros));
  Buffer<double> weight(columns * k);
  for (int64_t i = 0; i < codes.count(); ++i) codes[i] = static_cast<uint8_t>(check::random_bits() >> 28);
  for (int64_t i = 0; i < scale.count(); ++i) {
    zero[i] = static_cast<uint8_t>(check::random_bits() >> 28);
    scale[i] = i % 3 == 0 ? 0xb800 : i % 3 == 1 ? 0x3400 : 0x3c00;  // -1/2, 1/4, 1 as float16
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t i = 0; i < wide; ++i) {
      const int64_t at = c * groups + i / group;
      if (i >= k) codes[c * wide + i] = zeros ? zero[at] : 8;
      else weight[c * k + i] = (codes[c * wide + i] - (zeros ? zero[at] : 8)) * (at % 3 == 0 ? -0.5 : at % 3 == 1 ? 0.25 : 1);
    }
  miss::weight_only_kernels().pack(
      {codes.data(), scale.data(), zeros ? zero.data() : nullptr, columns, groups, group, panels.data()});
  miss::WeightOnlyArgs args = {};
  args.rows = rows;
  args.columns = columns;
  args.k = k;
  args.panels = panels.data();
  args.group = group;
  args.zeros = zeros;
  compare<float>(args, weight, 1e-5);
  compare<miss::bf16>(args, weight, 8e-3);
}

MISS_CHECK(weight_only) {
  for (int64_t rows : {0, 1, 2, 4, 5, 9})
    for (int64_t columns : {1, 65, 130})
      for (int64_t k : {1, 3, 66, 259}) {
        int8(rows, columns, k);
        int4(rows, columns, k, 32, k % 2 == 0);
        if (columns == 65) int4(rows, columns, k, k % 2 == 0 ? 64 : 128, k % 2 != 0);
      }
  int8(2, 65, 4099);
}
