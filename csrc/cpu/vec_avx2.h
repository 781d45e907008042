// Vectors of 8 floats on AVX2, FMA and F16C. Knows registers and instructions; does not know tensors.
// Same names as vec_avx512.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

namespace miss {
namespace {

constexpr int LANES = 8;
constexpr int REGISTERS = 16;
using vf = __m256;
using vi = __m256i;

inline vf set1(float x) { return _mm256_set1_ps(x); }
inline vf zero() { return _mm256_setzero_ps(); }
inline vi set1i(int32_t x) { return _mm256_set1_epi32(x); }
inline vi zeroi() { return _mm256_setzero_si256(); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf abs(vf a) { return _mm256_andnot_ps(set1(-0.0f), a); }
inline vf round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vi to_int(vf a) { return _mm256_cvtps_epi32(a); }
inline vf as_float(vi a) { return _mm256_castsi256_ps(a); }  // the same bits
inline vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }

inline vi addi(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi subi(vi a, vi b) { return _mm256_sub_epi32(a, b); }
inline float sum(vf a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline float max_of(vf a) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline float min_of(vf a) {
  __m128 h = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  h = _mm_min_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_min_ss(h, _mm_shuffle_ps(h, h, 1)));
}

// a * 2 ** n for whole n. In two halves, so that subnormal results and the way to infinity are right: 2 ** n alone would
// need n in -126 … 127.
inline vf times_power_of_two(vf a, vf n) {
  vi whole = to_int(min(max(n, set1(-252.0f)), set1(254.0f)));
  vi half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
  auto power = [](vi e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, set1i(127)), 23)); };
  return mul(mul(a, power(half)), power(rest));
}
inline vf power_of_two(vf n) { return times_power_of_two(set1(1.0f), n); }

inline vi first(int n) {  // n in 0 … 8
  return _mm256_cmpgt_epi32(set1i(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline vf load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
inline void store_n(float* p, vf a, int n) { _mm256_maskstore_ps(p, first(n), a); }
inline vi load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store(int32_t* p, vi a) { _mm256_storeu_si256((__m256i*)p, a); }

inline vf from_bf16(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }

// To nearest, ties to even; NaN stays NaN; subnormal numbers are flushed to zero, as AVX512_BF16's instruction does.
inline __m128i to_bf16(vf a) {
  vi bits = _mm256_castps_si256(a);
  vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set1i(1));
  vi rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, set1i(0x7fff)));
  vi nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, set1i(0x400000)), nan);
  vi subnormal = _mm256_cmpeq_epi32(_mm256_and_si256(bits, set1i(0x7f800000)), zeroi());
  rounded = _mm256_blendv_epi8(rounded, _mm256_and_si256(bits, set1i(static_cast<int32_t>(0x80000000))), subnormal);
  vi high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline vf load(const bf16* p) { return from_bf16(_mm_loadu_si128((const __m128i*)p)); }
inline vf load_n(const bf16* p, int n) {
  bf16 some[8] = {};
  memcpy(some, p, static_cast<size_t>(n) * 2);
  return load(some);
}
inline void store(bf16* p, vf a) { _mm_storeu_si128((__m128i*)p, to_bf16(a)); }
inline void store_n(bf16* p, vf a, int n) {
  bf16 some[8];
  store(some, a);
  memcpy(p, some, static_cast<size_t>(n) * 2);
}

inline vf load(const uint8_t* p) { return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline vf load(const int8_t* p) { return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
template <class Byte>
inline vf load_bytes_n(const Byte* p, int n) {
  Byte some[8] = {};
  memcpy(some, p, static_cast<size_t>(n));
  return load(some);
}
inline vf load_n(const uint8_t* p, int n) { return load_bytes_n(p, n); }
inline vf load_n(const int8_t* p, int n) { return load_bytes_n(p, n); }
inline void store_byte(uint8_t* p, vi a) {
  alignas(32) int32_t wide[8];
  _mm256_store_si256((__m256i*)wide, a);
  for (int i = 0; i < 8; ++i) p[i] = static_cast<uint8_t>(wide[i]);
}
inline void store_byte_n(uint8_t* p, vi a, int n) {
  alignas(32) int32_t wide[8];
  _mm256_store_si256((__m256i*)wide, a);
  for (int i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(wide[i]);
}
inline vf load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

inline vf dot_bf16(vi a, vi b, vf c) {
  vi high = set1i(static_cast<int32_t>(0xffff0000));
  c = fma(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), c);
  return fma(_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high)), c);
}

inline vi dot_u8s8(vi a, vi b, vi c) {
  vi a_even = _mm256_and_si256(a, set1i(0x00ff00ff)), a_odd = _mm256_srli_epi16(a, 8);
  vi b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b_odd = _mm256_srai_epi16(b, 8);
  return _mm256_add_epi32(c, _mm256_add_epi32(_mm256_madd_epi16(a_even, b_even), _mm256_madd_epi16(a_odd, b_odd)));
}

// Whole numbers -127 … 127 to the nearest of each lane, ties to even, as unsigned codes: plus 128.
inline void store_code(uint8_t* p, vf a) { store_byte(p, addi(to_int(a), set1i(128))); }
inline void store_code_n(uint8_t* p, vf a, int n) { store_byte_n(p, addi(to_int(a), set1i(128)), n); }

// 16 floats as bf16, in their order.
inline vi pair_bf16(vf low, vf high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(to_bf16(low)), to_bf16(high), 1);
}
// Lane by lane: bf16 `low` below bf16 `high`.
inline vi zip_bf16(const bf16* low, const bf16* high) {
  return _mm256_or_si256(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)low)),
                         _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)high)), 16));
}
inline vi zip_bf16(const float* low, const float* high) {
  return _mm256_or_si256(_mm256_cvtepu16_epi32(to_bf16(load(low))),
                         _mm256_slli_epi32(_mm256_cvtepu16_epi32(to_bf16(load(high))), 16));
}

// Whole numbers inside of words.
template <int BITS>
inline vi right_zero(vi a) {
  return _mm256_srli_epi32(a, BITS);
}
inline vi both(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi either(vi a, vi b) { return _mm256_or_si256(a, b); }
inline vi as_int(vf a) { return _mm256_castps_si256(a); }

// Byte I of each word as its highest byte, zeros below: the byte, signed, times 2 ** 24.
template <int I>
inline vi top_byte(vi a) {
  if (I == 3) return both(a, set1i(static_cast<int>(0xff000000)));
  constexpr int Z = 0x80;
  const __m128i from = _mm_setr_epi8(Z, Z, Z, I, Z, Z, Z, 4 + I, Z, Z, Z, 8 + I, Z, Z, Z, 12 + I);
  return _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(from));
}

// The lowest 4 bits of each word minus 8; higher bits are not looked at.
inline vf nibble(vi a) { return to_float(subi(both(a, set1i(15)), set1i(8))); }
// The lowest 4 bits of each half of a word minus 8, as two bf16.
inline vi nibble_pair(vi a) {
  return either(right_zero<16>(as_int(nibble(a))), both(as_int(nibble(right_zero<16>(a))), set1i(-65536)));
}

}  // namespace
}  // namespace miss
