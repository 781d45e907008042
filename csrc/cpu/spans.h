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

}  // namespace
}  // namespace miss
