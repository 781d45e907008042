// Linear and cross entropy as functions of PyTorch tensors.
#include <cmath>
#include <tuple>

#include "cross_entropy.h"
#include "parallel.h"
#include "torch_abi.h"

namespace miss {

namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

void check_labels(const Tensor& labels, int64_t rows, int64_t tokens) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.numel() == rows && labels.is_contiguous(),
                  "cross_entropy: labels are not int64 (", rows, ",)");
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r)
    STD_TORCH_CHECK(label[r] >= 0 && label[r] < tokens, "cross_entropy: label ", label[r], " is not in 0 … ", tokens - 1);
}

// (loss, lse) float32 (R,) and the logits (V, R), empty unless `keep`. panels: of hidden (R, C).
Three cross_entropy(const Tensor& panels, int64_t rows, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Tensor& labels, double smoothing, bool keep) {
  EntropyArgs args{};
  args.type = type_of(weight);
  args.rows = rows;
  args.tokens = weight.size(0);
  args.k = weight.size(1);
  const int64_t group = args.type == Type::f32 ? 1 : 2;
  STD_TORCH_CHECK((args.type == Type::f32 || args.type == Type::bf16) && weight.is_contiguous() && weight.dim() == 2,
                  "cross_entropy: the weight is not a contiguous float32 or bfloat16 matrix");
  STD_TORCH_CHECK(panels.dim() == 4 && panels.scalar_type() == weight.scalar_type() &&
                      panels.size(0) == (rows + 63) / 64 && panels.size(1) == (args.k + group - 1) / group,
                  "cross_entropy: the panels are not those of hidden (", rows, ", ", args.k, ")");
  STD_TORCH_CHECK(!bias.has_value() || (bias->scalar_type() == weight.scalar_type() && bias->is_contiguous() &&
                                        bias->numel() == args.tokens),
                  "cross_entropy: the bias is not the weight's");
  check_labels(labels, rows, args.tokens);
  args.weight = bytes_of(weight);
  args.bias = bytes_of(bias);
  args.panels = bytes_of(panels);
  args.labels = labels.const_data_ptr<int64_t>();
  const int64_t kept[2] = {keep ? args.tokens : 0, rows};
  Tensor loss = allocate(&rows, 1, ScalarType::Float), lse = allocate(&rows, 1, ScalarType::Float);
  Tensor logits = allocate(kept, 2, weight.scalar_type());
  if (rows == 0) return {loss, lse, logits};
  args.logits = keep ? bytes_to(logits) : nullptr;
  const int64_t room = EntropyArgs::padded(rows);
  args.shift = scratch_of<float>(6, room * (4 + 3 * EntropyArgs::blocks(args.tokens)));
  args.total = args.shift + room;
  args.sum = args.total + room;
  args.at_label = args.sum + room;
  args.partial = args.at_label + room;
  entropy_kernels().forward(args);
  float *losses = loss.mutable_data_ptr<float>(), *normalisers = lse.mutable_data_ptr<float>();
  for (int64_t r = 0; r < rows; ++r) {
    double normaliser = args.shift[r] + std::log(static_cast<double>(args.total[r]));
    normalisers[r] = static_cast<float>(normaliser);
    double mean = smoothing == 0.0 ? 0.0 : static_cast<double>(args.sum[r]) / static_cast<double>(args.tokens);
    losses[r] = static_cast<float>(normaliser - (1.0 - smoothing) * args.at_label[r] - smoothing * mean);
  }
  return {loss, lse, logits};
}

// The logits (V, R) become their gradient; returns the bias's, float32 (V,).
Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Tensor& dloss,
                              double smoothing) {
  EntropyGradArgs args{};
  args.type = type_of(logits);
  args.tokens = logits.size(0);
  args.rows = logits.size(1);
  STD_TORCH_CHECK(logits.is_contiguous() && (args.type == Type::f32 || args.type == Type::bf16),
                  "cross_entropy: the logits are not a contiguous float32 or bfloat16 matrix");
  STD_TORCH_CHECK(lse.numel() == args.rows && dloss.numel() == args.rows && lse.is_contiguous() && dloss.is_contiguous(),
                  "cross_entropy: lse and dloss are not (", args.rows, ",)");
  check_labels(labels, args.rows, args.tokens);
  Tensor dbias = allocate(&args.tokens, 1, ScalarType::Float);
  args.logits = bytes_to(logits);
  args.labels = labels.const_data_ptr<int64_t>();
  args.lse = lse.const_data_ptr<float>();
  args.dloss = dloss.const_data_ptr<float>();
  args.smoothing = static_cast<float>(smoothing);
  args.dbias = dbias.mutable_data_ptr<float>();
  args.at_label = scratch_of<float>(6, args.rows);
  entropy_kernels().gradient(args);
  return dbias;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def(
      "cross_entropy(Tensor panels, int rows, Tensor weight, Tensor? bias, Tensor labels, float smoothing, bool keep)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_gradient(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor dloss, float smoothing) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_gradient", TORCH_BOX(&cross_entropy_gradient));
}

}  // namespace miss
