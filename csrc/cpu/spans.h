// A row in whole vectors and a rest, and a row as bytes. Knows `vf`; does not know what a row means.
// Included after vec_avx512.h or vec_avx2.h.
#pragma once

namespace miss {
namespace {

// What `spans` hands its body: which of four running sums to use, and how many of the vector's numbers exist.
template <int SUM>
struct Whole {
  static constexpr int sum = SUM;
};
struct Rest {
  static constexpr int sum = 0;
  int count;
};

// body(first index, Whole<0 … 3> or Rest) over a row. Four sums hide the latency of an addition; which number goes into
// which is a function of the width alone.
template <class Body>
inline void spans(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    body(i, Whole<0>{});
    body(i + LANES, Whole<1>{});
    body(i + 2 * LANES, Whole<2>{});
    body(i + 3 * LANES, Whole<3>{});
  }
  for (; i + LANES <= width; i += LANES) body(i, Whole<0>{});
  if (i < width) body(i, Rest{static_cast<int>(width - i)});
}

template <class T, int SUM>
inline vf get(const T* p, Whole<SUM>) {
  return load(p);
}
template <class T>
inline vf get(const T* p, Rest rest) {  // zeros beyond the row
  return load_n(p, rest.count);
}
template <class T, int SUM>
inline void put(T* p, vf a, Whole<SUM>) {
  store(p, a);
}
template <class T>
inline void put(T* p, vf a, Rest rest) {
  store_n(p, a, rest.count);
}
template <int SUM>
inline void put_byte(uint8_t* p, vi a, Whole<SUM>) {
  store_byte(p, a);
}
inline void put_byte(uint8_t* p, vi a, Rest rest) { store_byte_n(p, a, rest.count); }

inline vf total(const vf (&sums)[4]) { return add(add(sums[0], sums[1]), add(sums[2], sums[3])); }

// What a number is once stored.
inline vf stored(vf a, const float*) { return a; }
inline vf stored(vf a, const bf16*) { return from_bf16(to_bf16(a)); }

// The largest absolute value of a row, gathered vector by vector; NaN where one is NaN. Compared as whole numbers, in
// whose order infinity stands above every number and NaN above infinity.
struct Largest {
  vi most[4] = {zeroi(), zeroi(), zeroi(), zeroi()};

  template <class Span>
  void see(vf x, Span) {
#if defined(__AVX512F__)
    most[Span::sum] = _mm512_max_epi32(most[Span::sum], _mm512_castps_si512(abs(x)));
#else
    most[Span::sum] = _mm256_max_epi32(most[Span::sum], _mm256_castps_si256(abs(x)));
#endif
  }
  float value() const {
    alignas(64) int32_t lanes[4 * LANES];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(lanes + i * LANES, most[i]);
    int32_t bits = 0;
    for (int i = 0; i < 4 * LANES; ++i) bits = lanes[i] > bits ? lanes[i] : bits;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
};

// A row's codes, 128 + round(x / scale) with ties to even, and its scale, largest / 127 (the reference is
// kernels/quant_linear/packing.py: quantise_rows). `largest` is as Largest gives it.
// x / scale is the reciprocal's product and one correction, which rounds as a division does at a third of its cost. The
// sum with 1.5 * 2 ** 23 + 128 has the code in its lowest byte: such floats are whole, and sums round to even.
template <class T>
inline float quantise(const T* row, int64_t width, float largest, uint8_t* codes) {
  if (!(largest <= 3.4028234664e38f)) {
    memset(codes, 128, static_cast<size_t>(width));
    return __builtin_nanf("");
  }
  float scale = largest > 0.0f ? largest / 127.0f : 1.0f;
  if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
  const vf step = set1(scale), inverse = set1(1.0f / scale), shift = set1(12583040.0f);
  spans(width, [&](int64_t i, auto span) {
    vf x = get(row + i, span);
    vf q = mul(x, inverse);
    vf code = add(fma(fnma(q, step, x), inverse, q), shift);
#if defined(__AVX512F__)
    put_byte(codes + i, _mm512_castps_si512(code), span);
#else
    put_byte(codes + i, _mm256_castps_si256(code), span);
#endif
  });
  return scale;
}

}  // namespace
}  // namespace miss
