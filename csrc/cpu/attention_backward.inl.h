// Attention's gradient. Included by the file of each instruction set.
//
// A task owns one source's head: its dK and dV are summed by this thread alone, over blocks of queries in their order.
// Probabilities are made again from the forward's log-sum-exp. For a block of queries and a block of keys, dS serves
// twice: its rows times K give dQ, its columns times Q give dK.
#include "attention_parts.inl.h"

namespace miss {
namespace MISS_ISA {
namespace attend {
namespace {

constexpr int64_t QUERIES = 64;  // of a block

template <class Dot>
struct Block {  // of queries, and what is made of it; all of it in this thread's scratch
  static constexpr int64_t SIZE = 4 / Dot::GROUP;
  using Value = typename Element<Dot>::Value;
  int64_t count, most;  // queries; visible keys of the one that sees the most
  int64_t row[QUERIES], token[QUERIES], visible[QUERIES];
  float delta[QUERIES], lse[QUERIES];  // dout . out; log2 of the sum of exponentials
  char *q, *dout;                      // (count, width)
  char *q_rows, *dout_rows;            // the same as panels with queries along k
  float *p, *ds;                       // (QUERIES, PANEL): probabilities, gradients of scores
  char *p_panel, *ds_panel, *ds_rows;  // the same rounded: panels with queries along k; rows
  float* dq;                           // (count, width)
};

template <class Dot>
struct Gradients {  // what a task holds over all blocks
  char *key_columns, *value_columns, *key_rows;
  float *dk, *dv;
};

template <class T>
inline T* take(char*& at, int64_t bytes) {
  T* p = reinterpret_cast<T*>(at);
  at += round_up(bytes, 64);
  return p;
}

template <class Dot>
inline void make_room(const AttentionArgs& a, Block<Dot>& b) {
  constexpr int64_t SIZE = Block<Dot>::SIZE, ROW = 4 * PANEL;
  char* at = scratch_of<char>(4, QUERIES * (4 * SIZE * PANEL + 6 * ROW + 4 * a.width) + 4096);
  b.q = take<char>(at, QUERIES * a.width * SIZE);
  b.dout = take<char>(at, QUERIES * a.width * SIZE);
  b.q_rows = take<char>(at, bytes_as_rows(QUERIES, a.width, Dot::GROUP));
  b.dout_rows = take<char>(at, bytes_as_rows(QUERIES, a.width, Dot::GROUP));
  b.p = take<float>(at, QUERIES * ROW);
  b.ds = take<float>(at, QUERIES * ROW);
  b.dq = take<float>(at, QUERIES * a.width * 4);
  if (Dot::GROUP == 1) {
    b.p_panel = reinterpret_cast<char*>(b.p), b.ds_panel = b.ds_rows = reinterpret_cast<char*>(b.ds);
    return;
  }
  b.p_panel = take<char>(at, QUERIES * PANEL * 2);
  b.ds_panel = take<char>(at, QUERIES * PANEL * 2);
  b.ds_rows = take<char>(at, QUERIES * PANEL * 2);
}

template <class Dot>
inline void load_block(const AttentionGradArgs& args, const AttentionGroup& g, int64_t head, int64_t first,
                       Block<Dot>& b) {
  using Value = typename Element<Dot>::Value;
  const AttentionArgs& a = args.forward;
  const int64_t bytes = a.width * Block<Dot>::SIZE;
  b.count = least(QUERIES, g.rows * g.tokens - first);
  b.most = 0;
  for (int64_t i = 0; i < b.count; ++i) {
    const int64_t row = (first + i) / g.tokens, token = (first + i) % g.tokens;
    b.row[i] = row, b.token[i] = token;
    b.visible[i] = a.causal ? least(g.keys, token + a.shift + 1) : g.keys;
    b.most = b.visible[i] > b.most ? b.visible[i] : b.most;
    memcpy(b.q + i * bytes, a.q + g.q + row * a.q_row + token * a.q_token + head * a.q_head, bytes);
    memcpy(b.dout + i * bytes,
           args.dout + g.out + row * a.out_row + token * a.out_token + head * a.out_head, bytes);
    const Value* out = reinterpret_cast<const Value*>(args.out + g.out + row * a.out_row + token * a.out_token +
                                                      head * a.out_head);
    const Value* dout = reinterpret_cast<const Value*>(b.dout + i * bytes);
    vf sums = zero();
    for (int64_t d = 0; d < a.width; d += LANES) sums = fma(load(out + d), load(dout + d), sums);
    b.delta[i] = sum(sums);
    b.lse[i] = a.lse[g.lse + row * a.lse_row + token * a.lse_token + head * a.lse_head] * LOG2E;
  }
  pack_as_rows<Dot>(b.q, bytes, b.count, a.width, b.q_rows);
  pack_as_rows<Dot>(b.dout, bytes, b.count, a.width, b.dout_rows);
}

// Scores and dP of one row become probabilities (dropout's factor on them) and gradients of scores; zeros beyond `seen`.
template <class Dot, bool DROPOUT>
inline void gradient_row(float* p, float* ds, int64_t seen, float scale, float lse, float delta, const Drop& drop) {
  const vf factor = set1(scale * LOG2E), shift = set1(-lse), less = set1(delta), by = set1(scale);
  for (int64_t i = 0; i < PANEL; i += LANES) {
    if (i >= seen) {
      store(p + i, zero());
      store(ds + i, zero());
      continue;
    }
    vf one = exp2<Element<Dot>::POWER_TERMS>(fma(load(p + i), factor, shift)), dp = load(ds + i), shown = one;
    if (DROPOUT) {
      dp = mul(kept(dp, drop.fields + i, drop.threshold), set1(drop.keep));
      shown = mul(kept(one, drop.fields + i, drop.threshold), set1(drop.keep));
    }
    vf slope = mul(mul(one, sub(dp, less)), by);
    if (i + LANES > seen) {
      shown = first_of(shown, static_cast<int>(seen - i), zero());
      slope = first_of(slope, static_cast<int>(seen - i), zero());
    }
    store(p + i, shown);
    store(ds + i, slope);
  }
}

// bfloat16 only: p and ds rounded, as panels with queries along k and, ds, as rows.
template <class Dot>
inline void round_block(const Block<Dot>& b) {
  if (Dot::GROUP == 1) return;
  if (b.count % 2) {
    memset(b.p + b.count * PANEL, 0, PANEL * 4);
    memset(b.ds + b.count * PANEL, 0, PANEL * 4);
  }
  for (int64_t i = 0; i < b.count; i += 2) {
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const int64_t to = i / 2 * STEP + j * 4, from = i * PANEL + j;
      store(reinterpret_cast<int32_t*>(b.p_panel + to), zip_bf16(b.p + from, b.p + from + PANEL));
      store(reinterpret_cast<int32_t*>(b.ds_panel + to), zip_bf16(b.ds + from, b.ds + from + PANEL));
      store(reinterpret_cast<bf16*>(b.ds_rows) + from, load(b.ds + from));
      store(reinterpret_cast<bf16*>(b.ds_rows) + from + PANEL, load(b.ds + from + PANEL));
    }
  }
}

// The block's queries against 64 keys from `start` on.
template <class Dot, bool DROPOUT>
inline void backward_block(const AttentionArgs& a, const AttentionGroup& g, int64_t head, const Block<Dot>& b,
                           const Gradients<Dot>& to, int64_t start, int16_t* fields) {
  constexpr int64_t SIZE = Block<Dot>::SIZE;
  const int64_t bytes = a.width * SIZE, count = least(PANEL, b.most - start);
  for (int64_t i = 0; i < b.count; i += ROWS) {
    const int rows = static_cast<int>(least(ROWS, b.count - i));
    tile<Dot>(rows, Rows{b.q + i * bytes, bytes, bytes}, to.key_columns + start * bytes, b.p + i * PANEL, PANEL, true,
              count);
    tile<Dot>(rows, Rows{b.dout + i * bytes, bytes, bytes}, to.value_columns + start * bytes, b.ds + i * PANEL, PANEL,
              true, count);
    for (int64_t j = i; j < i + rows; ++j) {
      const int64_t rest = b.visible[j] - start, seen = rest < 0 ? 0 : least(rest, count);
      Drop drop{fields, a.threshold, a.keep};
      if (DROPOUT)
        drop.fields = keep_fields(a.seed, g.mask + b.row[j] * a.mask_row + head * a.mask_head +
                                              b.token[j] * a.mask_token + start, seen, fields);
      gradient_row<Dot, DROPOUT>(b.p + j * PANEL, b.ds + j * PANEL, seen, a.scale, b.lse[j], b.delta[j], drop);
    }
  }
  round_block(b);
  const int64_t key_bytes = round_up(count, Dot::GROUP) * SIZE, query_bytes = round_up(b.count, Dot::GROUP) * SIZE;
  for (int64_t i = 0; i < b.count; i += ROWS)
    tile<Dot>(static_cast<int>(least(ROWS, b.count - i)), Rows{b.ds_rows + i * PANEL * SIZE, PANEL * SIZE, key_bytes},
              to.key_rows + start / Dot::GROUP * STEP, b.dq + i * a.width, a.width, start == 0, a.width);
  for (int64_t key = 0; key < count; key += ROWS) {
    const int rows = static_cast<int>(least(ROWS, count - key));
    const int64_t at = (start + key) * a.width;
    tile<Dot>(rows, Rows{b.ds_panel + key * 4, 4, query_bytes, STEP}, b.q_rows, to.dk + at, a.width, false, a.width);
    tile<Dot>(rows, Rows{b.p_panel + key * 4, 4, query_bytes, STEP}, b.dout_rows, to.dv + at, a.width, false, a.width);
  }
}

template <class Dot>
inline void write_rows(const float* from, int64_t width, char* to) {
  auto* out = reinterpret_cast<typename Element<Dot>::Value*>(to);
  for (int64_t d = 0; d < width; d += LANES) store(out + d, load(from + d));
}

template <class Dot>
inline Gradients<Dot> start_task(const AttentionArgs& a, const AttentionGroup& g, int64_t head) {
  const int64_t bytes = a.width * Block<Dot>::SIZE, columns = bytes_as_columns(g.keys, bytes);
  Gradients<Dot> to;
  char* at = scratch_of<char>(3, 2 * columns + bytes_as_rows(g.keys, a.width, Dot::GROUP) + 256);
  to.key_columns = take<char>(at, columns);
  to.value_columns = take<char>(at, columns);
  to.key_rows = at;
  pack_as_columns(a.k + g.k + head * a.k_head, a.k_token, g.keys, bytes, to.key_columns);
  pack_as_columns(a.v + g.v + head * a.v_head, a.v_token, g.keys, bytes, to.value_columns);
  pack_as_rows<Dot>(a.k + g.k + head * a.k_head, a.k_token, g.keys, a.width, to.key_rows);
  to.dk = scratch_of<float>(5, 2 * g.keys * a.width + 256);
  to.dv = to.dk + g.keys * a.width;
  memset(to.dk, 0, static_cast<size_t>(2 * g.keys * a.width * 4));
  return to;
}

template <class Dot, bool DROPOUT>
inline void backward_task(const AttentionGradArgs& args, const AttentionGroup& g, int64_t head) {
  const AttentionArgs& a = args.forward;
  const size_t bytes = static_cast<size_t>(a.width * Block<Dot>::SIZE);
  Block<Dot> b;
  make_room(a, b);
  Gradients<Dot> to = start_task<Dot>(a, g, head);
  int16_t* fields = reinterpret_cast<int16_t*>(to.dk + 2 * g.keys * a.width);
  for (int64_t first = 0; first < g.rows * g.tokens; first += QUERIES) {
    load_block(args, g, head, first, b);
    for (int64_t start = 0; start < b.most; start += PANEL)
      backward_block<Dot, DROPOUT>(a, g, head, b, to, start, fields);
    for (int64_t i = 0; i < b.count; ++i) {
      char* dq = args.dq + g.out + b.row[i] * a.out_row + b.token[i] * a.out_token + head * a.out_head;
      if (b.most) write_rows<Dot>(b.dq + i * a.width, a.width, dq);
      else memset(dq, 0, bytes);
    }
  }
  for (int64_t key = 0; key < g.all_keys; ++key) {
    const int64_t at = g.dk + key * args.dk_token + head * args.dk_head;
    if (key < g.keys) {
      write_rows<Dot>(to.dk + key * a.width, a.width, args.dk + at);
      write_rows<Dot>(to.dv + key * a.width, a.width, args.dv + at);
    } else {
      memset(args.dk + at, 0, bytes);
      memset(args.dv + at, 0, bytes);
    }
  }
}

template <class Dot>
void backward_of(const AttentionGradArgs& args) {
  parallel(args.forward.num_tasks, args.forward.grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const AttentionGroup& g = args.forward.groups[task / args.forward.heads];
      const int64_t head = task % args.forward.heads;
      if (args.forward.dropout) backward_task<Dot, true>(args, g, head);
      else backward_task<Dot, false>(args, g, head);
    }
  });
}

void backward(const AttentionGradArgs& args) {
  args.forward.type == Type::bf16 ? backward_of<DotBf16>(args) : backward_of<DotF32>(args);
}

}  // namespace
}  // namespace attend

extern const AttentionKernels attention_kernels = {attend::forward, attend::coded, attend::single,
                                                    attend::head_product, attend::backward};

}  // namespace MISS_ISA
}  // namespace miss
