// Weight-only linear layers as functions of PyTorch tensors.
#include "torch_abi.h"
#include "weight_only.h"

namespace miss {

namespace {

constexpr int64_t PANEL = 64;

// codes uint8 (N, G * group), scale float16 (N, G), zero uint8 (N, G) or none -> uint8 (ceil(N / 64), G, bytes).
Tensor pack_int4(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero, int64_t group) {
  PackInt4Args args = {};
  args.codes = codes.const_data_ptr<uint8_t>();
  args.scale = reinterpret_cast<const uint16_t*>(bytes_of(scale));
  args.zero = reinterpret_cast<const uint8_t*>(bytes_of(zero));
  args.rows = codes.size(0);
  args.groups = scale.size(1);
  args.group = static_cast<int>(group);
  std::vector<int64_t> sizes{(args.rows + PANEL - 1) / PANEL, args.groups, int4_group_bytes(args.group, zero.has_value())};
  Tensor panels = kept_tensor(sizes, ScalarType::Byte, 1);
  args.panels = bytes_to(panels);
  weight_only_kernels().pack(args);
  return panels;
}

// y (…, N) of x (…, K). int8: panels of pack_int8 and scale (N); int4 (group > 0): panels of pack_int4.
Tensor linear_weight_only(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& scale, int64_t columns,
                          int64_t group, bool zeros, const std::optional<Tensor>& bias) {
  WeightOnlyArgs args = {};
  std::vector<int64_t> sizes;
  args.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    sizes.push_back(x.size(i));
    args.rows *= x.size(i);
  }
  sizes.push_back(columns);
  args.x = bytes_of(x);
  args.type = type_of(x);
  args.columns = columns;
  args.k = args.x_stride = x.size(x.dim() - 1);
  args.panels = bytes_of(panels);
  args.group = static_cast<int>(group);
  args.zeros = zeros;
  args.column_scale = scale.has_value() ? scale->const_data_ptr<float>() : nullptr;
  args.bias = bytes_of(bias);
  args.bias_type = bias.has_value() ? type_of(*bias) : Type::f32;
  Tensor y = torch::stable::empty(sizes, x.scalar_type());
  args.y = bytes_to(y);
  weight_only_kernels().forward(args);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def("pack_int4(Tensor codes, Tensor scale, Tensor? zero, int group) -> Tensor");
  m.def(
      "linear_weight_only(Tensor x, Tensor panels, Tensor? scale, int columns, int group, bool zeros, Tensor? bias)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("pack_int4", TORCH_BOX(&pack_int4));
  m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only));
}

}  // namespace miss
