// Linears and their packing against the plain sum, at sizes around a tile, a panel and a span of k.
#include <math.h>

#include "cpu/linear.h"
#include "pack.h"

using check::blocks;
using check::Buffer;
using check::number;
using check::pack;
using check::randomise;

static double gelu(double x) { return 0.5 * x * erfc(-x / sqrt(2.0)); }
template <class T>
static void floats(int64_t rows, int64_t columns, int64_t k, bool extras, double tolerance) {
  const int64_t stride = extras ? k : k + 3;  // rows that lie apart
  Buffer<T> x(rows > 0 ? (rows - 1) * stride + k : 0), weight(columns * k), bias(columns), residual(rows * columns);
  Buffer<T> y(rows * columns), pre(rows * columns), panels(blocks(columns, 64) * 64 * blocks(k, 4 / sizeof(T)) * (4 / sizeof(T)));
  randomise(x);
  randomise(weight);
  randomise(bias);
  randomise(residual);
  pack(weight, columns, k, extras, panels, nullptr);
  miss::LinearArgs args = {};
  args.x = x.chars();
  args.x_type = args.y_type = args.bias_type = check::type_of<T>();
  args.rows = rows;
  args.columns = columns;
  args.k = k;
  args.x_stride = stride;
  args.panels = panels.chars();
  args.y = y.chars();
  if (extras) {
    args.bias = bias.chars();
    args.gelu = true;
    args.residual = residual.chars();
    args.residual_stride = columns;
    args.pre = pre.chars();
  }
  miss::linear_kernels().forward(args);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      double sum = extras ? number(bias[c]) : 0.0;
      for (int64_t i = 0; i < k; ++i)
        sum += double{number(x[r * stride + i])} * double{number(weight[extras ? i * columns + c : c * k + i])};
      if (extras) check::near(number(pre[r * columns + c]), sum, tolerance * (1 + fabs(sum)), "linear, before gelu");
      double wanted = extras ? gelu(sum) + number(residual[r * columns + c]) : sum;
      check::near(number(y[r * columns + c]), wanted, tolerance * (1 + fabs(sum)), "linear");
    }
}

// x float32, quantised on the way in; y float32, or codes.
static void int8(int64_t rows, int64_t columns, int64_t k, bool to_codes) {
  Buffer<float> x(rows * k), scale(columns), bias(columns), y(rows * columns), row_scale(rows), codes_scale(rows);
  Buffer<int8_t> weight(columns * k), panels(blocks(columns, 64) * 64 * blocks(k, 4) * 4);
  Buffer<uint8_t> x_codes(rows * k), codes(rows * columns);
  Buffer<int32_t> offset(columns);
  randomise(x);
  randomise(scale);
  randomise(bias);
  randomise(weight);
  pack(weight, columns, k, false, panels, offset.data());
  miss::linear_kernels().quantise(x.chars(), miss::Type::f32, rows, k, k, x_codes.data(), row_scale.data());
  miss::LinearArgs args = {};
  args.x = x.chars();
  args.x_type = args.bias_type = args.y_type = miss::Type::f32;
  args.rows = rows;
  args.columns = columns;
  args.k = args.x_stride = k;
  args.panels = panels.chars();
  args.column_scale = scale.data();
  args.offset = offset.data();
  args.bias = bias.chars();
  args.gelu = to_codes;
  if (to_codes) {
    args.codes = codes.data();
    args.codes_scale = codes_scale.data();
  } else {
    args.y = y.chars();
  }
  miss::linear_kernels().forward(args);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      int64_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += (int64_t{x_codes[r * k + i]} - 128) * weight[c * k + i];
      double wanted = static_cast<double>(sum) * row_scale[r] * scale[c] + bias[c];
      if (!to_codes) {
        check::near(y[r * columns + c], wanted, 1e-5 * (1 + fabs(wanted)), "int8 linear");
        continue;
      }
      double step = codes_scale[r];
      check::near((codes[r * columns + c] - 128) * step, gelu(wanted), 0.501 * step + 6e-5 * fabs(wanted) + 1e-5,
                  "int8 linear to codes");
    }
}

