// Moving elements within and across vectors: what attention needs beside the vectors' own files. Knows registers; does not know panels.
// Included after vec_avx512.h or vec_avx2.h.
#pragma once

namespace miss {
namespace {

#if defined(__AVX512F__)

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

// a's first n elements, b's others.
inline vf first_of(vf a, int n, vf b) { return _mm512_mask_blend_ps(first(n), b, a); }

#else

inline void interleave(vi a, vi b, vi& low, vi& high) {
  vi even = _mm256_unpacklo_epi16(a, b), odd = _mm256_unpackhi_epi16(a, b);
  low = _mm256_permute2x128_si256(even, odd, 0x20);
  high = _mm256_permute2x128_si256(even, odd, 0x31);
}

inline vf scale_by(vf a, vf n) { return mul(a, power_of_two(n)); }
inline vf first_of(vf a, int n, vf b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first(n))); }

#endif

}  // namespace
}  // namespace miss
