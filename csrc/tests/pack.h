// Weights laid out as panels, for the checks of everything that multiplies with them.
#pragma once

#include "check.h"
#include "cpu/linear.h"

namespace check {

inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// How many elements the panels of a (columns, k) weight have.
template <class W>
int64_t panel_count(int64_t columns, int64_t k) {
  const int64_t group = 4 / static_cast<int64_t>(sizeof(W));
  return blocks(columns, 64) * 64 * blocks(k, group) * group;
}

// weight (columns, k), or (k, columns) where transposed. offset: of int8, else nullptr.
template <class W>
void pack(Buffer<W>& weight, int64_t columns, int64_t k, bool transposed, Buffer<W>& panels, int32_t* offset) {
  miss::PackArgs args = {};
  args.from = weight.chars();
  args.from_type = args.to_type = type_of<W>();
  args.rows = columns;
  args.k = k;
  args.row_stride = transposed ? 1 : k;
  args.k_stride = transposed ? columns : 1;
  args.panels = panels.chars();
  args.offset = offset;
  miss::linear_kernels().pack(args);
}

}  // namespace check
