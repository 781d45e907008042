// Each head's rows times its own weight, for the absorbed form of cross-attention: q w_k before, (P x) w_v^T + b_v after.
// Included by the file of each instruction set.
#include "attention_parts.inl.h"

namespace miss {
namespace MISS_ISA {
namespace attend {
namespace {

constexpr int64_t PRODUCT_CHUNK = 48;  // rows of a task

template <class Dot>
inline const char* pack_weight(const HeadProductArgs& p, int64_t head) {
  constexpr int64_t SIZE = 4 / Dot::GROUP;
  const char* from = p.weight + head * p.weight_head;
  if (p.transposed) {
    char* to = scratch_of<char>(3, bytes_as_columns(p.columns, p.inner * SIZE));
    pack_as_columns(from, p.weight_row, p.columns, p.inner * SIZE, to);
    return to;
  }
  char* to = scratch_of<char>(3, bytes_as_rows(p.inner, p.columns, Dot::GROUP));
  pack_as_rows<Dot>(from, p.weight_row, p.inner, p.columns, to);
  return to;
}

template <class Dot>
inline void product_strip(const HeadProductArgs& p, int64_t head, int64_t first, int rows, const char* weight,
                          char* gathered, float* sums) {
  using Value = typename Element<Dot>::Value;
  constexpr int64_t SIZE = 4 / Dot::GROUP;
  const int64_t bytes = p.inner * SIZE;
  for (int r = 0; r < rows; ++r) {
    const int64_t row = (first + r) / p.tokens, token = (first + r) % p.tokens;
    memcpy(gathered + r * bytes, p.a + row * p.a_outer + token * p.a_token + head * p.a_head, bytes);
  }
  for (int64_t column = 0; column < p.columns; column += PANEL)
    tile<Dot>(rows, Rows{gathered, bytes, bytes}, weight + column / PANEL * (bytes / 4 * STEP), sums + column, p.columns,
              true, least(PANEL, p.columns - column));
  for (int r = 0; r < rows; ++r) {
    Value* to = reinterpret_cast<Value*>(p.out + (first + r) * p.out_token + head * p.out_head);
    const bool add_bias = p.bias != nullptr && (p.biased == nullptr || p.biased[(first + r) / p.tokens]);
    const Value* bias = reinterpret_cast<const Value*>(p.bias) + head * p.columns;
    for (int64_t c = 0; c < p.columns; c += LANES) {
      const vf sum = load(sums + r * p.columns + c);
      store(to + c, add_bias ? add(sum, load(bias + c)) : sum);
    }
  }
}

template <class Dot>
void head_product_of(const HeadProductArgs& p) {
  const int64_t rows = p.outer * p.tokens, chunks = (rows + PRODUCT_CHUNK - 1) / PRODUCT_CHUNK;
  const int64_t work = PRODUCT_CHUNK * p.inner * p.columns;
  parallel(p.heads * chunks, 1 + 1000000 / work, [&](int64_t begin, int64_t end) {
    char* gathered = scratch_of<char>(4, ROWS * p.inner * 4);
    float* sums = scratch_of<float>(5, ROWS * p.columns);
    const char* weight = nullptr;
    for (int64_t task = begin, packed = -1; task < end; ++task) {
      const int64_t head = task / chunks, first = task % chunks * PRODUCT_CHUNK;
      const int64_t last = least(rows, first + PRODUCT_CHUNK);
      if (packed != head) weight = pack_weight<Dot>(p, head);
      packed = head;
      for (int64_t j = first; j < last; j += ROWS)
        product_strip<Dot>(p, head, j, static_cast<int>(least(ROWS, last - j)), weight, gathered, sums);
    }
  });
}

void head_product(const HeadProductArgs& p) {
  p.type == Type::bf16 ? head_product_of<DotBf16>(p) : head_product_of<DotF32>(p);
}

}  // namespace
}  // namespace attend
}  // namespace MISS_ISA
}  // namespace miss
