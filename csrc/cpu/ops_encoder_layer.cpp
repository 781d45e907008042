// A whole layer of an encoder whose products take int8 codes, in one call: the operations that a model would call one
// by one, in their order. Knows the order; does not know how any of them is computed.
//
// Python takes 20 us and more between two operations, where a model's weights have just passed through the caches: of the
// 17 ms of a question of 18 tokens (base), whose 120 operations work for 8.5 ms.
#include <cmath>

#include "tensor_ops.h"

namespace miss {

namespace {

// Consecutive tensors of a list: what layers are made of, in the order in which they run.
class Parts {
 public:
  explicit Parts(const std::vector<Tensor>& all) : all_(all) {}
  const Tensor& next() {
    STD_TORCH_CHECK(at_ < all_.size(), "miss_cpu: an encoder layer of ", all_.size(), " tensors: too few");
    return all_[at_++];
  }
  void end() const {
    STD_TORCH_CHECK(at_ == all_.size(), "miss_cpu: an encoder layer of ", all_.size(), " tensors: wanted ", at_);
  }

 private:
  const std::vector<Tensor>& all_;
  size_t at_ = 0;
};

struct Matrix {
  const Tensor &panels, &offset, &scale, &bias;

  static Matrix of(Parts& parts) {
    const Tensor& panels = parts.next();
    const Tensor& offset = parts.next();
    const Tensor& scale = parts.next();
    return {panels, offset, scale, parts.next()};
  }
  Tensor of_numbers(const Tensor& x) const {
    return linear_int8(x, std::nullopt, panels, offset, scale, bias, false, std::nullopt, x.scalar_type());
  }
  Tensor of_codes(const Tensor& codes, const Tensor& row_scale, ScalarType dtype,
                  const std::optional<Tensor>& residual = std::nullopt) const {
    return linear_int8(codes, row_scale, panels, offset, scale, bias, false, residual, dtype);
  }
  std::tuple<Tensor, Tensor> gelu_to_codes(const Tensor& codes, const Tensor& row_scale) const {
    return linear_int8_codes(codes, row_scale, panels, offset, scale, bias, true);
  }
};

struct Norm {
  const Tensor &weight, &bias;

  static Norm of(Parts& parts) {
    const Tensor& weight = parts.next();
    return {weight, parts.next()};
  }
};

std::vector<int64_t> shape_of(const Tensor& x, int64_t leading) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < leading; ++d) shape.push_back(x.size(d));
  return shape;
}

// (…, C) as (…, parts, heads, head width).
Tensor heads_of(const Tensor& x, int64_t parts, int64_t heads) {
  std::vector<int64_t> shape = shape_of(x, x.dim() - 1);
  if (parts > 1) shape.push_back(parts);
  shape.push_back(heads);
  shape.push_back(x.size(x.dim() - 1) / parts / heads);
  return torch::stable::view(x, shape);
}

Tensor part(const Tensor& qkv, int64_t i) { return torch::stable::select(qkv, qkv.dim() - 3, i); }

Tensor flat(const Tensor& x, const Tensor& like) { return torch::stable::view(x, shape_of(like, like.dim())); }

double scale_of(const Tensor& q) { return 1.0 / std::sqrt(static_cast<double>(q.size(q.dim() - 1))); }

// norm, self-attention, add; norm, MLP, add: x (I, N, C).
Tensor image_layer(const Tensor& x, std::vector<Tensor> weights, int64_t heads, double eps1, double eps2) {
  Parts parts(weights);
  const Norm norm1 = Norm::of(parts);
  const Matrix qkv = Matrix::of(parts), output = Matrix::of(parts);
  const Norm norm2 = Norm::of(parts);
  const Matrix input = Matrix::of(parts), mlp_output = Matrix::of(parts);
  parts.end();
  auto [codes, scale] = layer_norm_quantised(x, norm1.weight, norm1.bias, eps1);
  const Tensor all = heads_of(qkv.of_codes(codes, scale, x.scalar_type()), 3, heads), q = part(all, 0);
  const Tensor attended = flat(quantised_forward(q, part(all, 1), part(all, 2), scale_of(q)), x);
  auto [next, next_scale, none, summed] =
      add_layer_norm_quantised(output.of_numbers(attended), x, norm2.weight, norm2.bias, eps2, false);
  auto [inner, inner_scale] = input.gelu_to_codes(next, next_scale);
  return mlp_output.of_codes(inner, inner_scale, x.scalar_type(), summed);
}

