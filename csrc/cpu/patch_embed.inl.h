// Patch embedding's kernels. Included by the file of each instruction set.
#include "patch_embed.h"

namespace miss {
namespace MISS_ISA {
namespace {

// A normalised value by channel and byte: 256 multiplications a channel instead of one a pixel.
template <class T>
struct ByteValues {
  T table[3][256];

  ByteValues(const float* scale, const float* shift) {
    for (int c = 0; c < 3; ++c)
      for (int b = 0; b < 256; ++b) convert(static_cast<float>(b) * scale[c] + shift[c], table[c][b]);
  }
  void line(const uint8_t* from, int64_t size, int64_t plane, T* to) const {
    for (int64_t x = 0; x < size; ++x, from += 3) {
      to[x] = table[0][from[0]];
      to[plane + x] = table[1][from[1]];
      to[2 * plane + x] = table[2][from[2]];
    }
  }
};

template <class T>
struct FloatValues {
  const float *scale, *shift;

  FloatValues(const float* s, const float* t) : scale(s), shift(t) {}
  void line(const float* from, int64_t size, int64_t plane, T* to) const {
    for (int64_t x = 0; x < size; ++x, from += 3)
      for (int c = 0; c < 3; ++c) convert(from[c] * scale[c] + shift[c], to[c * plane + x]);
  }
};

// Patches first … first + count - 1 of all images as rows of 3 * size * size values.
template <class T, class Pixel, class Values>
void cut(const PatchArgs& args, const Values& values, int64_t first, int count, T* to) {
  const int64_t size = args.size, plane = size * size, line = args.columns * size * 3;
  for (int i = 0; i < count; ++i, to += 3 * plane) {
    const int64_t patch = first + i, column = patch % args.columns, row = patch / args.columns;  // of all images' rows
    const Pixel* from = reinterpret_cast<const Pixel*>(args.pixels) + row * size * line + column * size * 3;
    for (int64_t y = 0; y < size; ++y) values.line(from + y * line, size, plane, to + y * size);
  }
}

template <class Dot, class T, class Pixel, class Values>
void embed(const PatchArgs& args) {
  const Values values(args.scale, args.shift);
  const LinearArgs& linear = args.linear;
  const int64_t bytes = linear.k * static_cast<int64_t>(sizeof(T)), num_panels = blocks(linear.columns, PANEL);
  for_chunks(linear.rows, [&](int64_t row, int count) {
    T* x = scratch_of<T>(6, count * linear.k);
    cut<T, Pixel>(args, values, row, count, x);
    Finish<float, T> finish{linear, reinterpret_cast<T*>(linear.y) + row * linear.columns, row, nullptr};
    multiply_chunk<Dot>({reinterpret_cast<const char*>(x), bytes, bytes}, row, count, linear.panels, linear.columns, 0,
                        num_panels, finish);
  });
}

void patch_forward(const PatchArgs& args) {
  const bool bytes = args.pixels_type == Type::u8;
  if (args.linear.y_type == Type::f32) {
    if (bytes) embed<DotF32, float, uint8_t, ByteValues<float>>(args);
    else embed<DotF32, float, float, FloatValues<float>>(args);
  } else {
    if (bytes) embed<DotBf16, bf16, uint8_t, ByteValues<bf16>>(args);
    else embed<DotBf16, bf16, float, FloatValues<bf16>>(args);
  }
}

}  // namespace

extern const PatchKernels patch_kernels = {patch_forward};

}  // namespace MISS_ISA
}  // namespace miss
