// Attention, cross-attention and decode attention as operations on PyTorch tensors: which queries read which source.
#include <vector>

#include "attention.h"
#include "tensor_ops.h"

namespace miss {

namespace {

// The elements of an int32 or int64 vector of any stride.
struct Ints {
  explicit Ints(const Tensor& t) : data(bytes_of(t)), step(t.dim() ? t.stride(0) : 0) {
    wide = t.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Int, "miss_cpu: wanted int32 or int64");
  }
  int64_t operator[](int64_t i) const {
    return wide ? reinterpret_cast<const int64_t*>(data)[i * step] : reinterpret_cast<const int32_t*>(data)[i * step];
  }
  const char* data;
  int64_t step;
  bool wide;
};

int64_t clamp(int64_t n, int64_t high) { return n < 0 ? 0 : n < high ? n : high; }

// What is the same for every form: pointers, strides of heads and tokens (the last dimensions but one and two).
AttentionArgs start(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, double scale) {
  AttentionArgs a{};
  a.type = type_of(q);
  STD_TORCH_CHECK(type_of(k) == a.type && type_of(v) == a.type, "miss_cpu: q, k, v of one dtype");
  const int64_t size = a.type == Type::bf16 ? 2 : 4, dims = q.dim();
  STD_TORCH_CHECK(q.stride(dims - 1) == 1 && k.stride(k.dim() - 1) == 1 && v.stride(v.dim() - 1) == 1,
                  "miss_cpu: the last dimension of q, k, v must be dense");
  a.q = bytes_of(q), a.k = bytes_of(k), a.v = bytes_of(v);
  a.heads = q.size(dims - 2), a.width = q.size(dims - 1);
  STD_TORCH_CHECK(a.width > 0 && (a.width == 32 || a.width % 64 == 0), "miss_cpu: a head's width is 32 or a multiple of 64");
  a.q_head = q.stride(dims - 2) * size, a.out_head = out.stride(dims - 2) * size;
  a.k_head = k.stride(k.dim() - 2) * size, a.v_head = v.stride(v.dim() - 2) * size;
  a.k_token = k.stride(k.dim() - 3) * size, a.v_token = v.stride(v.dim() - 3) * size;
  a.scale = static_cast<float>(scale);
  return a;
}

// q and out (rows, tokens, heads, width), lse (rows, heads, tokens).
void stride_rows(AttentionArgs& a, const Tensor& q, const Tensor& out) {
  const int64_t size = a.type == Type::bf16 ? 2 : 4, tokens = q.size(1);
  a.q_row = q.stride(0) * size, a.q_token = q.stride(1) * size;
  a.out_row = out.stride(0) * size, a.out_token = out.stride(1) * size;
  a.lse_row = a.heads * tokens, a.lse_head = tokens, a.lse_token = 1;
}

void set_dropout(AttentionArgs& a, double p, const std::optional<Tensor>& seed) {
  if (!seed.has_value()) return;
  a.dropout = true;
  a.seed = Ints(*seed)[0];
  const int64_t steps = static_cast<int64_t>(__builtin_rint(p * 65536.0));
  a.threshold = static_cast<int>(steps < 65535 ? steps : 65535) - 32768;
  a.keep = static_cast<float>(1.0 / (1.0 - p));
}

// Numbers the tasks, each of some heads of some of a group's queries, and decides how many of them are worth a thread: a
// million multiply-adds, about 10 us.
void number_tasks(AttentionArgs& a, std::vector<AttentionGroup>& groups, int64_t heads, int64_t chunk) {
  int64_t tasks = 0, pairs = 1;
  for (AttentionGroup& g : groups) {
    g.first_task = tasks;
    const int64_t queries = g.rows * g.tokens;
    tasks += queries ? (a.heads + heads - 1) / heads * ((queries - 1) / chunk + 1) : 0;
    pairs += queries * g.keys;
  }
  a.groups = groups.data();
  a.num_groups = static_cast<int64_t>(groups.size());
  a.num_tasks = tasks;
  const int64_t work = pairs * a.heads * a.width * 2 / (tasks ? tasks : 1);
  a.grain = 1 + 1000000 / (work ? work : 1);
}

// The backward's tasks: a group's head each.
void number_heads(AttentionArgs& a, std::vector<AttentionGroup>& groups) {
  int64_t keys = 1;
  for (const AttentionGroup& g : groups) keys += g.rows * g.tokens * g.keys;
  a.groups = groups.data();
  a.num_groups = static_cast<int64_t>(groups.size());
  a.num_tasks = a.num_groups * a.heads;
  const int64_t work = keys * a.width * 5 / (a.num_groups ? a.num_groups : 1);
  a.grain = 1 + 1000000 / (work ? work : 1);
}

Tensor new_lse(const Tensor& q, std::vector<int64_t> shape) { return torch::stable::new_empty(q, shape, ScalarType::Float); }

Tensor new_out(const Tensor& q) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < q.dim(); ++d) shape.push_back(q.size(d));
  return torch::stable::new_empty(q, shape);
}

