#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>

namespace miss {

namespace {

constexpr size_t HUGE = size_t{2} << 20;
constexpr size_t BLOCK = size_t{32} << 20;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Straight from the system: malloc may hand out memory that was in use before, whose small pages stay small whatever is
// advised (all of an int8 base model's weights lay in such, and were read at half the speed).
std::shared_ptr<void> allocate(size_t bytes) {
  void* data = mmap(nullptr, bytes + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  char* start = static_cast<char*>(data);
  char* first = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(start), HUGE));
  if (first > start) munmap(start, static_cast<size_t>(first - start));
  if (start + HUGE > first) munmap(first + bytes, static_cast<size_t>(start + HUGE - first));
  madvise(first, bytes, MADV_HUGEPAGE);  // where the system has none, ordinary pages serve
  return {first, [bytes](void* p) { munmap(p, bytes); }};
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
