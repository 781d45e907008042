// Number types that C++17 does not have.
#pragma once

#include <stdint.h>

namespace miss {

struct bf16 {  // bfloat16: the upper half of a float
  uint16_t bits;
};

namespace {

inline void convert(float from, float& to) { to = from; }
inline void convert(bf16 from, bf16& to) { to = from; }
inline void convert(int8_t from, int8_t& to) { to = from; }
inline void convert(float from, bf16& to) {  // to nearest, ties to even; NaN stays NaN; subnormal numbers to zero
  uint32_t bits;
  __builtin_memcpy(&bits, &from, 4);
  if (from != from) to.bits = static_cast<uint16_t>((bits | 0x400000u) >> 16);
  else if ((bits & 0x7f800000u) == 0) to.bits = static_cast<uint16_t>((bits & 0x80000000u) >> 16);
  else to.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline int as_code(int8_t value) { return value; }
template <class T>
int as_code(T) {
  return 0;
}

}  // namespace

enum class Type : int32_t { f32, bf16, u8, s8 };

}  // namespace miss
