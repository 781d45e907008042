// Linear and cross entropy's kernels. Included by the file of each instruction set.
#include "cross_entropy.h"

namespace miss {
namespace MISS_ISA {
namespace {

constexpr float LOWEST = -3.4028234664e38f;

// The epilogue of one block of tokens: a row of the tile is a token, a column a row of hidden.
template <class T>
struct EntropyTile {
  const EntropyArgs& args;
  float *largest, *sums, *plain;  // of the block, a number a row of hidden

  void prefetch(int64_t, int, int64_t, int) const {}

  static vf set1_of(const float* p) { return set1(*p); }
  static vf set1_of(const bf16* p) {
    uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return set1(x);
  }

  // The logits take the place of the tile's sums, which nobody reads after this.
  void operator()(int64_t token, int num_tokens, int64_t column, int num_columns, float* tile, int64_t stride) const {
    for (int t = 0; t < num_tokens; ++t) {
      vf b = args.bias == nullptr ? zero() : set1_of(reinterpret_cast<const T*>(args.bias) + token + t);
      T* to = args.logits == nullptr ? nullptr : reinterpret_cast<T*>(args.logits) + (token + t) * args.rows + column;
      for (int c = 0; c < num_columns; c += LANES) {
        vf z = add(load(tile + t * stride + c), b);
        store(tile + t * stride + c, z);
        if (to == nullptr) continue;
        if (c + LANES <= num_columns) store(to + c, z);
        else store_n(to + c, z, num_columns - c);
      }
    }
    for (int c = 0; c < num_columns; c += LANES) {
      vf before = load(largest + column + c), most = before, all = zero(), flat = zero();
      for (int t = 0; t < num_tokens; ++t) most = max(load(tile + t * stride + c), most);  // NaN is left aside
      vf shift = max(set1(LOWEST), most);  // minus infinity less itself would be NaN
      for (int t = 0; t < num_tokens; ++t) {
        vf z = load(tile + t * stride + c);
        all = add(all, exp(sub(z, shift)));
        flat = add(flat, z);
      }
      store(sums + column + c, fma(load(sums + column + c), exp(sub(before, shift)), all));
      store(plain + column + c, add(load(plain + column + c), flat));
      store(largest + column + c, shift);
    }
    for (int c = 0; c < num_columns; ++c) {
      uint64_t t = static_cast<uint64_t>(args.labels[column + c] - token);
      if (t < static_cast<uint64_t>(num_tokens)) args.at_label[column + c] = tile[static_cast<int64_t>(t) * stride + c];
    }
  }
};

template <class Dot, class T>
void entropy_blocks(const EntropyArgs& args) {
  const int64_t room = EntropyArgs::padded(args.rows), bytes = args.k * static_cast<int64_t>(sizeof(T));
  parallel(EntropyArgs::blocks(args.tokens), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* partial = args.partial + block * 3 * room;
      for (int64_t i = 0; i < room; ++i) partial[i] = LOWEST;
      memset(partial + room, 0, static_cast<size_t>(2 * room) * sizeof(float));
      const int64_t first = block * ENTROPY_BLOCK, left = args.tokens - first;
      EntropyTile<T> tile{args, partial, partial + room, partial + 2 * room};
      multiply_chunk<Dot>({args.weight + first * bytes, bytes, bytes}, first,
                          static_cast<int>(left < ENTROPY_BLOCK ? left : ENTROPY_BLOCK), args.panels, args.rows, 0,
                          blocks(args.rows, PANEL), tile);
    }
  });
}

void entropy_forward(const EntropyArgs& args) {
  if (args.type == Type::f32) entropy_blocks<DotF32, float>(args);
  else entropy_blocks<DotBf16, bf16>(args);
  const int64_t room = EntropyArgs::padded(args.rows), num_blocks = EntropyArgs::blocks(args.tokens);
  parallel(room / LANES, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * LANES; i < end * LANES; i += LANES) {
      vf most = set1(LOWEST), all = zero(), flat = zero();
      for (int64_t b = 0; b < num_blocks; ++b) most = max(load(args.partial + b * 3 * room + i), most);
      for (int64_t b = 0; b < num_blocks; ++b) {
        const float* partial = args.partial + b * 3 * room + i;
        all = fma(load(partial + room), exp(sub(load(partial), most)), all);
        flat = add(flat, load(partial + 2 * room));
      }
      store(args.shift + i, most);
      store(args.total + i, all);
      store(args.sum + i, flat);
    }
  });
}

// dz = dloss * (softmax - smoothing / V - (1 - smoothing) * onehot), in float32 until it is stored.
template <class T>
void entropy_gradient_of(const EntropyGradArgs& args) {
  T* logits = reinterpret_cast<T*>(args.logits);
  const int64_t rows = args.rows;
  const float flat = args.smoothing / static_cast<float>(args.tokens);
  for (int64_t r = 0; r < rows; ++r) {  // the labels' logits, before they are overwritten
    vf z = load_n(logits + args.labels[r] * rows + r, 1);
    alignas(64) float value[LANES];
    store(value, z);
    args.at_label[r] = value[0];
  }
  spans(rows, [&](int64_t r, auto span) {
    vf p = exp(sub(get(args.at_label + r, span), get(args.lse + r, span)));
    put(args.at_label + r, mul(get(args.dloss + r, span), sub(p, set1(flat + (1.0f - args.smoothing)))), span);
  });
  parallel(args.tokens, 16384 / (rows + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      T* z = logits + token * rows;
      vf sums[4] = {zero(), zero(), zero(), zero()};
      spans(rows, [&](int64_t r, auto span) {  // beyond the rows dloss is 0, and softmax of 0 is 1 at the most
        vf p = exp(sub(get(z + r, span), get(args.lse + r, span)));
        vf dz = mul(get(args.dloss + r, span), sub(p, set1(flat)));
        put(z + r, dz, span);
        sums[span.sum] = add(sums[span.sum], dz);
      });
      args.dbias[token] = sum(total(sums));
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    convert(args.at_label[r], logits[args.labels[r] * rows + r]);
    args.dbias[args.labels[r]] -= args.dloss[r] * (1.0f - args.smoothing);
  }
}

void entropy_gradient(const EntropyGradArgs& args) {
  if (args.type == Type::f32) entropy_gradient_of<float>(args);
  else entropy_gradient_of<bf16>(args);
}

}  // namespace

extern const EntropyKernels entropy_kernels = {entropy_forward, entropy_gradient};

}  // namespace MISS_ISA
}  // namespace miss
