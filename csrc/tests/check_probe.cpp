// Vectors' loads, stores and conversions at every length around a vector's, and the inner kernel at every row's end.
#include <math.h>

#include "check.h"
#include "cpu/probe.h"

using check::Buffer;
using check::number;
using check::randomise;

template <class T>
static void widen(int64_t count) {
  Buffer<T> x(count);
  Buffer<float> y(count);
  randomise(x);
  miss::probe_kernels().to_float(x.chars(), check::type_of<T>(), y.data(), count);
  for (int64_t i = 0; i < count; ++i) check::near(y[i], number(x[i]), 0, "to_float");
}

MISS_CHECK(vectors) {
  const miss::ProbeKernels& kernels = miss::probe_kernels();
  for (int64_t count = 0; count < 40; ++count) {
    widen<float>(count);
    widen<miss::bf16>(count);
    widen<uint8_t>(count);
    widen<int8_t>(count);
    Buffer<float> x(count), y(count);
    randomise(x);
    kernels.apply(miss::Function::exp, x.data(), y.data(), count);
    for (int64_t i = 0; i < count; ++i) check::near(y[i], exp(double{x[i]}), 4e-7, "exp");
    Buffer<miss::bf16> low(count);
    kernels.to_bf16(x.data(), low.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      miss::bf16 wanted;
      miss::convert(x[i], wanted);
      check::near(low[i].bits, wanted.bits, 0, "to_bf16");
    }
    Buffer<uint8_t> codes(count);
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<float>((i * 37) % 256);
    kernels.to_bytes(x.data(), codes.data(), count);
    for (int64_t i = 0; i < count; ++i) check::near(codes[i], x[i], 0, "to_bytes");
  }
}

// A's element k and the panel's element (k, column), wherever they lie in their groups.
template <class A, class B, class Sum>
static void product(int rows, int64_t k, bool fresh) {
  constexpr int64_t GROUP = 4 / sizeof(B);
  int64_t groups = (k + GROUP - 1) / GROUP;
  Buffer<A> a(rows * k);
  Buffer<B> panel(groups * 64 * GROUP);
  Buffer<Sum> sums(rows * 64);
  randomise(a);
  randomise(panel);
  for (int64_t i = 0; i < sums.count(); ++i) sums[i] = 3;
  int64_t bytes = k * static_cast<int64_t>(sizeof(A));
  miss::probe_kernels().product(check::type_of<A>(), rows, a.chars(), bytes, bytes, panel.chars(), sums.chars(), fresh, 64);
  for (int r = 0; r < rows; ++r)
    for (int64_t c = 0; c < 64; ++c) {
      double wanted = fresh ? 0 : 3;
      for (int64_t i = 0; i < k; ++i)
        wanted += double{number(a[r * k + i])} * double{number(panel[(i / GROUP * 64 + c) * GROUP + i % GROUP])};
      check::near(static_cast<double>(sums[r * 64 + c]), wanted, sizeof(A) == 1 ? 0 : 1e-4, "product");
    }
}

MISS_CHECK(products) {
  for (int rows = 1; rows <= 6; ++rows)
    for (int64_t k : {1, 2, 3, 4, 5, 7, 64, 67}) {
      product<float, float, float>(rows, k, k % 2 == 0);
      product<miss::bf16, miss::bf16, float>(rows, k, k % 2 == 0);
      product<uint8_t, int8_t, int32_t>(rows, k, k % 2 == 0);
    }
}
