// A decode step's program, which every thread of a team runs. Included by the file of each instruction set.
//
// Few rows are bound by reading the weights once; so a thread keeps its own part of each weight, its heads of attention
// follow their projection without waiting for the others, what is small (norms, codes) is done by whoever comes last
// while the others fetch what they will read next. Every row's arithmetic is that of the single operations.
#include "decoder_room.inl.h"
#include "decoder_step.h"
#include "decoder_stream.inl.h"

namespace miss {
namespace MISS_ISA {
namespace decode {
namespace {

constexpr int64_t ALONE = 3;           // rows up to which norms and codes are not worth a phase of their own
constexpr int64_t FETCHED = 192 << 10;  // bytes of the next weight that a waiting thread fetches, of 1 MB of L2

// body(first row, number of rows) for chunks of at most `size` rows.
template <class Body>
inline void chunks(int64_t rows, int size, const Body& body) {
  for (int64_t row = 0; row < rows; row += size) body(row, static_cast<int>(rows - row < size ? rows - row : size));
}

inline int64_t panel_size(const DecoderMatrix& m, int64_t size) {
  if (m.kind == DecoderMatrix::Kind::plain) return panel_bytes(m.k * size);
  if (m.kind == DecoderMatrix::Kind::w8a8 || m.group == 0) return panel_bytes(m.k);
  return blocks(m.k, m.group) * int4_group_bytes(m.group, m.zeros);
}

template <class T>
class Step {
 public:
  Step(const DecoderModel& m, const DecoderCall& c, Team& team)
      : m_(m), c_(c), team_(team), room_(c.scratch, m, c.rows, c.threads), states_(reinterpret_cast<T*>(c.states)) {}

  void run() {
    if (team_.too_late()) return;
    const DecoderMatrix& start = m_.num_layers ? m_.layers[0].qkv : m_.transform;
    then(start);
    rows_then([&](int64_t begin, int64_t end) { embed(begin, end); });
    for (int64_t i = 0; i < m_.num_layers; ++i)
      layer(m_.layers[i], i, i + 1 < m_.num_layers ? m_.layers[i + 1].qkv : m_.transform);
    head();
  }

 private:
  using Dot = typename Codes<T, false>::Dot;
  static constexpr int64_t SIZE = sizeof(T);
  const DecoderModel& m_;
  const DecoderCall& c_;
  Member team_;
  Room<T> room_;
  T* states_;
  const char* next_ = nullptr;

  // What this thread will read first of the weight whose turn comes after the one that it reads now.
  void then(const DecoderMatrix& next) {
    const int64_t columns = next.columns == 3 * m_.width ? m_.width : next.columns;  // Q, K, V are shared out by heads
    const int64_t own = team_.id() * blocks(columns, PANEL) / team_.size();
    next_ = next.panels + own * panel_size(next, SIZE);
  }

  // The phase that ends here is followed by body(begin, end) over all rows, which makes what comes next is multiplied
  // with.
  template <class Body>
  void rows_then(const Body& body) {
    team_.expect(next_, FETCHED);
    if (c_.rows <= ALONE) return team_.arrive([&] { body(int64_t{0}, c_.rows); });
    team_.arrive();
    team_.share(c_.rows, body);
    team_.arrive();
  }

  // Rows of x as `to` wants them.
  void feed(const DecoderMatrix& to, const T* x, int64_t begin, int64_t end) {
    const int64_t padded = padded_columns(to.k, to.group), groups = to.group == 0 ? 0 : padded / to.group;
    for (int64_t r = begin; r < end; ++r) {
      const T* row = x + r * to.k;
      if (to.kind == DecoderMatrix::Kind::w8a8) room_.code_scale[r] = quantise_row(row, to.k, room_.codes + r * to.k);
      if (to.kind != DecoderMatrix::Kind::weight_only) continue;
      if (padded != to.k) pad_row(row, to.k, padded, room_.padded + r * padded);
      if (to.zeros)
        sum_groups(padded != to.k ? room_.padded + r * padded : row, groups, to.group, room_.group_sums + r * groups);
    }
  }

