// Attention of every form is one table of tasks: rows of queries over sources of keys, at lengths around a tile's.
#include <math.h>

#include "check.h"
#include "cpu/attention.h"

using check::Buffer;
using check::near;
using check::number;
using check::randomise;

// The gradients of a forward that has run, against the formula in float64; dropout leaves only memory to be watched.
template <class T>
static void backward(miss::AttentionArgs args, Buffer<T>& q, Buffer<T>& k, Buffer<T>& v, Buffer<T>& out, int64_t rows,
                     int64_t tokens, int64_t keys, double tolerance) {
  const int64_t heads = args.heads, width = args.width, total = args.num_groups * rows;
  Buffer<T> dout(q.count()), dq(q.count()), dk(k.count()), dv(k.count());
  Buffer<double> wanted_q(q.count()), wanted_k(k.count()), wanted_v(k.count());
  randomise(dout);
  for (Buffer<double>* one : {&wanted_q, &wanted_k, &wanted_v})
    for (int64_t i = 0; i < one->count(); ++i) (*one)[i] = 0;
  args.num_tasks = args.num_groups * heads;
  args.out = nullptr;
  miss::attention_kernels().backward(
      {args, dout.chars(), out.chars(), dq.chars(), dk.chars(), dv.chars(), args.k_token, args.k_head});
  if (args.dropout) return;
  for (int64_t row = 0; row < total; ++row)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = ((row * tokens + t) * heads + h) * width;
        const double lse = args.lse[(row * heads + h) * tokens + t];
        double delta = 0;
        for (int64_t i = 0; i < width; ++i) delta += double{number(dout[at + i])} * number(out[at + i]);
        for (int64_t key = 0; key < keys && (!args.causal || key <= t + args.shift); ++key) {
          const int64_t from = ((row / rows * keys + key) * heads + h) * width;
          double score = 0, dp = 0;
          for (int64_t i = 0; i < width; ++i) {
            score += double{number(q[at + i])} * number(k[from + i]);
            dp += double{number(dout[at + i])} * number(v[from + i]);
          }
          const double p = exp(score * double{args.scale} - lse), ds = p * (dp - delta) * double{args.scale};
          for (int64_t i = 0; i < width; ++i) {
            wanted_q[at + i] += ds * number(k[from + i]);
            wanted_k[from + i] += ds * number(q[at + i]);
            wanted_v[from + i] += p * number(dout[at + i]);
          }
        }
      }
  for (int64_t i = 0; i < q.count(); ++i) near(number(dq[i]), wanted_q[i], tolerance * (1 + fabs(wanted_q[i])), "dq");
  for (int64_t i = 0; i < k.count(); ++i) {
    near(number(dk[i]), wanted_k[i], tolerance * (1 + fabs(wanted_k[i])), "dk");
    near(number(dv[i]), wanted_v[i], tolerance * (1 + fabs(wanted_v[i])), "dv");
  }
}

// One token a row has a way of its own, which must come to the same.
template <class T>
static void single(miss::AttentionArgs args, Buffer<T>& out, double tolerance) {
  Buffer<T> again(out.count());
  Buffer<miss::AttentionGroup> groups(args.num_groups);
  for (int64_t i = 0; i < args.num_groups; ++i) {
    groups[i] = args.groups[i];
    groups[i].first_task = i;  // two heads are fewer than SINGLE_HEADS
  }
  args.out = again.chars();
  args.groups = groups.data();
  args.num_tasks = args.num_groups;
  miss::attention_kernels().single(args);
  for (int64_t i = 0; i < out.count(); ++i) near(number(again[i]), number(out[i]), 2 * tolerance, "attention, one token");
}

// Scores of codes: near the same, and nothing outside of what the arguments span.
template <class T>
static void coded(miss::AttentionArgs args, Buffer<T>& out) {
  Buffer<T> again(out.count());
  args.out = again.chars();
  miss::attention_kernels().coded(args);
  for (int64_t i = 0; i < out.count(); ++i) near(number(again[i]), number(out[i]), 6e-2, "attention, scores of codes");
}

// out (rows, heads, columns) = a (rows, heads, inner) times each head's weight, plus bias.
template <class T>
static void head_product(int64_t rows, int64_t inner, int64_t columns, bool transposed, double tolerance) {
  const int64_t heads = 3, size = sizeof(T);
  Buffer<T> a(rows * heads * inner), weight(heads * inner * columns), bias(heads * columns), out(rows * heads * columns);
  randomise(a);
  randomise(weight);
  randomise(bias);
  miss::HeadProductArgs args = {};
  args.type = check::type_of<T>();
  args.a = a.chars();
  args.weight = weight.chars();
  args.bias = bias.chars();
  args.out = out.chars();
  args.heads = heads;
  args.inner = inner;
  args.columns = columns;
  args.outer = rows;
  args.tokens = 1;
  args.a_outer = args.a_token = heads * inner * size;
  args.a_head = inner * size;
  args.out_token = heads * columns * size;
  args.out_head = columns * size;
  args.weight_row = (transposed ? inner : columns) * size;
  args.weight_head = inner * columns * size;
  args.transposed = transposed;
  miss::attention_kernels().head_product(args);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t c = 0; c < columns; ++c) {
        double wanted = number(bias[h * columns + c]), total = 1;
        for (int64_t i = 0; i < inner; ++i) {
          const int64_t at = h * inner * columns + (transposed ? c * inner + i : i * columns + c);
          const double term = double{number(a[(r * heads + h) * inner + i])} * number(weight[at]);
          wanted += term;
          total += fabs(term);
        }
        near(number(out[(r * heads + h) * columns + c]), wanted, tolerance * total, "head product");
      }
}

