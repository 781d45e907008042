#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>

namespace miss {

namespace {

constexpr size_t HUGE = size_t{2} << 20;
constexpr size_t BLOCK = size_t{32} << 20;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

std::shared_ptr<void> allocate(size_t bytes) {
  void* data = std::aligned_alloc(HUGE, bytes);
  if (data == nullptr) throw std::bad_alloc();
  madvise(data, bytes, MADV_HUGEPAGE);  // where the system has none, ordinary pages serve
  return {data, std::free};
}

}  // namespace

Kept keep(size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<void> last;  // the block that is being filled
  static size_t used = 0, size = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  bytes = round_up(bytes, 64);
  std::shared_ptr<void> block = last.lock();
  if (block == nullptr || used + bytes > size) {
    size = round_up(bytes > BLOCK ? bytes : BLOCK, HUGE);
    block = allocate(size);
    last = block;
    used = 0;
  }
  void* data = static_cast<char*>(block.get()) + used;
  used += bytes;
  return {data, block};
}

}  // namespace miss
