// The language-model head as functions of PyTorch tensors.
#include <cmath>
#include <tuple>

#include "convert.h"
#include "parallel.h"
#include "top_k.h"
#include "torch_abi.h"

namespace miss {

namespace {

using Maybe = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t PANEL = 64;

// values float32 (R, count), indices int64 (R, count), lse float32 (R,)
Three run(TopKArgs& args, const Tensor& x, const Tensor& panels, const Maybe& bias, int64_t columns, int64_t count) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "top_k: x is not a contiguous matrix");
  args.x = bytes_of(x);
  args.x_type = type_of(x);
  STD_TORCH_CHECK(args.x_type == Type::f32 || args.x_type == Type::bf16, "top_k: x is float32 or bfloat16");
  args.rows = x.size(0);
  args.k = x.size(1);
  args.columns = columns;
  STD_TORCH_CHECK(count >= 1 && count <= MOST_K && count <= columns, "top_k: k is not in 1 … ", MOST_K);
  STD_TORCH_CHECK(panels.dim() == 4 && panels.is_contiguous() && panels.size(0) == (columns + PANEL - 1) / PANEL &&
                      panels.size(1) == (args.k + panels.size(3) - 1) / panels.size(3) && panels.size(2) == PANEL,
                  "top_k: the panels are not those of a weight (", columns, ", ", args.k, ")");
  args.panels = bytes_of(panels);
  args.count = static_cast<int>(count);
  Tensor wide;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->numel() == columns && bias->is_contiguous(), "top_k: the bias is not (", columns, ",)");
    args.bias = reinterpret_cast<const float*>(bytes_of(*bias));
    if (type_of(*bias) == Type::bf16) {
      wide = allocate(&columns, 1, ScalarType::Float);
      convert_kernels().widen(reinterpret_cast<const bf16*>(bytes_of(*bias)), wide.mutable_data_ptr<float>(), columns);
      args.bias = wide.const_data_ptr<float>();
    }
  }
  const int64_t sizes[2] = {args.rows, count};
  Tensor values = allocate(sizes, 2, ScalarType::Float), indices = allocate(sizes, 2, ScalarType::Long);
  Tensor lse = allocate(sizes, 1, ScalarType::Float), total = allocate(sizes, 1, ScalarType::Float);
  args.values = values.mutable_data_ptr<float>();
  args.indices = indices.mutable_data_ptr<int64_t>();
  args.shift = lse.mutable_data_ptr<float>();
  args.total = total.mutable_data_ptr<float>();
  if (args.rows == 0) return {values, indices, lse};
  top_k_kernels().forward(args);
  for (int64_t r = 0; r < args.rows; ++r)
    args.shift[r] = static_cast<float>(args.shift[r] + std::log(static_cast<double>(args.total[r])));
  return {values, indices, lse};
}

Three linear_top_k(const Tensor& x, const Tensor& panels, int64_t columns, const Maybe& bias, int64_t k) {
  TopKArgs args{};
  STD_TORCH_CHECK(panels.scalar_type() == x.scalar_type(), "top_k: x and the panels differ in dtype");
  return run(args, x, panels, bias, columns, k);
}

Three linear_top_k_int8(const Tensor& x, const Tensor& panels, const Tensor& offset, const Tensor& scale,
                        const Maybe& bias, int64_t k) {
  TopKArgs args{};
  STD_TORCH_CHECK(type_of(panels) == Type::s8 && offset.numel() == scale.numel(), "top_k: the panels are not int8");
  args.column_scale = scale.const_data_ptr<float>();
  args.offset = offset.const_data_ptr<int32_t>();
  return run(args, x, panels, bias, scale.numel(), k);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def("linear_top_k(Tensor x, Tensor panels, int columns, Tensor? bias, int k) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_top_k_int8(Tensor x, Tensor panels, Tensor offset, Tensor scale, Tensor? bias, int k)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("linear_top_k", TORCH_BOX(&linear_top_k));
  m.impl("linear_top_k_int8", TORCH_BOX(&linear_top_k_int8));
}

}  // namespace miss
