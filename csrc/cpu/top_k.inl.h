// The language-model head's kernels. Included by the file of each instruction set.
//
// A tile of logits is reduced as soon as it is summed: to its largest, its sum of exponentials and its candidates. The
// sums of exponentials are kept a panel and added up in the panels' order; the candidates are compared by (value,
// index), which is a total order: neither depends on how the panels are shared out to the threads.
#include "top_k.h"

namespace miss {
namespace MISS_ISA {
namespace {

constexpr float INFINITY_F = __builtin_inff();

inline bool is_finite(float x) { return __builtin_fabsf(x) <= 3.4028234664e38f; }

// A row's candidates, descending; index -1 where there is none yet.
struct Candidates {
  float values[MOST_K];
  int32_t indices[MOST_K];

  void clear(int count) {
    for (int i = 0; i < count; ++i) {
      values[i] = -INFINITY_F;
      indices[i] = -1;
    }
  }
  bool wants(float value, int count) const {
    return value > values[count - 1] || (indices[count - 1] < 0 && value == value);
  }
  // Those that come in have higher indices than those that are there: of equal values the first stays before.
  void insert(float value, int32_t index, int count) {
    int at = count - 1;
    for (; at > 0 && (indices[at - 1] < 0 || values[at - 1] < value); --at) {
      values[at] = values[at - 1];
      indices[at] = indices[at - 1];
    }
    values[at] = value;
    indices[at] = index;
  }
};

// The epilogue of one thread's panels.
template <class Sum>
struct Reduce {
  const TopKArgs& args;
  const float* row_scale;  // of quantised rows
  float *largest, *sums;   // (rows, panels)
  int64_t num_panels;
  Candidates* candidates;  // a row

  void prefetch(int64_t, int, int64_t, int) const {}

  vf number(const float* sums, int64_t, int64_t, int) const { return load(sums); }
  vf number(const int32_t* sums, int64_t row, int64_t column, int n) const {
    int32_t offset[LANES] = {};
    memcpy(offset, args.offset + column, static_cast<size_t>(n) * 4);
    vf scale = n == LANES ? load(args.column_scale + column) : load_n(args.column_scale + column, n);
    return mul(mul(to_float(subi(load(sums), load(offset))), set1(row_scale[row])), scale);
  }

  // One row's logits of a panel; minus infinity beyond the last. Returns their largest, NaN left aside.
  float logits_of(const Sum* tile, int64_t row, int64_t column, int num_columns, float* logits) const {
    vf most = set1(-INFINITY_F);
    for (int c = 0; c < PANEL; c += LANES) {
      int n = num_columns - c < LANES ? num_columns - c : LANES;
      vf v = set1(-INFINITY_F);
      if (n > 0) {
        vf logit = number(tile + c, row, column + c, n);
        if (args.bias != nullptr)
          logit = add(logit, n == LANES ? load(args.bias + column + c) : load_n(args.bias + column + c, n));
        if (n == LANES) v = logit;
        else {
          store(logits + c, v);
          store_n(logits + c, logit, n);
          v = load(logits + c);
        }
      }
      store(logits + c, v);
      most = max(v, most);
    }
    return max_of(most);
  }

