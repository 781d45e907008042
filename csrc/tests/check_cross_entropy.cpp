// A linear layer's cross entropy: the parts of the loss, the kept logits, and their gradient.
#include <math.h>

#include "cpu/cross_entropy.h"
#include "pack.h"

using check::Buffer;
using check::near;
using check::number;
using check::randomise;

template <class T>
static void cross_entropy(int64_t rows, int64_t tokens, int64_t k, double tolerance) {
  Buffer<T> hidden(rows * k), weight(tokens * k), bias(tokens), logits(tokens * rows);
  Buffer<T> panels(check::panel_count<T>(rows, k));
  Buffer<int64_t> labels(rows);
  const int64_t room = miss::EntropyArgs::padded(rows);
  Buffer<float> shift(room), total(room), sum(room), at_label(room);
  Buffer<float> partial(room * 3 * miss::EntropyArgs::blocks(tokens));
  randomise(hidden);
  randomise(weight);
  randomise(bias);
  for (int64_t r = 0; r < rows; ++r) labels[r] = (r * 31 + 5) % tokens;
  check::pack(hidden, rows, k, false, panels, nullptr);
  miss::EntropyArgs args = {};
  args.weight = weight.chars();
  args.bias = bias.chars();
  args.panels = panels.chars();
  args.type = check::type_of<T>();
  args.rows = rows;
  args.tokens = tokens;
  args.k = k;
  args.labels = labels.data();
  args.logits = logits.chars();
  args.partial = partial.data();
  args.shift = shift.data();
  args.total = total.data();
  args.sum = sum.data();
  args.at_label = at_label.data();
  miss::entropy_kernels().forward(args);

  Buffer<float> lse(rows), dloss(rows), dbias(tokens), label_room(rows);
  Buffer<double> wanted(tokens * rows), wanted_bias(tokens);
  randomise(dloss);
  const double smoothing = 0.1;
  for (int64_t r = 0; r < rows; ++r) {
    double most = -1e30, exponentials = 0, all = 0, size = 1;
    for (int64_t t = 0; t < tokens; ++t) {
      double z = number(bias[t]);
      for (int64_t i = 0; i < k; ++i) z += double{number(hidden[r * k + i])} * number(weight[t * k + i]);
      near(number(logits[t * rows + r]), z, tolerance * (1 + fabs(z)), "cross_entropy, logits");
      wanted[t * rows + r] = z;
      most = z > most ? z : most;
      size = fabs(z) > size ? fabs(z) : size;
      all += z;
    }
    for (int64_t t = 0; t < tokens; ++t) exponentials += exp(wanted[t * rows + r] - most);
    near(shift[r] + log(double{total[r]}), most + log(exponentials), tolerance * size, "cross_entropy, log-sum-exp");
    near(sum[r], all, tolerance * size * static_cast<double>(tokens), "cross_entropy, sum of logits");
    near(at_label[r], wanted[labels[r] * rows + r], tolerance * size, "cross_entropy, the label's logit");
    lse[r] = static_cast<float>(most + log(exponentials));
  }
  for (int64_t t = 0; t < tokens; ++t) wanted_bias[t] = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < tokens; ++t) {
      double& z = wanted[t * rows + r];
      z = exp(double{number(logits[t * rows + r])} - lse[r]) - smoothing / static_cast<double>(tokens);
      if (t == labels[r]) z -= 1 - smoothing;
      z *= dloss[r];
      wanted_bias[t] += z;
    }
  miss::entropy_kernels().gradient({logits.chars(), check::type_of<T>(), rows, tokens, labels.data(), lse.data(),
                                    dloss.data(), static_cast<float>(smoothing), dbias.data(), label_room.data()});
  for (int64_t i = 0; i < logits.count(); ++i) near(number(logits[i]), wanted[i], tolerance, "cross_entropy, dlogits");
  for (int64_t t = 0; t < tokens; ++t)
    near(dbias[t], wanted_bias[t], tolerance * (1.0 + static_cast<double>(rows)), "cross_entropy, dbias");
}

MISS_CHECK(cross_entropy) {
  for (int64_t rows : {1, 5, 17, 64, 70})
    for (int64_t tokens : {1, 47, 49, 150})
      for (int64_t k : {1, 3, 66}) {
        cross_entropy<float>(rows, tokens, k, 1e-5);
        cross_entropy<miss::bf16>(rows, tokens, k, 8e-3);
      }
}
