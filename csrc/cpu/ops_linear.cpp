// Linear layers as functions of PyTorch tensors.
#include "linear.h"
#include "tensor_ops.h"

namespace miss {

namespace {

constexpr int64_t PANEL = 64;

int64_t group_of(Type type) { return type == Type::f32 ? 1 : type == Type::bf16 ? 2 : 4; }

// Rows of x: all dimensions but the last.
int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(last);
  return sizes;
}

Tensor as_matrix(const Tensor& x, int64_t rows, int64_t columns) {
  return torch::stable::reshape(x, std::vector<int64_t>{rows, columns});
}

Tensor make(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return allocate(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}

ScalarType scalar(Type type) {
  switch (type) {
    case Type::f32: return ScalarType::Float;
    case Type::bf16: return ScalarType::BFloat16;
    case Type::u8: return ScalarType::Byte;
    default: return ScalarType::Char;
  }
}

// The part of the arguments that all forms share. x is contiguous (…, K).
LinearArgs common(const Tensor& x, const Tensor& panels, int64_t columns, const std::optional<Tensor>& bias) {
  LinearArgs args = {};
  args.x = bytes_of(x);
  args.x_type = type_of(x);
  args.rows = rows_of(x);
  args.columns = columns;
  args.k = x.size(x.dim() - 1);
  args.x_stride = args.k;
  args.panels = bytes_of(panels);
  int64_t group = panels.size(3);
  STD_TORCH_CHECK(panels.dim() == 4 && panels.size(2) == PANEL && panels.size(0) == (columns + PANEL - 1) / PANEL &&
                      panels.size(1) == (args.k + group - 1) / group,
                  "miss_cpu: the panels are not those of a weight (", columns, ", ", args.k, ")");
  args.bias = bytes_of(bias);
  args.bias_type = bias.has_value() ? type_of(*bias) : Type::f32;
  return args;
}

// keep: for as long as a model lives.
Tensor pack_panels(const Tensor& weight, bool transposed, bool to_bf16, bool keep) {
  PackArgs args = {};
  int64_t n = transposed ? 1 : 0;
  args.from = bytes_of(weight);
  args.from_type = type_of(weight);
  args.to_type = to_bf16 ? Type::bf16 : args.from_type;
  args.rows = weight.size(n);
  args.k = weight.size(1 - n);
  args.row_stride = weight.stride(n);
  args.k_stride = weight.stride(1 - n);
  int64_t group = group_of(args.to_type);
  std::vector<int64_t> sizes{(args.rows + PANEL - 1) / PANEL, (args.k + group - 1) / group, PANEL, group};
  ScalarType dtype = scalar(args.to_type);
  Tensor panels = keep ? kept_tensor(sizes, dtype, static_cast<size_t>(4 / group)) : make(sizes, dtype);
  args.panels = bytes_to(panels);
  linear_kernels().pack(args);
  return panels;
}

std::tuple<Tensor, Tensor> pack_int8(const Tensor& data) {
  PackArgs args = {};
  args.from = bytes_of(data);
  args.from_type = args.to_type = Type::s8;
  args.rows = data.size(0);
  args.k = data.size(1);
  args.row_stride = data.stride(0);
  args.k_stride = data.stride(1);
  Tensor panels = kept_tensor({(args.rows + PANEL - 1) / PANEL, (args.k + 3) / 4, PANEL, 4}, ScalarType::Char, 1);
  Tensor offset = make({args.rows}, ScalarType::Int);
  args.panels = bytes_to(panels);
  args.offset = static_cast<int32_t*>(offset.mutable_data_ptr());
  linear_kernels().pack(args);
  return {panels, offset};
}

// y (…, N) in x's dtype, and x W^T + bias as it was before gelu (empty unless `keep`).
std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& panels, int64_t columns,
                                  const std::optional<Tensor>& bias, bool gelu, const std::optional<Tensor>& residual,
                                  bool keep) {
  LinearArgs args = common(x, panels, columns, bias);
  STD_TORCH_CHECK(type_of(panels) == args.x_type, "miss_cpu::linear: x and the panels differ in dtype");
  Tensor y = make(with_last(x, columns), x.scalar_type());
  Tensor pre = make(keep ? with_last(x, columns) : std::vector<int64_t>{0}, x.scalar_type());
  args.gelu = gelu;
  args.residual = bytes_of(residual);
  args.residual_stride = columns;
  args.pre = keep ? bytes_to(pre) : nullptr;
  args.y = bytes_to(y);
  args.y_type = args.x_type;
  linear_kernels().forward(args);
  return {y, pre};
}

LinearArgs int8_args(const Tensor& x, const std::optional<Tensor>& x_scale, const Tensor& panels, const Tensor& offset,
                     const Tensor& scale, const std::optional<Tensor>& bias, bool gelu) {
  LinearArgs args = common(x, panels, scale.size(0), bias);
  STD_TORCH_CHECK((args.x_type == Type::u8) == x_scale.has_value(), "miss_cpu: codes come with scales, numbers without");
  args.column_scale = scale.const_data_ptr<float>();
  args.offset = offset.const_data_ptr<int32_t>();
  args.row_scale = x_scale.has_value() ? x_scale->const_data_ptr<float>() : nullptr;
  args.gelu = gelu;
  return args;
}

}  // namespace