  // y (rows, columns) = x W^T + bias, of panels first … last - 1; x was fed.
  template <class Out>
  void product(const DecoderMatrix& m, const T* x, int64_t first, int64_t last, Out* y, bool gelu = false) {
    LinearArgs args = {};
    args.columns = m.columns;
    args.column_scale = m.column_scale;
    args.offset = m.offset;
    args.bias = m.bias;
    args.bias_type = m.bias_type;
    args.gelu = gelu;
    if (m.kind == DecoderMatrix::Kind::w8a8) {
      const Rows rows = {reinterpret_cast<const char*>(room_.codes), m.k, m.k};
      const Finish<int32_t, Out> finish{args, y, 0, room_.code_scale};
      chunks(c_.rows, CHUNK, [&](int64_t row, int count) {
        stream_chunk<DotU8S8>(rows.from(row, 0, m.k), row, count, m.panels, m.columns, first, last, next_, finish);
      });
    } else if (m.kind == DecoderMatrix::Kind::plain) {
      const Rows rows = {reinterpret_cast<const char*>(x), m.k * SIZE, m.k * SIZE};
      const Finish<float, Out> finish{args, y, 0, nullptr};
      chunks(c_.rows, CHUNK, [&](int64_t row, int count) {
        stream_chunk<Dot>(rows.from(row, 0, m.k * SIZE), row, count, m.panels, m.columns, first, last, next_, finish);
      });
    } else {
      weight_only(m, x, first, last, reinterpret_cast<T*>(y), gelu);  // whose Out is T
    }
  }

  // gelu(x W^T + bias) of rows of codes, which becomes codes in turn: as linear.inl.h's own.
  void product_for_codes(const DecoderMatrix& m, int64_t first, int64_t last, float* y) {
    LinearArgs args = {};
    args.columns = m.columns;
    args.column_scale = m.column_scale;
    args.offset = m.offset;
    args.bias = m.bias;
    args.bias_type = m.bias_type;
    const Rows rows = {reinterpret_cast<const char*>(room_.codes), m.k, m.k};
    const Coded<int32_t, true> coded{{args, y, 0, room_.code_scale}, nullptr, m.columns};
    chunks(c_.rows, CHUNK, [&](int64_t row, int count) {
      stream_chunk<DotU8S8>(rows.from(row, 0, m.k), row, count, m.panels, m.columns, first, last, next_,
                            coded);
    });
  }

  void weight_only(const DecoderMatrix& m, const T* x, int64_t first, int64_t last, T* y, bool gelu) {
    WeightOnlyArgs args = {};
    args.rows = c_.rows;
    args.columns = m.columns;
    args.k = m.k;
    args.panels = m.panels;
    args.group = m.group;
    args.zeros = m.zeros;
    args.column_scale = m.column_scale;
    args.bias = m.bias;
    args.bias_type = m.bias_type;
    args.y = reinterpret_cast<char*>(y);
    args.gelu = gelu;
    const int64_t padded = padded_columns(m.k, m.group);
    const Padded<T> in = {padded != m.k ? room_.padded : x, padded, m.zeros ? room_.group_sums : nullptr,
                          m.group == 0 ? 0 : padded / m.group};
    WeightOnly<T>{args, in}.run(first, last);
  }

  void norm(const DecoderNorm& n, const T* x, const T* residual, T* y, T* summed) {
    NormForward args = {};
    args.x = x;
    args.residual = residual;
    args.weight = n.weight;
    args.bias = n.bias;
    args.width = m_.width;
    args.eps = n.eps;
    args.y = y;
    args.summed = summed;
    norm_row<T>(args, 0, nullptr, nullptr);
  }

  void embed(int64_t begin, int64_t end) {
    const T *words = reinterpret_cast<const T*>(m_.words), *positions = reinterpret_cast<const T*>(m_.positions);
    for (int64_t r = begin; r < end; ++r)
      norm(m_.norm, words + c_.tokens[r] * m_.width, positions + c_.positions[r] * m_.width, room_.x + r * m_.width,
           room_.product + r * m_.width);
    feed(m_.num_layers ? m_.layers[0].qkv : m_.transform, room_.x, begin, end);
  }

  // x = norm(x + y), then as `next` wants it.
  void add_norm(const DecoderMatrix& m, const DecoderNorm& n, const T* in, const DecoderMatrix& next) {
    then(next);
    team_.share(blocks(m.columns, PANEL),
                [&](int64_t first, int64_t last) { product(m, in, first, last, room_.product); });
    rows_then([&](int64_t begin, int64_t end) {
      for (int64_t r = begin * m_.width; r < end * m_.width; r += m_.width)
        norm(n, room_.product + r, room_.x + r, room_.x + r, room_.attended + r);
      feed(next, room_.x, begin, end);
    });
  }

