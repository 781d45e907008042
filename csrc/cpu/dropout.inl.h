// Dropout's mask, made where it is needed: kernels/dropout.py's counter hash in registers.
// Knows the hash; does not know what is dropped. Included after vec_avx512.h or vec_avx2.h.
#pragma once

namespace miss {
namespace {

#if defined(__AVX512F__)
inline vi set64(int64_t x) { return _mm512_set1_epi64(x); }
inline vi add64(vi a, vi b) { return _mm512_add_epi64(a, b); }
inline vi mul64(vi a, vi b) { return _mm512_mullo_epi64(a, b); }
template <int BITS>
inline vi shift_xor64(vi a) { return _mm512_xor_si512(a, _mm512_srli_epi64(a, BITS)); }
// p where the 16 bits are at least the threshold, else 0.
inline vf kept(vf p, const int16_t* fields, int threshold) {
  __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(fields));
  return _mm512_maskz_mov_ps(_mm256_cmpge_epi16_mask(bits, _mm256_set1_epi16(static_cast<int16_t>(threshold))), p);
}
#else
inline vi set64(int64_t x) { return _mm256_set1_epi64x(x); }
inline vi add64(vi a, vi b) { return _mm256_add_epi64(a, b); }
inline vi mul64(vi a, vi b) {
  vi cross = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), b), _mm256_mul_epu32(a, _mm256_srli_epi64(b, 32)));
  return _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64(cross, 32));
}
template <int BITS>
inline vi shift_xor64(vi a) { return _mm256_xor_si256(a, _mm256_srli_epi64(a, BITS)); }
inline vf kept(vf p, const int16_t* fields, int threshold) {
  vi bits = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(fields)));
  return _mm256_and_ps(p, _mm256_castsi256_ps(_mm256_cmpgt_epi32(bits, set1i(threshold - 1))));
}
#endif

constexpr int64_t FIELD_SLACK = 4 * LANES;  // beyond the fields asked for, that the buffer must have

// The 16 bits that decide over `count` elements of the mask from `first` on. Returns where in `fields` they begin.
inline const int16_t* keep_fields(int64_t seed, int64_t first, int64_t count, int16_t* fields) {
  constexpr uint64_t WEYL = 0x9E3779B97F4A7C15ull;
  const uint64_t group = static_cast<uint64_t>(first) / 4;
  const int64_t end = first % 4 + count;
  int64_t counters[LANES / 2];
  for (int i = 0; i < LANES / 2; ++i)
    counters[i] = static_cast<int64_t>(static_cast<uint64_t>(seed) + (group + 1 + static_cast<uint64_t>(i)) * WEYL);
  vi counter = load(reinterpret_cast<const int32_t*>(counters));
  const vi step = set64(static_cast<int64_t>(WEYL * (LANES / 2)));
  const vi one = set64(static_cast<int64_t>(0xBF58476D1CE4E5B9ull)), two = set64(static_cast<int64_t>(0x94D049BB133111EBull));
  for (int64_t i = 0; i < end; i += LANES * 2) {
    vi z = mul64(shift_xor64<30>(counter), one);
    z = shift_xor64<31>(mul64(shift_xor64<27>(z), two));
    store(reinterpret_cast<int32_t*>(fields + i), z);
    counter = add64(counter, step);
  }
  return fields + first % 4;
}

}  // namespace
}  // namespace miss
