// Rows of numbers as uint8 codes and a scale: what an int8 product takes.
// Knows one row; does not know where it comes from.
#pragma once

namespace miss {
namespace {

template <class T>
inline float largest_magnitude(const T* x, int64_t count) {
  // Comparing whole bit patterns as integers would be one instruction less, but NaN must come through: max() of the
  // hardware drops it, so it is looked for on the side.
  vf most = zero(), broken = zero();
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    vf v = abs(load(x + i));
    most = max(most, v);
    broken = fma(v, zero(), broken);  // NaN for NaN and infinity, else 0
  }
  if (i < count) {
    vf v = abs(load_n(x + i, static_cast<int>(count - i)));
    most = max(most, v);
    broken = fma(v, zero(), broken);
  }
  return max_of(most) + sum(broken);
}

// scale = max|x| / 127 (1 for a row of zeros), codes = round(x / scale) + 128, ties to even. A row with NaN or infinity
// has scale NaN and codes 128, so that its product is NaN.
template <class T>
inline float quantise_row(const T* x, int64_t count, uint8_t* codes) {
  float most = largest_magnitude(x, count);
  if (!(most > 0.0f)) {
    memset(codes, 128, static_cast<size_t>(count));
    return most == 0.0f ? 1.0f : most;
  }
  float scale = most / 127.0f;
  if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
  vf divisor = set1(scale);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_code(codes + i, div(load(x + i), divisor));
  if (i < count) {
    int rest = static_cast<int>(count - i);
    store_code_n(codes + i, div(load_n(x + i, rest), divisor), rest);
  }
  return scale;
}

}  // namespace
}  // namespace miss