  AttentionArgs attention(const DecoderCache& cache, int64_t layer, const T* q, int64_t q_width) const {
    AttentionArgs a = {};
    a.type = m_.type;
    a.q = reinterpret_cast<const char*>(q);
    a.k = cache.k + layer * cache.k_layer;
    a.v = cache.v + layer * cache.v_layer;
    a.out = reinterpret_cast<char*>(room_.attended);
    a.heads = m_.heads;
    a.width = m_.head_width;
    a.q_row = q_width * SIZE;
    a.out_row = m_.width * SIZE;
    a.q_head = a.k_head = a.v_head = a.out_head = m_.head_width * SIZE;
    a.k_token = cache.k_token;
    a.v_token = cache.v_token;
    a.scale = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(m_.head_width)));
    return a;
  }

  // `rows` rows from `row` on over the first `keys` of a slot, for the heads of columns first … last - 1.
  void attend(const AttentionArgs& a, const DecoderCache& cache, int64_t slot, int64_t row, int64_t rows, int64_t keys,
              int64_t first, int64_t last) const {
    AttentionGroup g = {};
    g.k = slot * cache.k_slot;
    g.v = slot * cache.v_slot;
    g.keys = keys;
    g.q = row * a.q_row;
    g.out = row * a.out_row;
    g.rows = rows;
    g.tokens = 1;
    const int64_t head = first / m_.head_width, end = last / m_.head_width;
    if (keys == 0) {
      for (int64_t h = head; h < end; ++h) attend::nothing_visible<Dot>(a, g, h, 0, rows);
    } else if (m_.head_width == 32) {
      attend::single_task<Dot, 32>(a, g, head, end);
    } else {
      attend::single_task<Dot, 64>(a, g, head, end);
    }
  }

  // Columns first … last - 1 of the new keys and values into their slots.
  void append(int64_t layer, int64_t first, int64_t last) const {
    const size_t bytes = static_cast<size_t>((last - first) * SIZE);
    const DecoderCache& to = c_.self;
    for (int64_t r = 0; r < c_.rows; ++r) {
      const T* row = room_.qkv + r * 3 * m_.width + first;
      const int64_t slot = c_.slots[r], position = c_.positions[r];
      memcpy(to.k + layer * to.k_layer + slot * to.k_slot + position * to.k_token + first * SIZE, row + m_.width, bytes);
      memcpy(to.v + layer * to.v_layer + slot * to.v_slot + position * to.v_token + first * SIZE, row + 2 * m_.width,
             bytes);
    }
  }

  void layer(const DecoderLayer& l, int64_t index, const DecoderMatrix& next) {
    const int64_t panels = m_.width / PANEL;
    then(l.self_output);
    const char* after = next_;
    team_.share(panels, [&](int64_t first, int64_t last) {  // of Q, of K and of V: these heads are this thread's alone
      for (int64_t part = 0; part < 3; ++part) {
        next_ = part == 2 ? after : l.qkv.panels + ((part + 1) * panels + first) * panel_size(l.qkv, SIZE);
        product(l.qkv, room_.x, part * panels + first, part * panels + last, room_.qkv);
      }
      append(index, first * PANEL, last * PANEL);
      const AttentionArgs a = attention(c_.self, index, room_.qkv, 3 * m_.width);
      for (int64_t r = 0; r < c_.rows; ++r)
        attend(a, c_.self, c_.slots[r], r, 1, c_.positions[r] + 1, first * PANEL, last * PANEL);
    });
    rows_then([&](int64_t begin, int64_t end) { feed(l.self_output, room_.attended, begin, end); });
    add_norm(l.self_output, l.self_norm, room_.attended, l.query);
    then(l.cross_output);
    team_.share(panels, [&](int64_t first, int64_t last) {
      product(l.query, room_.x, first, last, room_.product);
      const AttentionArgs a = attention(c_.cross, index, room_.product, m_.width);
      for (int64_t r = 0, end = 0; r < c_.rows; r = end) {  // rows of one question read its states together
        while (end < c_.rows && c_.questions[end] == c_.questions[r]) ++end;
        const int64_t wanted = c_.question_lengths[c_.questions[r]];
        const int64_t keys = wanted < 0 ? 0 : wanted < c_.question_length ? wanted : c_.question_length;
        attend(a, c_.cross, c_.questions[r], r, end - r, keys, first * PANEL, last * PANEL);
      }
    });
    rows_then([&](int64_t begin, int64_t end) { feed(l.cross_output, room_.attended, begin, end); });
    add_norm(l.cross_output, l.cross_norm, room_.attended, l.input);
    mlp(l, next);
  }

