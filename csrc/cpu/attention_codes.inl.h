// Attention whose scores are products of int8 codes, forward. Included by the file of each instruction set.
//
// Keys minus their mean over the source (which moves all of a query's scores alike, and so no probability) and queries
// become codes with a scale a token and head; probabilities times values are as in attention.inl.h, of which the strips,
// the softmax and the packing of values come. A code product is exact, so that a row's bits do not depend on its strip.
#include "attention.inl.h"

namespace miss {
namespace MISS_ISA {
namespace attend {
namespace {

struct CodedKeys {
  const char* panels;     // [key / 64][4 numbers][key % 64]: 4 codes
  int64_t panel;          // bytes of 64 keys
  const float* scale;     // a key
  const int32_t* offset;  // a key: 128 times the sum of its codes, which queries' codes have too much
};

// The mean of a source's keys in one head, dimension by dimension.
template <class T>
inline void mean_of(const char* from, int64_t stride, int64_t rows, int64_t width, float* mean) {
  for (int64_t d = 0; d < width; d += LANES) {
    vf sums[4] = {zero(), zero(), zero(), zero()};
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sums[i] = add(sums[i], load(reinterpret_cast<const T*>(from + (row + i) * stride) + d));
    for (; row < rows; ++row) sums[0] = add(sums[0], load(reinterpret_cast<const T*>(from + row * stride) + d));
    store(mean + d, mul(total(sums), set1(1.0f / static_cast<float>(rows))));
  }
}

template <class Dot>
inline CodedKeys code_keys(const AttentionArgs& a, const AttentionGroup& g, int64_t head) {
  using Value = typename Element<Dot>::Value;
  const char* from = a.k + g.k + head * a.k_head;
  const int64_t bytes = round_up(a.width, 4 * LANES);  // of a key's codes, which are turned vector by vector
  const int64_t keys = round_up(g.keys, LANES), of_panels = bytes_as_columns(g.keys, bytes);
  char* room = scratch_of<char>(6, of_panels + keys * (bytes + 8) + 2 * a.width * 4);
  auto* scale = reinterpret_cast<float*>(room + of_panels);
  auto* offset = reinterpret_cast<int32_t*>(scale + keys);
  auto* mean = reinterpret_cast<float*>(offset + keys);
  float* row = mean + a.width;
  auto* codes = reinterpret_cast<uint8_t*>(row + a.width);
  mean_of<Value>(from, a.k_token, g.keys, a.width, mean);
  for (int64_t key = 0; key < g.keys; ++key) {
    const Value* numbers = reinterpret_cast<const Value*>(from + key * a.k_token);
    for (int64_t d = 0; d < a.width; d += LANES) store(row + d, sub(load(numbers + d), load(mean + d)));
    uint8_t* to = codes + key * bytes;
    memset(to + a.width, 0, static_cast<size_t>(bytes - a.width));
    scale[key] = quantise_row(row, a.width, to);
    int32_t sum = 0;
    for (int64_t d = 0; d < a.width; ++d) sum += to[d] ^= 128;  // what stood for 0 is 0 now; the sum is put right below
    int32_t negative = 0;
    for (int64_t d = 0; d < a.width; ++d) negative += to[d] >> 7;
    offset[key] = 128 * (sum - 256 * negative);
  }
  for (int64_t key = g.keys; key < keys; ++key) scale[key] = 0.0f, offset[key] = 0;
  pack_as_columns(reinterpret_cast<const char*>(codes), bytes, g.keys, bytes, room);
  return {room, bytes / 4 * STEP, scale, offset};
}

// Scores of NUM_ROWS queries, WORDS words of codes each, and NUM_VECS vectors of keys from `key` on; `high`: the largest
// of each query so far. Finished in the registers in which they were summed: as a pass of its own over what the product
// had written, this took as much as codes save over bf16.
template <int NUM_ROWS, int NUM_VECS>
__attribute__((always_inline)) inline void scores_of(const char* q, int64_t words, const CodedKeys& k, int64_t key,
                                                     float* to, vf* high) {
  const char* b = k.panels + key / PANEL * k.panel + key % PANEL * 4;
  vi acc[NUM_ROWS][NUM_VECS];
  const char* rows[NUM_ROWS];
#pragma GCC unroll 6
  for (int r = 0; r < NUM_ROWS; ++r) {
    rows[r] = q + r * words * 4;
#pragma GCC unroll 4
    for (int v = 0; v < NUM_VECS; ++v) acc[r][v] = zeroi();
  }
  for (int64_t w = 0; w < words; ++w) step_all<DotU8S8>(rows, w * 4, b + w * STEP, acc);
#pragma GCC unroll 4
  for (int v = 0; v < NUM_VECS; ++v) {
    const vi offset = load(k.offset + key + v * LANES);
    const vf scale = load(k.scale + key + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < NUM_ROWS; ++r) {
      const vf x = mul(to_float(subi(acc[r][v], offset)), scale);
      store(to + r * KEYS + v * LANES, x);
      high[r] = max(high[r], x);
    }
  }
}

template <int NUM_ROWS>
inline void scores_of_keys(const char* q, int64_t words, const CodedKeys& k, int64_t first, int64_t count, float* to,
                           float* most) {
  vf high[NUM_ROWS];
  for (int r = 0; r < NUM_ROWS; ++r) high[r] = set1(-__builtin_inff());
  int64_t i = 0;
  for (; i + VECS * LANES <= count; i += VECS * LANES)
    scores_of<NUM_ROWS, VECS>(q, words, k, first + i, to + i, high);
  for (; i + LANES <= count; i += LANES) scores_of<NUM_ROWS, 1>(q, words, k, first + i, to + i, high);
  if (i < count) {  // keys beyond the last one are no keys
    vf none[NUM_ROWS];
    for (int r = 0; r < NUM_ROWS; ++r) none[r] = high[r];
    scores_of<NUM_ROWS, 1>(q, words, k, first + i, to + i, none);
    for (int r = 0; r < NUM_ROWS; ++r) high[r] = largest_of(to + r * KEYS + i, count - i, high[r]);
  }
  for (int r = 0; r < NUM_ROWS; ++r) most[r] = max_of(high[r]);
}

inline void scores_of_strip(int num_rows, const char* q, int64_t words, const CodedKeys& k, int64_t first,
                            int64_t count, float* to, float* most) {
  if (num_rows == ROWS) return scores_of_keys<ROWS>(q, words, k, first, count, to, most);
  for (int r = 0; r < num_rows; ++r)
    scores_of_keys<1>(q + r * words * 4, words, k, first, count, to + r * KEYS, most + r);
}

// As forward_strip, of at most ROWS queries that see all keys.
template <class Dot>
inline void coded_strip(const AttentionArgs& a, const AttentionGroup& g, int64_t head, const Strip& s,
                        const CodedKeys& keys, const Source<Dot>& source, float* scores, float* sums) {
  using Value = typename Element<Dot>::Value;
  constexpr int64_t SIZE = 4 / Dot::GROUP;
  alignas(64) uint8_t q[ROWS * PANEL];
  float scale[ROWS], most[ROWS];
  Running running;
  for (int r = 0; r < s.num_rows; ++r) {
    running.top[r] = -__builtin_inff();
    running.total[r] = 0.0f;
    scale[r] = quantise_row(reinterpret_cast<const Value*>(s.q[r]), a.width, q + r * a.width) * a.scale * LOG2E;
  }
  for (int64_t start = 0; start < g.keys; start += KEYS) {
    const int64_t count = least(KEYS, g.keys - start), padded = round_up(count, Dot::GROUP);
    scores_of_strip(s.num_rows, reinterpret_cast<const char*>(q), a.width / 4, keys, start, count, scores, most);
    for (int r = 0; r < s.num_rows; ++r) {
      const float factor = softmax_row<Dot, false>(scores + r * KEYS, count, padded, scale[r], most[r], running.top[r],
                                                   running.total[r], Drop{});
      if (start > 0)
        for (int64_t d = 0; d < a.width; d += LANES)
          store(sums + r * a.width + d, mul(load(sums + r * a.width + d), set1(factor)));
    }
    tile<Dot>(s.num_rows, Rows{reinterpret_cast<const char*>(scores), KEYS * 4, padded * SIZE},
              source.values + start / Dot::GROUP * STEP, sums, a.width, start == 0, a.width);
  }
  for (int r = 0; r < s.num_rows; ++r) {
    auto* to = reinterpret_cast<Value*>(a.out + g.out + s.row[r] * a.out_row + s.token[r] * a.out_token +
                                        head * a.out_head);
    const vf factor = set1(1.0f / running.total[r]);
    for (int64_t d = 0; d < a.width; d += LANES) store(to + d, mul(load(sums + r * a.width + d), factor));
  }
}

template <class Dot>
void coded_tasks(const AttentionArgs& a) {
  parallel(a.num_tasks, a.grain, [&](int64_t begin, int64_t end) {
    float* scores = scratch_of<float>(4, ROWS * (KEYS + 2 * a.width));
    CodedKeys keys{};
    Source<Dot> source{};
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t number = group_of(a, task);
      const AttentionGroup& g = a.groups[number];
      const int64_t queries = g.rows * g.tokens, chunks = (queries + a.chunk - 1) / a.chunk;
      const int64_t head = (task - g.first_task) / chunks;
      const int64_t first = (task - g.first_task) % chunks * a.chunk, last = least(queries, first + a.chunk);
      if (packed != number * a.heads + head) {
        char* values = scratch_of<char>(3, bytes_as_rows(g.keys, a.width, Dot::GROUP));
        source.values = pack_values<Dot>(a, g, head, values);
        keys = code_keys<Dot>(a, g, head);
      }
      packed = number * a.heads + head;
      Strip now = strip_of(a, g, head, first, last);
      for (int64_t j = first; j < last; j += ROWS) {
        const Strip next = strip_of(a, g, head, least(j + ROWS, last), last);
        prefetch_strip(a, g, head, next, a.width * 4 / Dot::GROUP);
        coded_strip<Dot>(a, g, head, now, keys, source, scores, scores + ROWS * KEYS);
        now = next;
      }
    }
  });
}

void coded(const AttentionArgs& a) {
  a.type == Type::bf16 ? coded_tasks<DotBf16>(a) : coded_tasks<DotF32>(a);
}

}  // namespace
}  // namespace attend
}  // namespace MISS_ISA
}  // namespace miss
