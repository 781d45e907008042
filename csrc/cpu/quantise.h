// Rows of numbers as uint8 codes and a scale: what an int8 product takes.
// Knows one row; does not know where it comes from.
#pragma once

namespace miss {
namespace {

#if defined(__AVX512F__)
inline vi as_ints(vf a) { return _mm512_castps_si512(a); }  // the same bits
inline vi maxi(vi a, vi b) { return _mm512_max_epi32(a, b); }
#else
inline vi as_ints(vf a) { return _mm256_castps_si256(a); }
inline vi maxi(vi a, vi b) { return _mm256_max_epi32(a, b); }
#endif

// The largest absolute value of a row, gathered vector by vector; NaN where one is NaN. Compared as whole numbers, in
// whose order infinity stands above every number and NaN above infinity.
struct Largest {
  vi most[4] = {zeroi(), zeroi(), zeroi(), zeroi()};

  template <class Span>
  void see(vf x, Span) {
    most[Span::sum] = maxi(most[Span::sum], as_ints(abs(x)));
  }
  float value() const {
    alignas(64) int32_t lanes[LANES];
    store(lanes, maxi(maxi(most[0], most[1]), maxi(most[2], most[3])));
    int32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits = lanes[i] > bits ? lanes[i] : bits;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
};

// scale = largest / 127 (1 for a row of zeros), codes = round(x / scale) + 128, ties to even. A row with NaN or infinity
// has scale NaN and codes 128, so that its product is NaN. `largest` is as Largest gives it.
// The sum with 1.5 * 2 ** 23 + 128 has the code in its lowest byte: such floats are whole, and sums round to even. (The
// reciprocal's product with a correction, instead of the division, takes as long: 99 ns a row of 768, in L2.)
// ROUGH: by the reciprocal alone, which moves only what lies within 1e-5 of a step from the middle of two codes.
template <bool ROUGH = false, class T>
inline float to_codes(const T* row, int64_t width, float largest, uint8_t* codes) {
  if (!(largest <= 3.4028234664e38f)) {
    memset(codes, 128, static_cast<size_t>(width));
    return __builtin_nanf("");
  }
  float scale = largest > 0.0f ? largest / 127.0f : 1.0f;
  if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
  const vf step = set1(ROUGH ? 1.0f / scale : scale), shift = set1(12583040.0f);
  spans(width, [&](int64_t i, auto span) {
    const vf x = get(row + i, span);
    put_byte(codes + i, as_ints(ROUGH ? fma(x, step, shift) : add(div(x, step), shift)), span);
  });
  return scale;
}

template <class T>
inline float quantise_row(const T* x, int64_t count, uint8_t* codes) {
  Largest largest;
  spans(count, [&](int64_t i, auto span) { largest.see(get(x + i, span), span); });
  return to_codes(x, count, largest.value(), codes);
}

}  // namespace
}  // namespace miss
