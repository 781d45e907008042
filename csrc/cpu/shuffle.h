// Moving 4-byte and 2-byte elements across vectors: what packing needs. Knows registers; does not know panels.
// Included after vec_avx512.h or vec_avx2.h.
#pragma once

namespace miss {
namespace {

#if defined(__AVX512F__)

// LANES rows of LANES words: their transpose, in place.
inline void transpose(vi (&r)[16]) {
  vi t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 2-byte elements of a and b in turn: low gets the first half, high the second.
inline void interleave(vi a, vi b, vi& low, vi& high) {
  vi first = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(a)),
                             _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(b)), 16));
  high = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(a, 1)),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(b, 1)), 16));
  low = first;
}

// a times 2 ** n for whole n.
inline vf scale_by(vf a, vf n) { return _mm512_scalef_ps(a, n); }
// x - floor(x), 0 at both infinities, and a * 2 ** floor(x).
inline vf fraction(vf x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline vf scale_by_floor(vf a, vf x) { return _mm512_scalef_ps(a, x); }

// a's first n elements, b's others.
inline vf first_of(vf a, int n, vf b) { return _mm512_mask_blend_ps(first(n), b, a); }

#else

inline void transpose(vi (&r)[8]) {
  vi t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

inline void interleave(vi a, vi b, vi& low, vi& high) {
  vi even = _mm256_unpacklo_epi16(a, b), odd = _mm256_unpackhi_epi16(a, b);
  low = _mm256_permute2x128_si256(even, odd, 0x20);
  high = _mm256_permute2x128_si256(even, odd, 0x31);
}

inline vf scale_by(vf a, vf n) { return mul(a, power_of_two(n)); }
inline vf fraction(vf x) {
  const vf bounded = max(set1(-160.0f), x);  // hands NaN on
  return sub(bounded, _mm256_floor_ps(bounded));
}
inline vf scale_by_floor(vf a, vf x) { return scale_by(a, _mm256_floor_ps(max(set1(-160.0f), x))); }
inline vf first_of(vf a, int n, vf b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first(n))); }

#endif

}  // namespace
}  // namespace miss