// y (…, N) in `dtype` of x: float32, bf16, or codes with x_scale (…).
Tensor linear_int8(const Tensor& x, const std::optional<Tensor>& x_scale, const Tensor& panels, const Tensor& offset,
                   const Tensor& scale, const std::optional<Tensor>& bias, bool gelu,
                   const std::optional<Tensor>& residual, ScalarType dtype) {
  LinearArgs args = int8_args(x, x_scale, panels, offset, scale, bias, gelu);
  Tensor y = make(with_last(x, args.columns), dtype);
  args.residual = bytes_of(residual);
  args.residual_stride = args.columns;
  args.y = bytes_to(y);
  args.y_type = type_of(y);
  linear_kernels().forward(args);
  return y;
}

namespace {

// Where the columns of y, which is out (…, D) without its first `leading` dimensions, lie in it; the leading ones are x's.
struct Places {
  std::vector<int64_t> at;

  Places(LinearArgs& args, const Tensor& out, int64_t leading) {
    const int64_t dims = out.dim(), tokens = out.size(leading - 1);
    args.piece = out.size(dims - 1);
    STD_TORCH_CHECK((leading == 1 || leading == 2) && dims > leading && out.stride(dims - 1) == 1 &&
                        (args.piece == 32 || args.piece == 64) && args.columns % args.piece == 0,
                    "miss_cpu: the result is (I, N, …, 32 or 64) or (N, …, 32 or 64), its last dimension dense");
    int64_t count = 1;
    for (int64_t d = 0; d + 1 < dims; ++d) count *= d < leading ? 1 : out.size(d);
    STD_TORCH_CHECK(count * args.piece == args.columns && tokens * (leading == 2 ? out.size(0) : 1) == args.rows,
                    "miss_cpu: the result does not fit the product");
    for (int64_t i = 0; i < count; ++i) {
      int64_t rest = i, place = 0;
      for (int64_t d = dims - 2; d >= leading; rest /= out.size(d--)) place += rest % out.size(d) * out.stride(d);
      at.push_back(place);
    }
    args.places = at.data();
    args.y_tokens = tokens > 0 ? tokens : 1;
    args.y_outer = leading == 2 ? out.stride(0) : 0;
    args.y_token = out.stride(leading - 1);
    args.y = bytes_to(out);
    args.y_type = type_of(out);
  }
};

// y into out, of any strides but its last.
void linear_into(const Tensor& x, const Tensor& panels, int64_t columns, const std::optional<Tensor>& bias,
                 const Tensor& out) {
  LinearArgs args = common(x, panels, columns, bias);
  STD_TORCH_CHECK(type_of(panels) == args.x_type && type_of(out) == args.x_type, "miss_cpu::linear_into: one dtype");
  const Places places(args, out, x.dim() - 1);
  linear_kernels().forward(args);
}

void linear_int8_into(const Tensor& x, const std::optional<Tensor>& x_scale, const Tensor& panels, const Tensor& offset,
                      const Tensor& scale, const std::optional<Tensor>& bias, const Tensor& out) {
  LinearArgs args = int8_args(x, x_scale, panels, offset, scale, bias, false);
  const Places places(args, out, x.dim() - 1);
  linear_kernels().forward(args);
}

}  // namespace

// The same, written as codes (…, N) and scales (…) for the next product.
std::tuple<Tensor, Tensor> linear_int8_codes(const Tensor& x, const std::optional<Tensor>& x_scale, const Tensor& panels,
                                             const Tensor& offset, const Tensor& scale,
                                             const std::optional<Tensor>& bias, bool gelu) {
  LinearArgs args = int8_args(x, x_scale, panels, offset, scale, bias, gelu);
  std::vector<int64_t> sizes = with_last(x, args.columns);
  Tensor codes = make(sizes, ScalarType::Byte);
  sizes.pop_back();
  Tensor codes_scale = make(sizes, ScalarType::Float);
  args.y_type = Type::f32;
  args.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  args.codes_scale = static_cast<float*>(codes_scale.mutable_data_ptr());
  linear_kernels().forward(args);
  return {codes, codes_scale};
}

