// Memory for what is packed once and read many times: in huge pages, side by side.
// Knows bytes; does not know tensors.
//
// Two threads read ordinary pages of 4 KB at 23 GB/s here and pages of 2 MB at 34: a product of one row is bound by that.
#pragma once

#include <cstddef>
#include <memory>

namespace miss {

struct Kept {
  void* data;
  std::shared_ptr<void> owner;  // holds the block that `data` lies in
};

// `bytes`, aligned to 64, from blocks of at least 32 MB that are given back once nothing in them is held any more.
Kept keep(size_t bytes);

}  // namespace miss
