#include "check.h"
#include "cpu/ceilings.h"

MISS_CHECK(ceilings) {
  const miss::CeilingKernels& kernels = miss::ceiling_kernels();
  check::expect(kernels.fp32(3) > 0 && kernels.bf16(3) > 0 && kernels.int8(3) > 0, "operations are counted");
  for (int64_t count : {0, 1024, 5 * 1024}) {
    // Streaming stores want their own alignment: the benchmarks' tensors have it, these whole pages too.
    check::Buffer<float> from(count + 1024), to(count + 1024);
    check::randomise(from);
    check::randomise(to);
    kernels.read(from.data(), count);
    if (reinterpret_cast<uintptr_t>(to.data()) % 64 != 0) continue;
    kernels.copy(from.data(), to.data(), count);
    for (int64_t i = 0; i < count; ++i) check::near(to[i], from[i], 0, "copy");
  }
}