void run(AttentionArgs& a, std::vector<AttentionGroup>& groups, const Tensor& out, const Tensor& lse) {
  a.out = bytes_to(out), a.lse = lse.mutable_data_ptr<float>();
  a.chunk = a.width > 64 ? 48 : 96;
  number_tasks(a, groups, 1, a.chunk);
  if (a.num_tasks) attention_kernels().forward(a);
}

// One query a row: which path runs is the shape's choice, never the batch's.
void run_single(AttentionArgs& a, std::vector<AttentionGroup>& groups, const Tensor& out) {
  a.out = bytes_to(out);
  number_tasks(a, groups, SINGLE_HEADS, INT64_MAX);
  if (a.num_tasks) attention_kernels().single(a);
}

// Single queries over many keys go the other way: those of one source, side by side, share what it takes to pack its
// keys, and a text's token has the same bits whether its row is padded, packed or alone.
constexpr int64_t MOST_SINGLE_KEYS = 128;

void run_batch(AttentionArgs& a, std::vector<AttentionGroup>& groups, const Tensor& q, const Tensor& k, const Tensor& out,
               const Tensor& lse) {
  if (q.size(1) != 1 || a.dropout || a.width > 64 || k.size(1) > MOST_SINGLE_KEYS) return run(a, groups, out, lse);
  a.lse = lse.mutable_data_ptr<float>();
  run_single(a, groups, out);
}

// q (rows, T, H, D); k, v (sources, N, H, D); dropout's mask over (rows, H, T, N).
AttentionArgs batch_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, bool causal, double scale,
                         double dropout_p, const std::optional<Tensor>& seed) {
  AttentionArgs a = start(q, k, v, out, scale);
  stride_rows(a, q, out);
  a.causal = causal && q.size(1) > 1, a.shift = k.size(1) - q.size(1);
  set_dropout(a, dropout_p, seed);
  a.mask_token = k.size(1), a.mask_head = q.size(1) * k.size(1), a.mask_row = a.heads * a.mask_head;
  return a;
}

// Sequences packed one after the other: q, k, v (total, H, D); dropout's mask over (total, H, max_length).
AttentionArgs packed_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, int64_t max_length,
                          bool causal, double scale, double dropout_p, const std::optional<Tensor>& seed) {
  AttentionArgs a = start(q, k, v, out, scale);
  const int64_t size = a.type == Type::bf16 ? 2 : 4;
  a.q_token = q.stride(0) * size, a.out_token = out.stride(0) * size;
  a.lse_token = a.heads, a.lse_head = 1;
  a.causal = causal;
  set_dropout(a, dropout_p, seed);
  a.mask_token = a.heads * max_length, a.mask_head = max_length;
  return a;
}

std::vector<AttentionGroup> batch_groups(const AttentionArgs& a, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const std::optional<Tensor>& lengths) {
  const int64_t size = a.type == Type::bf16 ? 2 : 4, batch = q.size(0), tokens = q.size(1), keys = k.size(1);
  std::vector<AttentionGroup> groups(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    AttentionGroup& g = groups[static_cast<size_t>(b)];
    g.k = b * k.stride(0) * size, g.v = b * v.stride(0) * size;
    g.q = b * a.q_row, g.out = b * a.out_row, g.lse = b * a.lse_row;
    g.mask = b * a.heads * tokens * keys;
    g.keys = lengths.has_value() ? clamp(Ints(*lengths)[b], keys) : keys;
    g.rows = 1, g.tokens = tokens;
    g.dk = b * keys * a.heads * a.width * size, g.all_keys = keys;
  }
  return groups;
}