struct State {  // what follows a norm: as numbers, which the next sum takes, and as codes, which the next product takes
  Tensor numbers, codes, scale;
};

State add_norm(const Tensor& x, const Tensor& residual, const Norm& norm, double eps) {
  auto [codes, scale, numbers, summed] = add_layer_norm_quantised(x, residual, norm.weight, norm.bias, eps, true);
  return {numbers, codes, scale};
}

// Each token of x over its row's first `lengths` (R,), (R, T, C), or over its own sequence of packed ones, (M, C) with
// offsets.
Tensor self_attention(const Tensor& x, const Matrix& qkv, int64_t heads, const std::optional<Tensor>& lengths,
                      const std::optional<Tensor>& offsets, int64_t max_length) {
  const Tensor all = heads_of(qkv.of_numbers(x), 3, heads), q = part(all, 0), k = part(all, 1), v = part(all, 2);
  const double scale = scale_of(q);
  if (!offsets.has_value()) return std::get<0>(attention_forward(q, k, v, lengths, false, scale, 0.0, std::nullopt));
  return std::get<0>(varlen_forward(q, k, v, *offsets, max_length, false, scale, 0.0, std::nullopt));
}

// self-attention, add and norm; over an image, where there is one, add and norm; MLP, add and norm. x (R, T, C) or, packed,
// (M, C), whose tokens are rows of their own over an image.
Tensor text_layer(const Tensor& x, std::vector<Tensor> weights, int64_t heads, double eps,
                  const std::optional<Tensor>& lengths, const std::optional<Tensor>& offsets, int64_t max_length,
                  const std::optional<Tensor>& image_k, const std::optional<Tensor>& image_v,
                  const std::optional<Tensor>& image_index) {
  Parts parts(weights);
  const Matrix qkv = Matrix::of(parts), output = Matrix::of(parts);
  const Norm norm = Norm::of(parts);
  const Matrix query = Matrix::of(parts), cross_output = Matrix::of(parts);
  const Norm cross_norm = Norm::of(parts);
  const Matrix input = Matrix::of(parts), mlp_output = Matrix::of(parts);
  const Norm mlp_norm = Norm::of(parts);
  parts.end();
  const ScalarType dtype = x.scalar_type();
  const Tensor attended = flat(self_attention(x, qkv, heads, lengths, offsets, max_length), x);
  State state = add_norm(output.of_numbers(attended), x, norm, eps);
  if (image_k.has_value()) {
    STD_TORCH_CHECK(image_v.has_value() && image_index.has_value(), "miss_cpu::text_layer: keys without values or index");
    Tensor q = heads_of(query.of_codes(state.codes, state.scale, dtype), 1, heads);
    if (q.dim() == 3) q = torch::stable::unsqueeze(q, 1);
    const Tensor read =
        std::get<0>(cross_forward(q, *image_k, *image_v, *image_index, std::nullopt, scale_of(q), 0.0, std::nullopt));
    state = add_norm(cross_output.of_numbers(flat(read, x)), state.numbers, cross_norm, eps);
  }
  auto [inner, inner_scale] = input.gelu_to_codes(state.codes, state.scale);
  const Tensor y = mlp_output.of_codes(inner, inner_scale, dtype);
  return std::get<0>(add_layer_norm(y, state.numbers, mlp_norm.weight, mlp_norm.bias, eps, 0.0, std::nullopt));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def("image_layer(Tensor x, Tensor[] weights, int heads, float eps1, float eps2) -> Tensor");
  m.def(
      "text_layer(Tensor x, Tensor[] weights, int heads, float eps, Tensor? lengths, Tensor? offsets, int max_length,"
      " Tensor? image_k, Tensor? image_v, Tensor? image_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("image_layer", TORCH_BOX(&image_layer));
  m.impl("text_layer", TORCH_BOX(&text_layer));
}

}  // namespace miss