// Each source is read by `rows` rows of `tokens` queries: 1 row is self-attention, more is cross-attention.
template <class T>
static void attention(int64_t sources, int64_t rows, int64_t tokens, int64_t keys, int64_t width, bool causal,
                      bool dropout, double tolerance) {
  const int64_t heads = 2, size = sizeof(T), total = sources * rows, shift = keys - tokens;
  Buffer<T> q(total * tokens * heads * width), k(sources * keys * heads * width), v(k.count()), out(q.count());
  Buffer<float> lse(total * heads * tokens);
  Buffer<miss::AttentionGroup> groups(sources);
  randomise(q);
  randomise(k);
  randomise(v);
  miss::AttentionArgs args = {};
  args.type = check::type_of<T>();
  args.q = q.chars();
  args.k = k.chars();
  args.v = v.chars();
  args.out = out.chars();
  args.lse = lse.data();
  args.heads = heads;
  args.width = width;
  args.q_head = args.k_head = args.v_head = args.out_head = width * size;
  args.q_token = args.k_token = args.v_token = args.out_token = heads * width * size;
  args.q_row = args.out_row = tokens * heads * width * size;
  args.lse_row = heads * tokens;
  args.lse_head = tokens;
  args.lse_token = 1;
  args.scale = 0.3f;
  args.causal = causal;
  args.shift = shift;
  args.dropout = dropout;
  args.seed = 5;
  args.threshold = -32768 / 2;  // a quarter goes
  args.keep = 4.0f / 3.0f;
  args.mask_token = keys;
  args.mask_head = tokens * keys;
  args.mask_row = heads * tokens * keys;
  args.groups = groups.data();
  args.num_groups = sources;
  args.grain = 1;
  args.chunk = tokens % 2 == 0 ? 96 : 12;
  for (int64_t s = 0; s < sources; ++s) {
    miss::AttentionGroup& g = groups[s];
    g = {};
    g.k = g.v = g.dk = s * keys * heads * width * size;
    g.keys = g.all_keys = keys;
    g.q = g.out = s * rows * args.q_row;
    g.lse = s * rows * args.lse_row;
    g.mask = s * rows * args.mask_row;
    g.rows = rows;
    g.tokens = tokens;
    g.first_task = args.num_tasks;
    args.num_tasks += heads * ((rows * tokens + args.chunk - 1) / args.chunk);
  }
  if (args.num_tasks > 0) miss::attention_kernels().forward(args);
  if (width <= 64 && tokens == 1 && !dropout && !causal) single(args, out, tolerance);
  if (width <= 64 && !dropout && !causal) coded(args, out);
  if (width <= 64 && tokens * keys <= 1000) backward(args, q, k, v, out, rows, tokens, keys, tolerance);
  Buffer<double> scores(keys), wanted(width);
  for (int64_t row = 0; row < total; ++row)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = ((row * tokens + t) * heads + h) * width, source = row / rows;
        const int64_t seen = causal ? (t + shift + 1 < 0 ? 0 : t + shift + 1) : keys;
        auto place = [&](int64_t key) { return ((source * keys + key) * heads + h) * width; };
        double most = -1e30, sum = 0;
        for (int64_t key = 0; key < seen; ++key) {
          scores[key] = 0;
          for (int64_t i = 0; i < width; ++i) scores[key] += double{number(q[at + i])} * number(k[place(key) + i]);
          scores[key] *= double{args.scale};
          most = scores[key] > most ? scores[key] : most;
        }
        for (int64_t i = 0; i < width; ++i) wanted[i] = 0;
        for (int64_t key = 0; key < seen; ++key) {
          const double weight = exp(scores[key] - most);
          sum += weight;
          for (int64_t i = 0; i < width; ++i) wanted[i] += weight * number(v[place(key) + i]);
        }
        const double log_sum = lse[(row * heads + h) * tokens + t];
        if (seen > 0) near(log_sum, most + log(sum), tolerance, "attention, log-sum-exp");
        else check::expect(log_sum == -INFINITY, "attention, log-sum-exp of nothing");
        for (int64_t i = 0; i < width && !dropout; ++i)
          near(number(out[at + i]), seen > 0 ? wanted[i] / sum : 0, tolerance, "attention");
      }
}

MISS_CHECK(attention) {
  for (int64_t width : {32, 64, 128})
    for (int64_t tokens : {1, 5, 98})
      for (int64_t keys : {1, 16, 31, 131}) {
        if (width == 128 && keys * tokens > 1000) continue;
        attention<float>(2, 1, tokens, keys, width, false, false, 1e-5);
        attention<miss::bf16>(2, 1, tokens, keys, width, false, false, 2e-2);
        if (tokens * keys > 1000) continue;
        attention<float>(1, 3, tokens, keys, width, false, true, 1e-5);
        attention<miss::bf16>(1, 3, tokens, keys, width, false, true, 2e-2);
        attention<float>(1, 1, tokens, keys, width, true, false, 1e-5);
        attention<miss::bf16>(1, 1, tokens, keys, width, true, false, 2e-2);
      }
  for (int64_t rows : {1, 7, 50}) {
    head_product<float>(rows, 32, 96, rows == 7, 1e-5);
    head_product<miss::bf16>(rows, 96, 32, rows != 7, 8e-3);
  }
  attention<float>(1, 2, 7, 1030, 64, false, false, 1e-5);
  attention<miss::bf16>(1, 2, 7, 1030, 32, false, false, 2e-2);
}
