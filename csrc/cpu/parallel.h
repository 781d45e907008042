// PyTorch's own thread pool for the kernels, and scratch memory of a thread.
// Knows ranges and threads; does not know what runs in them. Includes no standard header: the files of an instruction
// set include this one, and an inline function of a standard header that they instantiate could be the one that the
// linker keeps for everybody, with instructions that not every processor has.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace miss {

using RangeBody = void (*)(int64_t begin, int64_t end, void* state);

// Calls body over [0, count) in as many contiguous ranges as there are threads, at most one for `grain` items each.
void parallel_ranges(int64_t count, int64_t grain, RangeBody body, void* state);
int num_threads();

// At least `bytes` of this thread's own memory, aligned to 64 bytes; `slot` (0 to 7) tells apart what one kernel holds
// at the same time. Grows and stays: valid until the same slot is asked again on the same thread.
void* scratch(int slot, size_t bytes);

namespace {  // a copy an instruction set

template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  parallel_ranges(
      count, grain, [](int64_t begin, int64_t end, void* state) { (*static_cast<const Body*>(state))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <class T>
T* scratch_of(int slot, int64_t count) {
  return static_cast<T*>(scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace
}  // namespace miss
