#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <new>

namespace miss {

void parallel_ranges(int64_t count, int64_t grain, RangeBody body, void* state) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, state); });
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* scratch(int slot, size_t bytes) {
  thread_local Buffer buffers[8];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.size);
    if (buffer.data == nullptr) {
      buffer.size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

}  // namespace miss
