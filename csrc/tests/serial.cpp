// parallel.h without PyTorch: the ranges that THREADS threads would have had, one after the other, and scratch memory of
// exactly the size that is asked for.
#include <stdlib.h>

#include "cpu/parallel.h"

namespace miss {

constexpr int THREADS = 3;

void parallel_ranges(int64_t count, int64_t grain, RangeBody body, void* state) {
  int64_t size = (count + THREADS - 1) / THREADS;
  if (size < grain) size = grain;
  if (size < 1) size = 1;
  for (int64_t begin = 0; begin < count; begin += size) body(begin, begin + size < count ? begin + size : count, state);
}

int num_threads() { return THREADS; }

void* scratch(int slot, size_t bytes) {
  thread_local void* slots[8];
  free(slots[slot]);
  if (posix_memalign(&slots[slot], 64, bytes > 0 ? bytes : 1) != 0) abort();
  return slots[slot];
}

}  // namespace miss