namespace {

// dx, dweight, dbias of y = gelu?(x W^T + bias): dy and pre (…, N), x (…, K), weight (N, K), all contiguous but the
// weight and of one dtype; the weight may be float32 where they are bf16, and is rounded. `pre` where there was a gelu. What is not wanted is empty.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   const std::optional<Tensor>& pre, bool need_x, bool need_weight,
                                                   bool need_bias) {
  const LinearKernels& kernels = linear_kernels();
  Type type = type_of(dy);
  int64_t rows = rows_of(x), k = x.size(x.dim() - 1), columns = weight.size(0);
  std::vector<int64_t> none{0};
  Tensor dz = dy;
  if (pre.has_value()) {
    dz = make(with_last(dy, columns), dy.scalar_type());
    kernels.gelu_backward(bytes_of(dy), bytes_of(*pre), type, rows * columns, bytes_to(dz));
  }
  Tensor dx = make(need_x ? with_last(x, k) : none, x.scalar_type());
  if (need_x) {
    LinearArgs args = {};
    Tensor panels = pack_panels(weight, true, type == Type::bf16, false);
    args.x = bytes_of(dz);
    args.x_type = args.y_type = type;
    args.rows = rows;
    args.columns = k;
    args.k = args.x_stride = columns;
    args.panels = bytes_of(panels);
    args.y = bytes_to(dx);
    kernels.forward(args);
  }
  Tensor dweight = make(need_weight ? std::vector<int64_t>{columns, k} : none, weight.scalar_type());
  if (need_weight) {
    Tensor a = pack_panels(as_matrix(dz, rows, columns), true, false, false), b = pack_panels(as_matrix(x, rows, k), true, false, false);
    kernels.packed_product({bytes_of(a), bytes_of(b), type, type_of(weight), columns, k, rows, bytes_to(dweight)});
  }
  Tensor dbias = make(need_bias ? std::vector<int64_t>{columns} : none, x.scalar_type());
  if (need_bias) kernels.column_sums(bytes_of(dz), type, rows, columns, bytes_to(dbias));
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor> quantise_rows(const Tensor& x) {
  int64_t k = x.size(x.dim() - 1);
  Tensor codes = make(with_last(x, k), ScalarType::Byte);
  std::vector<int64_t> sizes = with_last(x, k);
  sizes.pop_back();
  Tensor scale = make(sizes, ScalarType::Float);
  linear_kernels().quantise(bytes_of(x), type_of(x), rows_of(x), k, k, static_cast<uint8_t*>(codes.mutable_data_ptr()),
                            static_cast<float*>(scale.mutable_data_ptr()));
  return {codes, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def("pack_panels(Tensor weight, bool transposed=False, bool to_bf16=False, bool keep=False) -> Tensor");
  m.def("pack_int8(Tensor data) -> (Tensor, Tensor)");
  m.def(
      "linear(Tensor x, Tensor panels, int columns, Tensor? bias, bool gelu, Tensor? residual, bool keep)"
      " -> (Tensor, Tensor)");
  m.def(
      "linear_int8(Tensor x, Tensor? x_scale, Tensor panels, Tensor offset, Tensor scale, Tensor? bias, bool gelu,"
      " Tensor? residual, ScalarType dtype) -> Tensor");
  m.def(
      "linear_int8_codes(Tensor x, Tensor? x_scale, Tensor panels, Tensor offset, Tensor scale, Tensor? bias, bool gelu)"
      " -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? pre, bool need_x, bool need_weight, bool need_bias)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("linear_into(Tensor x, Tensor panels, int columns, Tensor? bias, Tensor(a!) out) -> ()");
  m.def(
      "linear_int8_into(Tensor x, Tensor? x_scale, Tensor panels, Tensor offset, Tensor scale, Tensor? bias,"
      " Tensor(a!) out) -> ()");
  m.def("quantise_rows(Tensor x) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("pack_panels", TORCH_BOX(&pack_panels));
  m.impl("pack_int8", TORCH_BOX(&pack_int8));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_int8_codes", TORCH_BOX(&linear_int8_codes));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("linear_into", TORCH_BOX(&linear_into));
  m.impl("linear_int8_into", TORCH_BOX(&linear_int8_into));
  m.impl("quantise_rows", TORCH_BOX(&quantise_rows));
}

}  // namespace miss
