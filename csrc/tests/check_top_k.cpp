// The head's best logits and log-sum-exp, against all logits.
#include <math.h>

#include "cpu/top_k.h"
#include "pack.h"

using check::Buffer;
using check::number;
using check::randomise;

// The row's outcome against its logits, `error` off at most.
static void compare(miss::TopKArgs& args, Buffer<double>& logits, int64_t row, double error) {
  double most = -1e30, sum = 0;
  for (int64_t c = 0; c < args.columns; ++c) most = logits[c] > most ? logits[c] : most;
  for (int64_t c = 0; c < args.columns; ++c) sum += exp(logits[c] - most);
  check::near(args.shift[row] + log(double{args.total[row]}), most + log(sum), error + 1e-5, "top_k, log-sum-exp");
  for (int i = 0; i < args.count; ++i) {
    const int64_t index = args.indices[row * args.count + i];
    const double value = args.values[row * args.count + i];
    check::expect(index >= 0 && index < args.columns, "top_k, index");
    check::near(value, logits[index], error, "top_k, value");
    int64_t above = 0;
    for (int64_t c = 0; c < args.columns; ++c) above += logits[c] > value + error;
    check::expect(above <= i, "top_k, rank");
  }
}

template <class T, class W>
static void top_k(int64_t rows, int64_t columns, int64_t k, int count) {
  constexpr bool INT8 = sizeof(W) == 1;
  Buffer<T> x(rows * k);
  Buffer<W> weight(columns * k), panels(check::panel_count<W>(columns, k));
  Buffer<float> scale(columns), bias(columns), values(rows * count), shift(rows), total(rows), x_scale(rows);
  Buffer<int32_t> offset(columns);
  Buffer<int64_t> indices(rows * count);
  Buffer<uint8_t> codes(rows * k);
  Buffer<double> logits(columns);
  randomise(x);
  randomise(weight);
  randomise(scale);
  randomise(bias);
  check::pack(weight, columns, k, false, panels, INT8 ? offset.data() : nullptr);
  miss::TopKArgs args = {};
  args.x = x.chars();
  args.x_type = check::type_of<T>();
  args.rows = rows;
  args.columns = columns;
  args.k = k;
  args.panels = panels.chars();
  if (INT8) {
    args.column_scale = scale.data();
    args.offset = offset.data();
    miss::linear_kernels().quantise(x.chars(), args.x_type, rows, k, k, codes.data(), x_scale.data());
  }
  args.bias = bias.data();
  args.count = count;
  args.values = values.data();
  args.indices = indices.data();
  args.shift = shift.data();
  args.total = total.data();
  miss::top_k_kernels().forward(args);
  for (int64_t r = 0; r < rows; ++r) {
    double size = 1;
    for (int64_t c = 0; c < columns; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i)
        sum += (INT8 ? codes[r * k + i] - 128.0 : number(x[r * k + i])) * number(weight[c * k + i]);
      logits[c] = (INT8 ? sum * x_scale[r] * scale[c] : sum) + bias[c];
      size = fabs(logits[c]) > size ? fabs(logits[c]) : size;
    }
    compare(args, logits, r, 1e-5 * size);
  }
}

MISS_CHECK(top_k) {
  for (int64_t rows : {1, 5, 7, 50})
    for (int64_t columns : {16, 63, 65, 333})
      for (int64_t k : {1, 3, 66, 259}) {
        if (rows * columns * k > 500000) continue;
        const int count = columns == 63 ? 1 : columns == 65 ? 5 : miss::MOST_K;
        top_k<float, float>(rows, columns, k, count);
        top_k<miss::bf16, miss::bf16>(rows, columns, k, count);
        top_k<float, int8_t>(rows, columns, k, count);
      }
}