std::vector<AttentionGroup> packed_groups(const AttentionArgs& a, const Tensor& q, const Tensor& offsets) {
  const Ints offset(offsets);
  std::vector<AttentionGroup> groups(static_cast<size_t>(offsets.size(0) - 1));
  int64_t last = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    AttentionGroup& g = groups[i];
    const int64_t first = offset[static_cast<int64_t>(i)];
    last = offset[static_cast<int64_t>(i) + 1];
    STD_TORCH_CHECK(first >= 0 && first <= last && last <= q.size(0), "attention_varlen: offsets must rise from 0 to ",
                    q.size(0));
    g.k = first * a.k_token, g.v = first * a.v_token;
    g.q = first * a.q_token, g.out = first * a.out_token, g.lse = first * a.lse_token;
    g.mask = first * a.mask_token;
    g.keys = g.tokens = g.all_keys = last - first, g.rows = 1;
    g.dk = g.out;
  }
  return groups;
}

// One group an image; rows sorted by image.
std::vector<AttentionGroup> image_groups(const AttentionArgs& a, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& image_index, const std::optional<Tensor>& lengths) {
  const Ints index(image_index);
  const int64_t size = a.type == Type::bf16 ? 2 : 4, rows = q.size(0), images = k.size(0), keys = k.size(1);
  std::vector<AttentionGroup> groups(static_cast<size_t>(images));
  for (int64_t i = 0; i < images; ++i) {
    AttentionGroup& g = groups[static_cast<size_t>(i)];
    g.k = i * k.stride(0) * size, g.v = i * v.stride(0) * size;
    g.keys = lengths.has_value() ? clamp(Ints(*lengths)[i], keys) : keys;
    g.tokens = q.size(1);
    g.dk = i * keys * a.heads * a.width * size, g.all_keys = keys;
  }
  int64_t before = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t image = index[r];
    STD_TORCH_CHECK(image >= before && image < images, "image_index: wanted 0 to ", images - 1, ", rows sorted by image");
    AttentionGroup& g = groups[static_cast<size_t>(image)];
    if (g.rows++ == 0) g.q = r * a.q_row, g.out = r * a.out_row, g.lse = r * a.lse_row, g.mask = r * a.mask_row;
    before = image;
  }
  return groups;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    std::optional<Tensor> lengths, bool causal, double scale,
                                                    double dropout_p, std::optional<Tensor> seed) {
  Tensor out = new_out(q), lse = new_lse(q, {q.size(0), q.size(2), q.size(1)});
  AttentionArgs a = batch_args(q, k, v, out, causal, scale, dropout_p, seed);
  std::vector<AttentionGroup> groups = batch_groups(a, q, k, v, lengths);
  run_batch(a, groups, q, k, out, lse);
  return {out, lse};
}

// q, k, v (rows, N, H, D): each token over all of its row, scores of int8 codes.
Tensor quantised_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  Tensor out = new_out(q);
  AttentionArgs a = batch_args(q, k, v, out, false, scale, 0.0, std::nullopt);
  STD_TORCH_CHECK(a.width <= 64, "attention_quantised: heads are 32 or 64 wide");
  std::vector<AttentionGroup> groups = batch_groups(a, q, k, v, std::nullopt);
  a.out = bytes_to(out), a.chunk = 96;
  number_tasks(a, groups, 1, a.chunk);
  if (a.num_tasks) attention_kernels().coded(a);
  return out;
}

