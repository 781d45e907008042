// Layer normalization as functions of PyTorch tensors.
#include <cmath>
#include <tuple>

#include "convert.h"
#include "norm.h"
#include "parallel.h"
#include "tensor_ops.h"

namespace miss {

namespace {

using Maybe = std::optional<Tensor>;

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor like(const Tensor& t, ScalarType dtype) { return allocate(t.sizes().data(), t.dim(), dtype); }
Tensor like(const Tensor& t) { return like(t, t.scalar_type()); }

// (…) float32 for each row of (…, C)
Tensor a_row(const Tensor& x) { return allocate(x.sizes().data(), x.dim() - 1, ScalarType::Float); }

Tensor floats(int64_t count) { return allocate(&count, 1, ScalarType::Float); }

// Weight or bias as float32; `room` is where to, if it is not yet.
const float* as_floats(const Tensor& t, int64_t width, float* room) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == width && t.is_contiguous(), "layer_norm: a parameter is not (", width, ",)");
  if (type_of(t) == Type::f32) return t.const_data_ptr<float>();
  STD_TORCH_CHECK(type_of(t) == Type::bf16, "layer_norm: parameters are float32 or bfloat16");
  convert_kernels().widen(reinterpret_cast<const bf16*>(bytes_of(t)), room, width);
  return room;
}

Dropout dropout_of(double p, const Maybe& seed) {
  Dropout dropout;
  if (p == 0.0) return dropout;
  STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "dropout wants a seed, one int64");
  dropout.on = true;
  dropout.seed = *seed->const_data_ptr<int64_t>();
  dropout.threshold = static_cast<int32_t>(std::fmin(std::nearbyint(p * 65536.0), 65535.0)) - 32768;
  dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  return dropout;
}

NormForward forward_of(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  NormForward n{};
  n.width = x.size(x.dim() - 1);
  n.rows = n.width == 0 ? 0 : x.numel() / n.width;
  n.eps = static_cast<float>(eps);
  float* room = scratch_of<float>(6, 2 * n.width);
  n.weight = as_floats(weight, n.width, room);
  n.bias = as_floats(bias, n.width, room + n.width);
  n.x = bytes_of(x);
  return n;
}

void add_residual(NormForward& n, const Tensor& x, const Tensor& residual, const Tensor& summed) {
  STD_TORCH_CHECK(residual.numel() == x.numel() && residual.scalar_type() == x.scalar_type(),
                  "layer_norm: the residual is not like x");
  n.residual = bytes_of(residual);
  n.summed = bytes_to(summed);
}

void run(const NormForward& n, const Tensor& x) {
  STD_TORCH_CHECK(type_of(x) == Type::f32 || type_of(x) == Type::bf16, "layer_norm: x is float32 or bfloat16");
  (type_of(x) == Type::f32 ? norm_kernels().forward_f32 : norm_kernels().forward_bf16)(n);
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Three layer_norm(const Tensor& given, const Tensor& weight, const Tensor& bias, double eps) {
  Tensor x = dense(given), y = like(x), mean = a_row(x), rstd = a_row(x);
  NormForward n = forward_of(x, weight, bias, eps);
  n.y = bytes_to(y);
  n.mean = mean.mutable_data_ptr<float>();
  n.rstd = rstd.mutable_data_ptr<float>();
  run(n, x);
  return {y, mean, rstd};
}

}  // namespace

Four add_layer_norm(const Tensor& given, const Tensor& given_residual, const Tensor& weight, const Tensor& bias,
                    double eps, double p, const Maybe& seed) {
  Tensor x = dense(given), residual = dense(given_residual);
  Tensor y = like(x), summed = like(x), mean = a_row(x), rstd = a_row(x);
  NormForward n = forward_of(x, weight, bias, eps);
  add_residual(n, x, residual, summed);
  n.dropout = dropout_of(p, seed);
  n.y = bytes_to(y);
  n.mean = mean.mutable_data_ptr<float>();
  n.rstd = rstd.mutable_data_ptr<float>();
  run(n, x);
  return {y, summed, mean, rstd};
}

namespace {

void write_codes(NormForward& n, const Tensor& codes, const Tensor& scale) {
  n.codes = codes.mutable_data_ptr<uint8_t>();
  n.scale = scale.mutable_data_ptr<float>();
}

}  // namespace