  void operator()(int64_t row, int num_rows, int64_t column, int num_columns, const Sum* tile, int64_t stride) const {
    alignas(64) float logits[PANEL];
    for (int r = 0; r < num_rows; ++r, ++row, tile += stride) {
      float most = logits_of(tile, row, column, num_columns, logits);
      vf shift = set1(is_finite(most) ? most : 0.0f), all = zero();
      for (int c = 0; c < PANEL; c += LANES) all = add(all, exp(sub(load(logits + c), shift)));
      largest[row * num_panels + column / PANEL] = most;
      sums[row * num_panels + column / PANEL] = sum(all);
      Candidates& best = candidates[row];
      if (!best.wants(most, args.count)) continue;
      for (int c = 0; c < num_columns; ++c)
        if (best.wants(logits[c], args.count)) best.insert(logits[c], static_cast<int32_t>(column + c), args.count);
    }
  }
};

// From the threads' candidates (threads, rows) and the panels' sums to the row's outputs.
inline void finish_row(const TopKArgs& args, int64_t row, int64_t num_panels, const float* largest, const float* sums,
                       const Candidates* candidates, int threads) {
  Candidates best = candidates[row];
  for (int t = 1; t < threads; ++t) {
    const Candidates& more = candidates[t * args.rows + row];
    for (int i = 0; i < args.count && more.indices[i] >= 0; ++i)
      if (best.wants(more.values[i], args.count)) best.insert(more.values[i], more.indices[i], args.count);
  }
  largest += row * num_panels;
  sums += row * num_panels;
  float most = -INFINITY_F;
  for (int64_t p = 0; p < num_panels; ++p) most = largest[p] > most ? largest[p] : most;
  const float shift = is_finite(most) ? most : 0.0f;
  vf all[4] = {zero(), zero(), zero(), zero()};
  spans(num_panels, [&](int64_t i, auto span) {  // beyond the last panel sums of 0 count nothing
    vf share = mul(get(sums + i, span), exp(sub(get(largest + i, span), set1(shift))));
    if constexpr (sizeof(span) == sizeof(Rest)) {
      alignas(64) float some[LANES];
      put(some, share, span);
      share = get(some, span);
    }
    all[span.sum] = add(all[span.sum], share);
  });
  const float whole = sum(total(all));
  args.shift[row] = shift;
  args.total[row] = whole;
  for (int i = 0; i < args.count; ++i) {
    args.values[row * args.count + i] = whole == whole ? best.values[i] : __builtin_nanf("");
    args.indices[row * args.count + i] = whole == whole ? best.indices[i] : i;
  }
}

template <class Dot>
void top_k(const TopKArgs& args, const Rows& a, const float* row_scale) {
  const int64_t num_panels = blocks(args.columns, PANEL), rows = args.rows;
  const int threads = num_threads();
  float* largest = scratch_of<float>(6, 2 * rows * num_panels);
  float* sums = largest + rows * num_panels;
  auto* candidates = scratch_of<Candidates>(7, threads * rows);
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * num_panels / threads, last = (t + 1) * num_panels / threads;
      for (int64_t row = 0; row < rows; ++row) candidates[t * rows + row].clear(args.count);
      Reduce<typename Dot::Sum> reduce{args, row_scale, largest, sums, num_panels, candidates + t * rows};
      for (int64_t row = 0; row < rows; row += MOST_ROWS) {  // the panels come from memory once for each
        int count = static_cast<int>(rows - row < MOST_ROWS ? rows - row : MOST_ROWS);
        multiply_chunk<Dot>(a.from(row, 0, a.bytes), row, count, args.panels, args.columns, first, last, reduce);
      }
    }
  });
  for (int64_t row = 0; row < rows; ++row) finish_row(args, row, num_panels, largest, sums, candidates, threads);
}

void top_k_forward(const TopKArgs& args) {
  const bool wide = args.x_type == Type::f32;
  const int64_t bytes = args.k * (wide ? 4 : 2);
  if (args.column_scale == nullptr) {
    if (wide) top_k<DotF32>(args, {args.x, bytes, bytes}, nullptr);
    else top_k<DotBf16>(args, {args.x, bytes, bytes}, nullptr);
    return;
  }
  float* scale = scratch_of<float>(5, args.rows + (args.rows * args.k + 3) / 4);
  uint8_t* codes = reinterpret_cast<uint8_t*>(scale + args.rows);
  for (int64_t r = 0; r < args.rows; ++r) {
    const char* x = args.x + r * bytes;
    scale[r] = wide ? quantise_row(reinterpret_cast<const float*>(x), args.k, codes + r * args.k)
                    : quantise_row(reinterpret_cast<const bf16*>(x), args.k, codes + r * args.k);
  }
  top_k<DotU8S8>(args, {reinterpret_cast<const char*>(codes), args.k, args.k}, scale);
}

}  // namespace

extern const TopKKernels top_k_kernels = {top_k_forward};

}  // namespace MISS_ISA
}  // namespace miss
