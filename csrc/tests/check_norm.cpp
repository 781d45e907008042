// Layer norm forward, after a residual, as codes, and backward, at widths around a vector's.
#include <math.h>

#include "check.h"
#include "cpu/norm.h"

using check::Buffer;
using check::near;
using check::number;
using check::randomise;

static void run(const miss::NormForward& args, float) { miss::norm_kernels().forward_f32(args); }
static void run(const miss::NormForward& args, miss::bf16) { miss::norm_kernels().forward_bf16(args); }
static void run(const miss::NormBackward& args, float) { miss::norm_kernels().backward_f32(args); }
static void run(const miss::NormBackward& args, miss::bf16) { miss::norm_kernels().backward_bf16(args); }

template <class T>
static void norm(int64_t rows, int64_t width, bool residual, double tolerance) {
  const int64_t count = rows * width;
  Buffer<T> x(count), other(count), y(count), summed(count), dy(count), dx(count), dresidual(count);
  Buffer<float> weight(width), bias(width), mean(rows), rstd(rows), scale(rows), dweight(width), dbias(width);
  Buffer<float> partial(miss::NORM_BLOCKS * 2 * width);
  Buffer<uint8_t> codes(count);
  for (Buffer<T>* one : {&x, &other, &dy}) randomise(*one);
  randomise(weight);
  randomise(bias);
  miss::NormForward args = {};
  args.x = x.data();
  args.weight = weight.data();
  args.bias = bias.data();
  args.rows = rows;
  args.width = width;
  args.eps = 1e-3f;
  args.y = y.data();
  args.mean = mean.data();
  args.rstd = rstd.data();
  if (residual) {
    args.residual = other.data();
    args.summed = summed.data();
  }
  run(args, T{});
  args.codes = codes.data();
  args.scale = scale.data();
  run(args, T{});

  miss::NormBackward back = {};
  back.dy = dy.data();
  back.x = residual ? summed.data() : x.data();
  back.weight = weight.data();
  back.mean = mean.data();
  back.rstd = rstd.data();
  back.rows = rows;
  back.width = width;
  back.dx = dx.data();
  back.dweight = dweight.data();
  back.dbias = dbias.data();
  back.partial = partial.data();
  if (residual) {
    back.dsummed = other.data();
    back.dresidual = dresidual.data();
  }
  run(back, T{});

  Buffer<double> dw(width), db(width);
  for (int64_t i = 0; i < width; ++i) dw[i] = db[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    auto value = [&](int64_t i) {
      double plain = number(x[r * width + i]);
      return residual ? plain + number(other[r * width + i]) : plain;
    };
    double average = 0, square = 0, g_sum = 0, gx_sum = 0;
    for (int64_t i = 0; i < width; ++i) average += value(i) / width;
    for (int64_t i = 0; i < width; ++i) square += (value(i) - average) * (value(i) - average) / width;
    const double factor = 1 / sqrt(square + double{args.eps});
    for (int64_t i = 0; i < width; ++i) {
      const double hat = (value(i) - average) * factor, g = number(dy[r * width + i]);
      const double wanted = hat * weight[i] + bias[i];
      near(number(y[r * width + i]), wanted, tolerance * (1 + fabs(wanted)), "layer_norm");
      near((codes[r * width + i] - 128) * double{scale[r]}, wanted, 0.51 * scale[r] + tolerance, "layer_norm to codes");
      if (residual) near(number(summed[r * width + i]), value(i), tolerance * 2, "summed");
      g_sum += g * weight[i] / width;
      gx_sum += g * weight[i] * hat / width;
      dw[i] += g * hat;
      db[i] += g;
    }
    for (int64_t i = 0; i < width; ++i) {
      const double hat = (value(i) - average) * factor, g = number(dy[r * width + i]) * double{weight[i]};
      double wanted = factor * (g - g_sum - hat * gx_sum);
      if (residual) wanted += number(other[r * width + i]);
      near(number(dx[r * width + i]), wanted, 4 * tolerance * (1 + factor), "layer_norm, dx");
      if (residual) near(number(dresidual[r * width + i]), wanted, 4 * tolerance * (1 + factor), "layer_norm, dresidual");
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    near(dweight[i], dw[i], 4 * tolerance * (1.0 + rows), "layer_norm, dweight");
    near(dbias[i], db[i], 4 * tolerance * (1.0 + rows), "layer_norm, dbias");
  }
}

// With dropout what is added is 0 or twice x.
template <class T>
static void dropped(int64_t rows, int64_t width, double tolerance) {
  Buffer<T> x(rows * width), residual(rows * width), y(rows * width), summed(rows * width);
  Buffer<float> weight(width), bias(width), mean(rows), rstd(rows);
  randomise(x);
  randomise(residual);
  randomise(weight);
  randomise(bias);
  miss::NormForward args = {};
  args.x = x.data();
  args.residual = residual.data();
  args.weight = weight.data();
  args.bias = bias.data();
  args.rows = rows;
  args.width = width;
  args.eps = 1e-3f;
  args.dropout = {true, 7, 0, 2.0f};
  args.y = y.data();
  args.summed = summed.data();
  args.mean = mean.data();
  args.rstd = rstd.data();
  run(args, T{});
  for (int64_t i = 0; i < rows * width; ++i) {
    const double added = number(summed[i]) - number(residual[i]), twice = 2.0 * number(x[i]);
    near(fabs(added) < fabs(added - twice) ? added : added - twice, 0, 3 * tolerance, "dropout");
  }
}

MISS_CHECK(norm) {
  for (int64_t rows : {0, 1, 3, 70})
    for (int64_t width : {1, 7, 8, 15, 16, 17, 31, 33, 100, 257}) {
      norm<float>(rows, width, false, 1e-4);
      norm<float>(rows, width, true, 1e-4);
      norm<miss::bf16>(rows, width, false, 2e-2);
      norm<miss::bf16>(rows, width, true, 5e-2);
      dropped<float>(rows, width, 1e-6);
      dropped<miss::bf16>(rows, width, 1.6e-2);
    }
}