std::tuple<Tensor, Tensor> layer_norm_quantised(const Tensor& given, const Tensor& weight, const Tensor& bias, double eps) {
  Tensor x = dense(given), scale = a_row(x), codes = like(x, ScalarType::Byte);
  NormForward n = forward_of(x, weight, bias, eps);
  write_codes(n, codes, scale);
  run(n, x);
  return {codes, scale};
}

// y is empty where it is not kept.
Four add_layer_norm_quantised(const Tensor& given, const Tensor& given_residual, const Tensor& weight,
                              const Tensor& bias, double eps, bool keep_y) {
  Tensor x = dense(given), residual = dense(given_residual), summed = like(x), scale = a_row(x);
  Tensor codes = like(x, ScalarType::Byte);
  const int64_t none = 0;
  Tensor y = keep_y ? like(x) : allocate(&none, 1, x.scalar_type());
  NormForward n = forward_of(x, weight, bias, eps);
  add_residual(n, x, residual, summed);
  if (keep_y) n.y = bytes_to(y);
  write_codes(n, codes, scale);
  run(n, x);
  return {codes, scale, y, summed};
}

namespace {

NormBackward backward_of(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean,
                         const Tensor& rstd, const Tensor& dweight, const Tensor& dbias) {
  NormBackward n{};
  STD_TORCH_CHECK(dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type(), "layer_norm: dy is not like x");
  n.width = x.size(x.dim() - 1);
  n.rows = n.width == 0 ? 0 : x.numel() / n.width;
  float* room = scratch_of<float>(6, n.width * (1 + 2 * NORM_BLOCKS));
  n.weight = as_floats(weight, n.width, room);
  n.partial = room + n.width;
  n.dy = bytes_of(dy);
  n.x = bytes_of(x);
  n.mean = mean.const_data_ptr<float>();
  n.rstd = rstd.const_data_ptr<float>();
  n.dweight = dweight.mutable_data_ptr<float>();
  n.dbias = dbias.mutable_data_ptr<float>();
  return n;
}

void run(const NormBackward& n, const Tensor& x) {
  STD_TORCH_CHECK(type_of(x) == Type::f32 || type_of(x) == Type::bf16, "layer_norm: x is float32 or bfloat16");
  (type_of(x) == Type::f32 ? norm_kernels().backward_f32 : norm_kernels().backward_bf16)(n);
}

Three layer_norm_backward(const Tensor& given_dy, const Tensor& given, const Tensor& weight, const Tensor& given_mean,
                          const Tensor& given_rstd) {
  Tensor dy = dense(given_dy), x = dense(given), mean = dense(given_mean), rstd = dense(given_rstd), dx = like(x);
  Tensor dweight = floats(weight.numel()), dbias = floats(weight.numel());
  NormBackward n = backward_of(dy, x, weight, mean, rstd, dweight, dbias);
  n.dx = bytes_to(dx);
  run(n, x);
  return {dx, dweight, dbias};
}

Four add_layer_norm_backward(const Tensor& given_dy, const Tensor& given_dsummed, const Tensor& given,
                             const Tensor& weight, const Tensor& given_mean, const Tensor& given_rstd, double p,
                             const Maybe& seed) {
  Tensor dy = dense(given_dy), dsummed = dense(given_dsummed), x = dense(given);
  Tensor mean = dense(given_mean), rstd = dense(given_rstd), dx = like(x), dresidual = like(x);
  Tensor dweight = floats(weight.numel()), dbias = floats(weight.numel());
  NormBackward n = backward_of(dy, x, weight, mean, rstd, dweight, dbias);
  STD_TORCH_CHECK(dsummed.numel() == x.numel() && dsummed.scalar_type() == x.scalar_type(),
                  "layer_norm: dsummed is not like summed");
  n.dsummed = bytes_of(dsummed);
  n.dropout = dropout_of(p, seed);
  n.dx = bytes_to(dx);
  n.dresidual = bytes_to(dresidual);
  run(n, x);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float p, Tensor? seed)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_backward(Tensor dy, Tensor dsummed, Tensor summed, Tensor weight, Tensor mean, Tensor rstd,"
      " float p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("layer_norm_quantised(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)");
  m.def(
      "add_layer_norm_quantised(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, bool keep_y)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
  m.impl("layer_norm_quantised", TORCH_BOX(&layer_norm_quantised));
  m.impl("add_layer_norm_quantised", TORCH_BOX(&add_layer_norm_quantised));
}

}  // namespace miss
