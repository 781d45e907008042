// Layer normalization's kernels. Included by the file of each instruction set.
//
// A row is read once from memory: the second pass of the variance and that of the result find it in the first level of
// the cache (3 KB at width 768), and so do the codes the result.
#include "dropout.inl.h"
#include "norm.h"

namespace miss {
namespace MISS_ISA {
namespace {

constexpr int64_t NORM_GRAIN = 32768;  // numbers that are worth a thread

// Dropout's factors of one row: `scale` where a number is kept, else 0.
struct Mask {
  vf scale;
  int threshold;
  const int16_t* fields;

  static int64_t room(int64_t width) { return width + FIELD_SLACK; }
  // Those of the row that begins with number `first`; `buffer` has that room.
  Mask(const Dropout& dropout, int64_t first, int64_t width, int16_t* buffer)
      : scale(set1(dropout.scale)), threshold(dropout.threshold), fields(nullptr) {
    if (dropout.on) fields = keep_fields(dropout.seed, first, width, buffer);
  }
  vf at(int64_t i) const { return kept(scale, fields + i, threshold); }
};

// The row that begins `at` numbers into a matrix; nullptr of a matrix that there is not.
template <class T>
inline const T* row_of(const void* p, int64_t at) {
  return p == nullptr ? nullptr : static_cast<const T*>(p) + at;
}
template <class T>
inline T* row_to(void* p, int64_t at) {
  return p == nullptr ? nullptr : static_cast<T*>(p) + at;
}

// Reads a row (and adds its residual into `summed`); the sum of it. What is stored as `summed` is what is normalised, so
// that backward, which only has the stored one, differentiates the same.
template <class T, bool ADD, bool DROP>
inline float gather(const T* x, const T* residual, const Mask& mask, T* summed, int64_t width) {
  vf sums[4] = {zero(), zero(), zero(), zero()};
  spans(width, [&](int64_t i, auto span) {
    vf v = get(x + i, span);
    if constexpr (ADD) {
      v = DROP ? fma(v, mask.at(i), get(residual + i, span)) : add(v, get(residual + i, span));
      v = stored(v, x);
      put(summed + i, v, span);
    }
    sums[span.sum] = add(sums[span.sum], v);
  });
  return sum(total(sums));
}

// The mean of the squared deviations.
template <class T>
inline float variance(const T* values, int64_t width, float mean) {
  vf sums[4] = {zero(), zero(), zero(), zero()};
  const vf middle = set1(mean);
  spans(width, [&](int64_t i, auto span) {
    vf d = sub(get(values + i, span), middle);
    if constexpr (sizeof(span) == sizeof(Rest)) {  // beyond the row no number, hence no deviation
      alignas(64) float some[LANES];
      put(some, d, span);
      d = get(some, span);
    }
    sums[span.sum] = fma(d, d, sums[span.sum]);
  });
  return sum(total(sums)) / static_cast<float>(width);
}

// body(first index, result, span) for a normalised row.
template <class T, class Body>
inline void normalise(const NormForward& n, const T* values, float mean, float rstd, const Body& body) {
  const vf middle = set1(mean), scale = set1(rstd);
  const float *weight = n.weight, *bias = n.bias;
  spans(n.width, [&](int64_t i, auto span) {
    vf hat = mul(sub(get(values + i, span), middle), scale);
    body(i, fma(hat, get(weight + i, span), get(bias + i, span)), span);
  });
}

// The result as codes, from float32, before it is rounded to T; y where it is wanted too. Returns the row's scale.
template <class T>
inline float write_codes(const NormForward& n, const T* values, float mean, float rstd, T* y, float* buffer, uint8_t* codes) {
  Largest largest;
  normalise(n, values, mean, rstd, [&](int64_t i, vf v, auto span) {
    if (y != nullptr) put(y + i, v, span);
    put(buffer + i, v, span);
    largest.see(v, span);
  });
  return to_codes(buffer, n.width, largest.value(), codes);
}

template <class T>
void norm_row(const NormForward& n, int64_t row, float* buffer, int16_t* fields) {
  const int64_t width = n.width, at = row * width;
  const T *x = row_of<T>(n.x, at), *residual = row_of<T>(n.residual, at);
  T *summed = row_to<T>(n.summed, at), *y = row_to<T>(n.y, at);
  const T* values = residual == nullptr ? x : summed;
  const Mask mask(n.dropout, at, width, fields);
  float all;
  if (residual == nullptr) all = gather<T, false, false>(x, nullptr, mask, nullptr, width);
  else if (n.dropout.on) all = gather<T, true, true>(x, residual, mask, summed, width);
  else all = gather<T, true, false>(x, residual, mask, summed, width);
  const float mean = all / static_cast<float>(width);
  const float rstd = 1.0f / __builtin_sqrtf(variance(values, width, mean) + n.eps);
  if (n.mean != nullptr) n.mean[row] = mean;
  if (n.rstd != nullptr) n.rstd[row] = rstd;
  if (n.codes != nullptr) n.scale[row] = write_codes<T>(n, values, mean, rstd, y, buffer, n.codes + at);
  else normalise(n, values, mean, rstd, [&](int64_t i, vf v, auto span) { put(y + i, v, span); });
}

template <class T>
void norm_forward(const NormForward& n) {
  const int64_t width = n.width;
  parallel(n.rows, NORM_GRAIN / width + 1, [&](int64_t begin, int64_t end) {
    float* buffer = scratch_of<float>(7, width + Mask::room(width));
    int16_t* fields = reinterpret_cast<int16_t*>(buffer + width);
    for (int64_t row = begin; row < end; ++row) norm_row<T>(n, row, buffer, fields);
  });
}

// One row of dx, and what the row adds to the weights' gradients.
template <class T, bool ADD, bool DROP>
inline void norm_backward_row(const NormBackward& n, int64_t row, const Mask& mask, float* dweight, float* dbias) {
  const int64_t at = row * n.width;
  const T *dy = static_cast<const T*>(n.dy) + at, *x = static_cast<const T*>(n.x) + at;
  const vf middle = set1(n.mean[row]), scale = set1(n.rstd[row]);
  vf g_sums[4] = {zero(), zero(), zero(), zero()}, hat_sums[4] = {zero(), zero(), zero(), zero()};
  spans(n.width, [&](int64_t i, auto span) {
    vf d = get(dy + i, span), hat = mul(sub(get(x + i, span), middle), scale);
    put(dweight + i, fma(d, hat, get(dweight + i, span)), span);
    put(dbias + i, add(d, get(dbias + i, span)), span);
    vf g = mul(d, get(n.weight + i, span));
    g_sums[span.sum] = add(g, g_sums[span.sum]);
    hat_sums[span.sum] = fma(g, hat, hat_sums[span.sum]);
  });
  const float width = static_cast<float>(n.width);
  const vf g_mean = set1(sum(total(g_sums)) / width), hat_mean = set1(sum(total(hat_sums)) / width);
  spans(n.width, [&](int64_t i, auto span) {
    vf hat = mul(sub(get(x + i, span), middle), scale);
    vf g = mul(get(dy + i, span), get(n.weight + i, span));
    vf dx = mul(sub(fnma(hat, hat_mean, g), g_mean), scale);
    if constexpr (ADD) {
      dx = add(dx, get(static_cast<const T*>(n.dsummed) + at + i, span));
      put(static_cast<T*>(n.dresidual) + at + i, dx, span);
      if constexpr (DROP) dx = mul(dx, mask.at(i));
    }
    put(static_cast<T*>(n.dx) + at + i, dx, span);
  });
}

template <class T>
void norm_backward(const NormBackward& n) {
  const int64_t width = n.width, size = (n.rows + NORM_BLOCKS - 1) / NORM_BLOCKS;
  const int64_t blocks = size == 0 ? 0 : (n.rows + size - 1) / size;
  parallel(blocks, NORM_GRAIN / (size * width + 1) + 1, [&](int64_t begin, int64_t end) {
    int16_t* fields = scratch_of<int16_t>(7, Mask::room(width));
    for (int64_t block = begin; block < end; ++block) {
      float *dweight = n.partial + block * 2 * width, *dbias = dweight + width;
      memset(dweight, 0, static_cast<size_t>(2 * width) * sizeof(float));
      const int64_t stop = (block + 1) * size < n.rows ? (block + 1) * size : n.rows;
      for (int64_t row = block * size; row < stop; ++row) {
        const Mask mask(n.dropout, row * width, width, fields);
        if (n.dresidual == nullptr) norm_backward_row<T, false, false>(n, row, mask, dweight, dbias);
        else if (n.dropout.on) norm_backward_row<T, true, true>(n, row, mask, dweight, dbias);
        else norm_backward_row<T, true, false>(n, row, mask, dweight, dbias);
      }
    }
  });
  float* targets[2] = {n.dweight, n.dbias};
  for (int side = 0; side < 2; ++side)
    spans(width, [&](int64_t i, auto span) {
      vf all = zero();
      for (int64_t block = 0; block < blocks; ++block) all = add(all, get(n.partial + (block * 2 + side) * width + i, span));
      put(targets[side] + i, all, span);
    });
}

}  // namespace

extern const NormKernels norm_kernels = {norm_forward<float>, norm_forward<bf16>, norm_backward<float>,
                                         norm_backward<bf16>};

}  // namespace MISS_ISA
}  // namespace miss
