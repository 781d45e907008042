// Patch embedding as a function of PyTorch tensors.
#include "patch_embed.h"
#include "torch_abi.h"

namespace miss {

namespace {

// y (B, N, C) in the panels' dtype, of pixels (B, height, width, 3) and the panels of a weight (C, 3 * P * P).
Tensor patch_embed(const Tensor& pixels, const Tensor& panels, const Tensor& bias, const Tensor& scale,
                   const Tensor& shift, int64_t size) {
  PatchArgs args{};
  args.pixels = bytes_of(pixels);
  args.pixels_type = type_of(pixels);
  STD_TORCH_CHECK(pixels.dim() == 4 && pixels.size(3) == 3 && pixels.is_contiguous() &&
                      (args.pixels_type == Type::u8 || args.pixels_type == Type::f32),
                  "patch_embed: pixels are not contiguous uint8 or float32 (B, height, width, 3)");
  args.images = pixels.size(0);
  args.rows = pixels.size(1) / size;
  args.columns = pixels.size(2) / size;
  args.size = size;
  STD_TORCH_CHECK(args.rows * size == pixels.size(1) && args.columns * size == pixels.size(2),
                  "patch_embed: the pixels do not divide into patches");
  args.scale = scale.const_data_ptr<float>();
  args.shift = shift.const_data_ptr<float>();
  STD_TORCH_CHECK(scale.numel() == 3 && shift.numel() == 3 && scale.is_contiguous() && shift.is_contiguous(),
                  "patch_embed: scale and shift are not (3,)");
  LinearArgs& linear = args.linear;
  linear.rows = args.images * args.rows * args.columns;
  linear.columns = bias.numel();
  linear.k = 3 * size * size;
  linear.y_type = type_of(panels);
  linear.bias_type = type_of(bias);
  linear.bias = bytes_of(bias);
  linear.panels = bytes_of(panels);
  const int64_t group = linear.y_type == Type::f32 ? 1 : 2;
  STD_TORCH_CHECK((linear.y_type == Type::f32 || linear.y_type == Type::bf16) && bias.is_contiguous() &&
                      (linear.bias_type == Type::f32 || linear.bias_type == Type::bf16) && panels.dim() == 4 &&
                      panels.size(0) == (linear.columns + 63) / 64 && panels.size(1) == (linear.k + group - 1) / group,
                  "patch_embed: panels and bias are not those of one weight");
  const int64_t sizes[3] = {args.images, args.rows * args.columns, linear.columns};
  Tensor y = allocate(sizes, 3, panels.scalar_type());
  linear.y = bytes_to(y);
  patch_kernels().forward(args);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def("patch_embed(Tensor pixels, Tensor panels, Tensor bias, Tensor scale, Tensor shift, int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) { m.impl("patch_embed", TORCH_BOX(&patch_embed)); }

}  // namespace miss
