// Operations on PyTorch tensors that ops_encoder_layer.cpp is made of; each stands in the ops_*.cpp that registers it.
#pragma once

#include "torch_abi.h"

namespace miss {

Tensor linear_int8(const Tensor& x, const std::optional<Tensor>& x_scale, const Tensor& panels, const Tensor& offset,
                   const Tensor& scale, const std::optional<Tensor>& bias, bool gelu,
                   const std::optional<Tensor>& residual, ScalarType dtype);
std::tuple<Tensor, Tensor> linear_int8_codes(const Tensor& x, const std::optional<Tensor>& x_scale, const Tensor& panels,
                                             const Tensor& offset, const Tensor& scale,
                                             const std::optional<Tensor>& bias, bool gelu);

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                          const Tensor& bias, double eps, double p,
                                                          const std::optional<Tensor>& seed);
std::tuple<Tensor, Tensor> layer_norm_quantised(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_quantised(const Tensor& x, const Tensor& residual,
                                                                    const Tensor& weight, const Tensor& bias,
                                                                    double eps, bool keep_y);

Tensor quantised_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale);
std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             std::optional<Tensor> lengths, bool causal, double scale, double dropout_p,
                                             std::optional<Tensor> seed);
std::tuple<Tensor, Tensor> varlen_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                                          int64_t max_length, bool causal, double scale, double dropout_p,
                                          std::optional<Tensor> seed);
std::tuple<Tensor, Tensor> cross_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& image_index,
                                         std::optional<Tensor> lengths, double scale, double dropout_p,
                                         std::optional<Tensor> seed);

}  // namespace miss
