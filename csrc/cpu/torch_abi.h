// What the ops_*.cpp files need of PyTorch's stable ABI, and how they look at tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "types.h"

namespace miss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Byte: return Type::u8;
    case ScalarType::Char: return Type::s8;
    default: STD_TORCH_CHECK(false, "miss_cpu: a tensor's dtype is none of float32, bfloat16, uint8, int8");
  }
}

// The data as bytes; nullptr where there is no tensor.
inline const char* bytes_of(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
inline const char* bytes_of(const std::optional<Tensor>& t) { return t.has_value() ? bytes_of(*t) : nullptr; }
inline char* bytes_to(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

}  // namespace miss
