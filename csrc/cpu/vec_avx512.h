// Vectors of 16 floats on AVX-512 (F, BW, DQ, VL; with VNNI and BF16 where the file that includes this has them).
// Knows registers and instructions; does not know tensors. Same names as vec_avx2.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

namespace miss {
namespace {

constexpr int LANES = 16;
constexpr int REGISTERS = 32;
using vf = __m512;
using vi = __m512i;

inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf zero() { return _mm512_setzero_ps(); }
inline vi set1i(int32_t x) { return _mm512_set1_epi32(x); }
inline vi zeroi() { return _mm512_setzero_si512(); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }     // a * b + c
inline vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }   // c - a * b
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }                // b where either is NaN
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }                // b where either is NaN
inline vf abs(vf a) { return _mm512_abs_ps(a); }
inline vf round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vi to_int(vf a) { return _mm512_cvtps_epi32(a); }                 // to nearest, ties to even
inline vf as_float(vi a) { return _mm512_castsi512_ps(a); }  // the same bits
inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
inline vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi subi(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }
inline float max_of(vf a) { return _mm512_reduce_max_ps(a); }
inline float min_of(vf a) { return _mm512_reduce_min_ps(a); }
inline vf times_power_of_two(vf a, vf n) { return _mm512_scalef_ps(a, n); }  // a * 2 ** n for whole n, rounded once
inline vf power_of_two(vf n) { return _mm512_scalef_ps(set1(1.0f), n); }  // 2 ** n for whole n; 0 and infinity beyond

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }  // n in 0 … 16

inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline vf load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
inline void store_n(float* p, vf a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
inline vi load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, vi a) { _mm512_storeu_si512(p, a); }

inline vf from_bf16(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }

// To nearest, ties to even; NaN stays NaN. AVX512_BF16's own instruction flushes subnormal numbers to zero: here too,
// so that every instruction set rounds alike.
inline __m256i to_bf16(vf a) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(a);
#else
  vi bits = _mm512_castps_si512(a);
  vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set1i(1));
  vi rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, set1i(0x7fff)));
  rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), bits, set1i(0x400000));
  __mmask16 subnormal = _mm512_testn_epi32_mask(bits, set1i(0x7f800000));
  rounded = _mm512_mask_and_epi32(rounded, subnormal, bits, set1i(static_cast<int32_t>(0x80000000)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

inline vf load(const bf16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline vf load_n(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void store(bf16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
inline void store_n(bf16* p, vf a, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(a)); }

// Bytes as numbers, and numbers as bytes: those given are whole and in range.
inline vf load(const uint8_t* p) { return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline vf load_n(const uint8_t* p, int n) { return to_float(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p))); }
inline vf load(const int8_t* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline vf load_n(const int8_t* p, int n) { return to_float(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p))); }
inline void store_byte(uint8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
inline void store_byte_n(uint8_t* p, vi a, int n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(a)); }
inline vf load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// The products' inner step. `a` holds the same 4 bytes of A in every lane, `b` 4 bytes of each of 16 columns of B.

inline vf dot_bf16(vi a, vi b, vf c) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  vi high = set1i(static_cast<int32_t>(0xffff0000));
  c = fma(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), c);
  return fma(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), c);
#endif
}

// a: four bytes 0 … 255, b: four bytes -128 … 127. Exact: no pair of products is saturated.
inline vi dot_u8s8(vi a, vi b, vi c) {
#ifdef __AVX512VNNI__
  // Not _mm512_dpbusd_epi32: GCC 12 copies every accumulator around it, which halves the rate (40 % of the peak).
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
#else
  vi a_even = _mm512_and_si512(a, set1i(0x00ff00ff)), a_odd = _mm512_srli_epi16(a, 8);
  vi b_even = _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8), b_odd = _mm512_srai_epi16(b, 8);
  return _mm512_add_epi32(c, _mm512_add_epi32(_mm512_madd_epi16(a_even, b_even), _mm512_madd_epi16(a_odd, b_odd)));
#endif
}

// Whole numbers -127 … 127 to the nearest of each lane, ties to even, as unsigned codes: plus 128.
inline void store_code(uint8_t* p, vf a) { store_byte(p, addi(to_int(a), set1i(128))); }
inline void store_code_n(uint8_t* p, vf a, int n) { store_byte_n(p, addi(to_int(a), set1i(128)), n); }

// 32 floats as bf16, in their order.
inline vi pair_bf16(vf low, vf high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(low)), to_bf16(high), 1);
}
// Lane by lane: bf16 `low` below bf16 `high`.
inline vi zip_bf16(const bf16* low, const bf16* high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low)),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high)), 16));
}
inline vi zip_bf16(const float* low, const float* high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(to_bf16(load(low))),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(load(high))), 16));
}

// Whole numbers inside of words.
template <int BITS>
inline vi right_zero(vi a) {
  return _mm512_srli_epi32(a, BITS);
}
inline vi both(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi either(vi a, vi b) { return _mm512_or_si512(a, b); }
inline vi as_int(vf a) { return _mm512_castps_si512(a); }

// Byte I of each word as its highest byte, zeros below: the byte, signed, times 2 ** 24.
template <int I>
inline vi top_byte(vi a) {
  if (I == 3) return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xff000000)));
  constexpr int Z = 0x80;
  const __m128i from = _mm_setr_epi8(Z, Z, Z, I, Z, Z, Z, 4 + I, Z, Z, Z, 8 + I, Z, Z, Z, 12 + I);
  return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(from));
}

// The lowest 4 bits of each word minus 8; higher bits are not looked at.
inline vf nibble(vi a) {
  return _mm512_permutexvar_ps(a, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
}
// The lowest 4 bits of each half of a word minus 8, as two bf16.
inline vi nibble_pair(vi a) {
  // bf16 of -8 … 7, twice: the instruction looks at 5 bits
  const vi table = _mm512_setr_epi32(
      static_cast<int>(0xc0e0c100), static_cast<int>(0xc0a0c0c0), static_cast<int>(0xc040c080),
      static_cast<int>(0xbf80c000), 0x3f800000, 0x40404000, 0x40a04080, 0x40e040c0, static_cast<int>(0xc0e0c100),
      static_cast<int>(0xc0a0c0c0), static_cast<int>(0xc040c080), static_cast<int>(0xbf80c000), 0x3f800000, 0x40404000,
      0x40a04080, 0x40e040c0);
  return _mm512_permutexvar_epi16(a, table);
}

}  // namespace
}  // namespace miss