  void mlp(const DecoderLayer& l, const DecoderMatrix& next) {
    const bool codes = l.input.kind == DecoderMatrix::Kind::w8a8 && l.output.kind == DecoderMatrix::Kind::w8a8;
    then(l.output);
    team_.share(blocks(m_.inner, PANEL), [&](int64_t first, int64_t last) {
      if (codes) product_for_codes(l.input, first, last, room_.wide);
      else product(l.input, room_.x, first, last, room_.inner, true);
    });
    rows_then([&](int64_t begin, int64_t end) {
      if (!codes) return feed(l.output, room_.inner, begin, end);
      write_codes(room_.wide + begin * m_.inner, m_.inner, nullptr, end - begin, m_.inner, room_.codes + begin * m_.inner,
                  room_.code_scale + begin);
    });
    add_norm(l.output, l.mlp_norm, room_.inner, next);
  }

  void head() {
    then(m_.vocabulary);
    team_.share(m_.width / PANEL, [&](int64_t first, int64_t last) {
      product(m_.transform, room_.x, first, last, room_.product, true);
    });
    const bool only_states = c_.count == 0;
    auto states = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * m_.width; r < end * m_.width; r += m_.width)
        norm(m_.transform_norm, room_.product + r, nullptr, states_ + r, nullptr);
      if (!only_states) feed(m_.vocabulary, states_, begin, end);
    };
    rows_then(states);
    if (!only_states) best();
    team_.arrive([] {}, true);
  }

  void best() {
    const int64_t num_panels = blocks(m_.vocabulary.columns, PANEL), rows = c_.rows;
    TopKArgs args = {};
    args.rows = rows;
    args.columns = m_.vocabulary.columns;
    args.k = m_.width;
    args.column_scale = m_.vocabulary.column_scale;
    args.offset = m_.vocabulary.offset;
    args.bias = reinterpret_cast<const float*>(m_.vocabulary.bias);
    args.count = c_.count;
    args.values = c_.values;
    args.indices = c_.indices;
    args.shift = c_.shift;
    args.total = c_.total;
    float* sums = room_.largest + rows * num_panels;
    const int members = static_cast<int>(team_.size());
    if (team_.takes_part())  // also where its part is empty
      for (int64_t r = 0; r < rows; ++r) room_.candidates[team_.id() * rows + r].clear(c_.count);
    team_.share(num_panels, [&](int64_t first, int64_t last) {
      Candidates* own = room_.candidates + team_.id() * rows;
      if (m_.vocabulary.kind == DecoderMatrix::Kind::w8a8)
        reduce<DotU8S8>(args, {reinterpret_cast<const char*>(room_.codes), m_.width, m_.width}, first, last, sums, own);
      else
        reduce<Dot>(args, {c_.states, m_.width * SIZE, m_.width * SIZE}, first, last, sums, own);
    });
    team_.arrive([&] { *room_.members = members; });
    team_.share(rows, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        finish_row(args, r, num_panels, room_.largest, sums, room_.candidates, *room_.members);
    });
  }

  template <class D>
  void reduce(const TopKArgs& args, const Rows& a, int64_t first, int64_t last, float* sums, Candidates* own) const {
    const int64_t num_panels = blocks(args.columns, PANEL);
    const Reduce<typename D::Sum> epilogue{args, room_.code_scale, room_.largest, sums, num_panels, own};
    chunks(args.rows, MOST_ROWS, [&](int64_t row, int count) {
      stream_chunk<D>(a.from(row, 0, a.bytes), row, count, m_.vocabulary.panels, args.columns, first, last, next_,
                      epilogue);
    });
  }
};

int64_t scratch_bytes(const DecoderModel& m, int64_t rows, int64_t threads) {
  if (m.type == Type::f32) return Room<float>(nullptr, m, rows, threads).bytes;
  return Room<bf16>(nullptr, m, rows, threads).bytes;
}

void reserve(const DecoderModel& m, const DecoderCall& c) {
  const int64_t most = m.width > m.inner ? m.width : m.inner;
  scratch_of<float>(4, attend::TOGETHER * c.most_keys * LANES);
  scratch_of<float>(5, attend::TOGETHER * 384);
  if (c.rows > FEW) scratch_of<char>(0, (most + 136) * PANEL * 4);
}

void run(const DecoderModel& m, const DecoderCall& c, Team& team) {
  if (c.rows == 0) return;
  if (m.type == Type::f32) Step<float>(m, c, team).run();
  else Step<bf16>(m, c, team).run();
}

}  // namespace
}  // namespace decode

extern const DecoderKernels decoder_kernels = {decode::scratch_bytes, decode::reserve, decode::run};

}  // namespace MISS_ISA
}  // namespace miss