std::tuple<Tensor, Tensor> varlen_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& offsets, int64_t max_length, bool causal, double scale,
                                                 double dropout_p, std::optional<Tensor> seed) {
  Tensor out = new_out(q), lse = new_lse(q, {q.size(0), q.size(1)});
  AttentionArgs a = packed_args(q, k, v, out, max_length, causal, scale, dropout_p, seed);
  std::vector<AttentionGroup> groups = packed_groups(a, q, offsets);
  run(a, groups, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor> cross_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& image_index, std::optional<Tensor> lengths, double scale,
                                                double dropout_p, std::optional<Tensor> seed) {
  Tensor out = new_out(q), lse = new_lse(q, {q.size(0), q.size(2), q.size(1)});
  AttentionArgs a = batch_args(q, k, v, out, false, scale, dropout_p, seed);
  std::vector<AttentionGroup> groups = image_groups(a, q, k, v, image_index, lengths);
  run_batch(a, groups, q, k, out, lse);
  return {out, lse};
}

// One query a row against its slot of a cache (S, L, H, D): q (R, H, D).
static Tensor decode_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slots,
                             const Tensor& lengths, double scale) {
  Tensor out = new_out(q);
  AttentionArgs a = start(q, k, v, out, scale);
  STD_TORCH_CHECK(a.width <= 64, "decode_attention: heads are 32 or 64 wide");
  const int64_t size = a.type == Type::bf16 ? 2 : 4;
  const Ints slot(slots), length(lengths);
  std::vector<AttentionGroup> groups(static_cast<size_t>(q.size(0)));
  for (int64_t r = 0; r < q.size(0); ++r) {
    AttentionGroup& g = groups[static_cast<size_t>(r)];
    STD_TORCH_CHECK(slot[r] >= 0 && slot[r] < k.size(0), "decode_attention: slot ", slot[r], " of ", k.size(0));
    g.k = slot[r] * k.stride(0) * size, g.v = slot[r] * v.stride(0) * size;
    g.q = r * q.stride(0) * size, g.out = r * out.stride(0) * size;
    g.keys = clamp(length[r], k.size(1));
    g.rows = g.tokens = 1;
  }
  run_single(a, groups, out);
  return out;
}

static std::tuple<Tensor, Tensor, Tensor> run_backward(AttentionArgs& a, std::vector<AttentionGroup>& groups,
                                                       const Tensor& dout, const Tensor& q, const Tensor& k,
                                                       const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(dout.is_contiguous() && out.is_contiguous() && lse.is_contiguous() && a.width <= 64,
                  "miss_cpu: dout, out and lse must be contiguous, heads at most 64 wide");
  STD_TORCH_CHECK(type_of(dout) == a.type && type_of(out) == a.type && type_of(lse) == Type::f32,
                  "miss_cpu: dout and out of q's dtype, lse float32");
  Tensor dq = new_out(q), dk = new_out(k), dv = new_out(k);
  const int64_t size = a.type == Type::bf16 ? 2 : 4;
  a.lse = const_cast<float*>(lse.const_data_ptr<float>());
  AttentionGradArgs grad{a, bytes_of(dout), bytes_of(out), bytes_to(dq), bytes_to(dk), bytes_to(dv),
                         a.heads * a.width * size, a.width * size};
  number_heads(grad.forward, groups);
  if (grad.forward.num_tasks) attention_kernels().backward(grad);
  return {dq, dk, dv};
}

static std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out, const Tensor& lse,
                                                             std::optional<Tensor> lengths, bool causal, double scale,
                                                             double dropout_p, std::optional<Tensor> seed) {
  AttentionArgs a = batch_args(q, k, v, out, causal, scale, dropout_p, seed);
  std::vector<AttentionGroup> groups = batch_groups(a, q, k, v, lengths);
  return run_backward(a, groups, dout, q, k, out, lse);
}

static std::tuple<Tensor, Tensor, Tensor> varlen_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                          const Tensor& v, const Tensor& out, const Tensor& lse,
                                                          const Tensor& offsets, int64_t max_length, bool causal,
                                                          double scale, double dropout_p, std::optional<Tensor> seed) {
  AttentionArgs a = packed_args(q, k, v, out, max_length, causal, scale, dropout_p, seed);
  std::vector<AttentionGroup> groups = packed_groups(a, q, offsets);
  return run_backward(a, groups, dout, q, k, out, lse);
}

static std::tuple<Tensor, Tensor, Tensor> cross_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                         const Tensor& v, const Tensor& out, const Tensor& lse,
                                                         const Tensor& image_index, std::optional<Tensor> lengths,
                                                         double scale, double dropout_p, std::optional<Tensor> seed) {
  AttentionArgs a = batch_args(q, k, v, out, false, scale, dropout_p, seed);
  std::vector<AttentionGroup> groups = image_groups(a, q, k, v, image_index, lengths);
  return run_backward(a, groups, dout, q, k, out, lse);
}

