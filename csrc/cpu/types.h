// Number types that C++17 does not have.
#pragma once

#include <stdint.h>

namespace miss {

struct bf16 {  // bfloat16: the upper half of a float
  uint16_t bits;
};

enum class Type : int32_t { f32, bf16, u8, s8 };

}  // namespace miss
