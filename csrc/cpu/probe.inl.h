// The probes. Included by the file of each instruction set.
#include "probe.h"

namespace miss {
namespace MISS_ISA {
namespace {

// to[i] = f(from[i]) for whole vectors, then for what is left.
template <class From, class To, class F>
void each(const From* from, To* to, int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, f(load(from + i)));
  if (i < count) store_n(to + i, f(load_n(from + i, static_cast<int>(count - i))), static_cast<int>(count - i));
}

void apply(Function function, const float* x, float* y, int64_t count) {
  switch (function) {
    case Function::exp: return each(x, y, count, [](vf v) { return miss::exp(v); });
    case Function::normal_cdf: return each(x, y, count, [](vf v) { return normal_cdf(v); });
    case Function::gelu: return each(x, y, count, [](vf v) { return gelu(v); });
    case Function::gelu_slope: return each(x, y, count, [](vf v) { return gelu_slope(v); });
    case Function::power_of_two: return each(x, y, count, [](vf v) { return power_of_two(v); });
    case Function::round: return each(x, y, count, [](vf v) { return miss::round(v); });
    case Function::sum: return each(x, y, count, [](vf v) { return set1(sum(v)); });
    case Function::max_of: return each(x, y, count, [](vf v) { return set1(max_of(v)); });
    case Function::min_of: return each(x, y, count, [](vf v) { return set1(min_of(v)); });
  }
}

void round_to_bf16(const float* x, bf16* y, int64_t count) {
  each(x, y, count, [](vf v) { return v; });
}

void to_bytes(const float* x, uint8_t* y, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_byte(y + i, to_int(load(x + i)));
  int rest = static_cast<int>(count - i);
  if (rest > 0) store_byte_n(y + i, to_int(load_n(x + i, rest)), rest);
}

void widen(const char* x, Type type, float* y, int64_t count) {
  auto same = [](vf v) { return v; };
  switch (type) {
    case Type::f32: return each(reinterpret_cast<const float*>(x), y, count, same);
    case Type::bf16: return each(reinterpret_cast<const bf16*>(x), y, count, same);
    case Type::u8: return each(reinterpret_cast<const uint8_t*>(x), y, count, same);
    case Type::s8: return each(reinterpret_cast<const int8_t*>(x), y, count, same);
  }
}

void probe_product(Type type, int num_rows, const char* a, int64_t row_bytes, int64_t bytes, const char* panel,
                   char* sums, bool fresh, int columns) {
  auto* wide = reinterpret_cast<float*>(sums);
  if (type == Type::f32) product<DotF32>(num_rows, a, row_bytes, bytes, panel, wide, PANEL, fresh, columns);
  else if (type == Type::bf16) product<DotBf16>(num_rows, a, row_bytes, bytes, panel, wide, PANEL, fresh, columns);
  else
    product<DotU8S8>(num_rows, a, row_bytes, bytes, panel, reinterpret_cast<int32_t*>(sums), PANEL, fresh, columns);
}

}  // namespace

extern const ProbeKernels probe_kernels = {apply, round_to_bf16, to_bytes, widen, probe_product, LANES};

}  // namespace MISS_ISA
}  // namespace miss