// y in pieces: what the plain product gives, where the places say, and nothing beside them.
template <class T>
static void spread(int64_t images, int64_t tokens, int64_t pieces, int64_t piece, int64_t k) {
  const int64_t rows = images * tokens, columns = pieces * piece, group = 4 / static_cast<int64_t>(sizeof(T));
  const int64_t gap = 3, token = piece + gap, outer = pieces * tokens * token;  // (images, pieces, tokens, piece + gap)
  Buffer<T> x(rows * k), weight(columns * k), bias(columns), y(rows * columns), out(images * outer);
  Buffer<T> panels(blocks(columns, 64) * 64 * blocks(k, group) * group);
  Buffer<int64_t> places(pieces);
  randomise(x);
  randomise(weight);
  randomise(bias);
  randomise(out);
  Buffer<T> before(out.count());
  for (int64_t i = 0; i < out.count(); ++i) before[i] = out[i];
  for (int64_t i = 0; i < pieces; ++i) places[i] = (pieces - 1 - i) * tokens * token;
  pack(weight, columns, k, false, panels, nullptr);
  miss::LinearArgs args = {};
  args.x = x.chars();
  args.x_type = args.y_type = args.bias_type = check::type_of<T>();
  args.rows = rows;
  args.columns = columns;
  args.k = args.x_stride = k;
  args.panels = panels.chars();
  args.bias = bias.chars();
  args.y = y.chars();
  miss::linear_kernels().forward(args);
  args.y = out.chars();
  args.places = places.data();
  args.piece = piece;
  args.y_tokens = tokens;
  args.y_outer = outer;
  args.y_token = token;
  miss::linear_kernels().forward(args);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < pieces; ++i)
      for (int64_t c = 0; c < token; ++c) {
        const int64_t at = places[i] + r / tokens * outer + r % tokens * token + c;
        const T wanted = c < piece ? y[r * columns + i * piece + c] : before[at];
        check::near(number(out[at]), number(wanted), 0.0, "linear, in pieces");
      }
}

// What a weight's gradient is made of: y = A B^T over panels of both, sums over rows, gelu's slope.
template <class T>
static void gradients(int64_t rows, int64_t columns, int64_t k, double tolerance) {
  const int64_t group = 4 / static_cast<int64_t>(sizeof(T));
  Buffer<T> a(rows * k), b(columns * k), y(rows * columns), sums(k), dz(rows * k), dy(rows * k);
  Buffer<T> a_panels(blocks(rows, 64) * 64 * blocks(k, group) * group);
  Buffer<T> b_panels(blocks(columns, 64) * 64 * blocks(k, group) * group);
  randomise(a);
  randomise(b);
  randomise(dy);
  pack(a, rows, k, false, a_panels, nullptr);
  pack(b, columns, k, false, b_panels, nullptr);
  const miss::Type type = check::type_of<T>();
  miss::linear_kernels().packed_product({a_panels.chars(), b_panels.chars(), type, type, rows, columns, k, y.chars()});
  miss::linear_kernels().column_sums(a.chars(), type, rows, k, sums.chars());
  miss::linear_kernels().gelu_backward(dy.chars(), a.chars(), type, a.count(), dz.chars());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      double wanted = 0;
      for (int64_t i = 0; i < k; ++i) wanted += double{number(a[r * k + i])} * double{number(b[c * k + i])};
      check::near(number(y[r * columns + c]), wanted, tolerance * (1 + fabs(wanted)), "packed product");
    }
  for (int64_t i = 0; i < k; ++i) {
    double wanted = 0;
    for (int64_t r = 0; r < rows; ++r) wanted += number(a[r * k + i]);
    check::near(number(sums[i]), wanted, tolerance * (1 + fabs(wanted)), "column sums");
  }
  for (int64_t i = 0; i < a.count(); ++i) {
    const double x = number(a[i]), slope = 0.5 * erfc(-x / sqrt(2.0)) + x * 0.3989422804014327 * exp(-0.5 * x * x);
    check::near(number(dz[i]), number(dy[i]) * slope, tolerance, "gelu, backward");
  }
}

MISS_CHECK(linear) {
  for (int64_t rows : {1, 7, 65, 130})
    for (int64_t k : {0, 1, 3, 66, 131}) {
      gradients<float>(rows, 67, k, 1e-5);
      gradients<miss::bf16>(rows, 67, k, 8e-3);
    }
  for (int64_t rows : {0, 1, 5, 7, 49, 151})
    for (int64_t columns : {1, 63, 65, 130})
      for (int64_t k : {0, 1, 3, 66, 259}) {
        if (rows * columns * k > 900000) continue;
        bool extras = (rows + columns + k) % 2 == 0;
        floats<float>(rows, columns, k, extras, 1e-5);
        floats<miss::bf16>(rows, columns, k, extras, 8e-3);
        int8(rows, columns, k, extras);
      }
  for (int64_t piece : {32, 64})
    for (int64_t tokens : {1, 7, 151}) {
      spread<float>(2, tokens, 3, piece, 66);
      spread<miss::bf16>(1, tokens, 5, piece, 67);
    }
  floats<float>(7, 65, 1031, true, 1e-5);
  floats<miss::bf16>(7, 65, 2053, true, 8e-3);
  int8(7, 65, 4099, true);
}