// rows (R, T, H, in), dense but for the first two dimensions, times each head's weight: (R, T, H, out).
static Tensor head_product(const Tensor& rows, const Tensor& weight, bool transposed, const std::optional<Tensor>& bias,
                           const uint8_t* biased) {
  const int64_t heads = rows.size(2), width = rows.size(3), size = type_of(rows) == Type::bf16 ? 2 : 4;
  const int64_t per_head = weight.size(0) / heads, columns = transposed ? per_head : weight.size(1);
  STD_TORCH_CHECK(type_of(weight) == type_of(rows) && weight.stride(1) == 1 && rows.stride(3) == 1 &&
                      weight.size(1) % 64 == 0 && per_head % 32 == 0,
                  "miss_cpu: weights dense, of one dtype, (H * 32 or 64, a multiple of 64)");
  Tensor out = torch::stable::new_empty(rows, {rows.size(0), rows.size(1), heads, columns});
  HeadProductArgs p{};
  p.type = type_of(rows);
  p.a = bytes_of(rows), p.weight = bytes_of(weight), p.bias = bytes_of(bias), p.out = bytes_to(out), p.biased = biased;
  p.heads = heads, p.inner = width, p.columns = columns, p.outer = rows.size(0), p.tokens = rows.size(1);
  p.a_outer = rows.stride(0) * size, p.a_token = rows.stride(1) * size, p.a_head = rows.stride(2) * size;
  p.out_token = heads * columns * size, p.out_head = columns * size;
  p.weight_row = weight.stride(0) * size, p.weight_head = per_head * p.weight_row, p.transposed = transposed;
  if (p.outer > 0 && p.tokens > 0) attention_kernels().head_product(p);
  return out;
}

// The absorbed form: all heads of a row are queries over one key, the tokens. lse (R, T * H).
static std::tuple<Tensor, Tensor> tokens_forward(const Tensor& q, const Tensor& x, const Tensor& w_k, const Tensor& w_v,
                                                 std::optional<Tensor> b_v, const Tensor& image_index,
                                                 std::optional<Tensor> lengths, double scale) {
  STD_TORCH_CHECK(!b_v.has_value() || (b_v->is_contiguous() && type_of(*b_v) == type_of(q)), "miss_cpu: b_v of q's dtype");
  const int64_t rows = q.size(0), queries = q.size(1) * q.size(2), width = x.size(2);
  Tensor absorbed = torch::stable::view(head_product(q, w_k, false, std::nullopt, nullptr), {rows, queries, 1, width});
  Tensor mixed = new_out(absorbed), lse = new_lse(q, {rows, queries});
  Tensor tokens = torch::stable::unsqueeze(x, 2);
  AttentionArgs a = batch_args(absorbed, tokens, tokens, mixed, false, scale, 0.0, std::nullopt);
  std::vector<AttentionGroup> groups = image_groups(a, absorbed, tokens, tokens, image_index, lengths);
  run(a, groups, mixed, lse);
  std::vector<uint8_t> biased;
  if (lengths.has_value())
    for (int64_t r = 0; r < rows; ++r) biased.push_back(Ints(*lengths)[Ints(image_index)[r]] > 0);
  mixed = torch::stable::view(mixed, {rows, q.size(1), q.size(2), width});
  return {head_product(mixed, w_v, true, b_v, lengths.has_value() ? biased.data() : nullptr), lse};
}

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, bool causal, float scale, float dropout_p, "
      "Tensor? seed) -> (Tensor, Tensor)");
  m.def("attention_quantised(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
  m.def(
      "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor offsets, int max_length, bool causal, float scale, "
      "float dropout_p, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "cross_attention(Tensor q, Tensor k, Tensor v, Tensor image_index, Tensor? lengths, float scale, "
      "float dropout_p, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? lengths, "
      "bool causal, float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor offsets, "
      "int max_length, bool causal, float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor image_index, Tensor? lengths, float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_attention_tokens(Tensor q, Tensor x, Tensor w_k, Tensor w_v, Tensor? b_v, Tensor image_index, "
      "Tensor? lengths, float scale) -> (Tensor, Tensor)");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slots, Tensor lengths, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_forward));
  m.impl("attention_quantised", TORCH_BOX(&quantised_forward));
  m.impl("attention_varlen", TORCH_BOX(&varlen_forward));
  m.impl("cross_attention", TORCH_BOX(&cross_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_varlen_backward", TORCH_BOX(&varlen_backward));
  m.impl("cross_attention_backward", TORCH_BOX(&cross_backward));
  m.impl("cross_attention_tokens", TORCH_BOX(&tokens_forward));
  m.impl("decode_attention", TORCH_BOX(&decode_forward));
}

}  // namespace miss
