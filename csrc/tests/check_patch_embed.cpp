// Pixels, normalised and cut into patches, times a weight.
#include <math.h>

#include "cpu/patch_embed.h"
#include "pack.h"

using check::Buffer;
using check::number;
using check::randomise;

template <class Pixel, class T>
static void patch_embed(int64_t images, int64_t rows, int64_t columns, int64_t size, int64_t width, double tolerance) {
  const int64_t k = 3 * size * size, patches = images * rows * columns;
  Buffer<Pixel> pixels(patches * k);
  Buffer<T> weight(width * k), bias(width), y(patches * width), panels(check::panel_count<T>(width, k));
  Buffer<float> scale(3), shift(3);
  randomise(pixels);
  randomise(weight);
  randomise(bias);
  for (int c = 0; c < 3; ++c) {
    scale[c] = (sizeof(Pixel) == 1 ? 0.004f : 0.5f) * static_cast<float>(c + 1);
    shift[c] = -0.1f * static_cast<float>(c);
  }
  check::pack(weight, width, k, false, panels, nullptr);
  miss::PatchArgs args = {};
  args.pixels = pixels.chars();
  args.pixels_type = check::type_of<Pixel>();
  args.images = images;
  args.rows = rows;
  args.columns = columns;
  args.size = size;
  args.scale = scale.data();
  args.shift = shift.data();
  args.linear.rows = patches;
  args.linear.columns = width;
  args.linear.k = k;
  args.linear.y_type = args.linear.bias_type = check::type_of<T>();
  args.linear.panels = panels.chars();
  args.linear.bias = bias.chars();
  args.linear.y = y.chars();
  miss::patch_kernels().forward(args);
  for (int64_t p = 0; p < patches; ++p)
    for (int64_t w = 0; w < width; ++w) {
      double wanted = number(bias[w]), total = 1;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t c = i / (size * size), line = i / size % size, column = i % size;
        const int64_t at = ((p / columns * size + line) * columns * size + p % columns * size + column) * 3 + c;
        const double term = (number(pixels[at]) * double{scale[c]} + shift[c]) * number(weight[w * k + i]);
        wanted += term;
        total += fabs(term);
      }
      check::near(number(y[p * width + w]), wanted, tolerance * total, "patch_embed");
    }
}

MISS_CHECK(patch_embed) {
  for (int64_t images : {0, 1, 3})
    for (int64_t size : {1, 3, 7}) {
      patch_embed<uint8_t, float>(images, 2, 5, size, 67, 1e-5);
      patch_embed<uint8_t, miss::bf16>(images, 2, 5, size, 67, 8e-3);
      patch_embed<float, float>(images, 3, 1, size, 64, 1e-5);
      patch_embed<float, miss::bf16>(images, 3, 1, size, 1, 8e-3);
    }
}
