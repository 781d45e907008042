// The ceilings' loops. Included by the file of each instruction set.
#include "ceilings.h"

namespace miss {
namespace MISS_ISA {
namespace {

volatile float float_sink;
constexpr int CHAINS = REGISTERS == 32 ? 24 : 12;  // independent sums: enough to hide the latency

template <class Dot>
double dots(int64_t turns) {
  int threads = num_threads();
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      typename Dot::Acc acc[CHAINS];
      // Unrolled everywhere: one loop over `acc` that is not, and the compiler keeps all of it in memory.
#pragma GCC unroll 24
      for (int i = 0; i < CHAINS; ++i) {
        acc[i] = Dot::none();
        asm volatile("" : "+v"(acc[i]));  // else all chains are one
      }
      vi a = zeroi(), b = zeroi();
      for (int64_t turn = 0; turn < turns; ++turn) {
        asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 24
        for (int i = 0; i < CHAINS; ++i) acc[i] = Dot::multiply(a, b, acc[i]);
      }
#pragma GCC unroll 24
      for (int i = 0; i < CHAINS; ++i) asm volatile("" ::"v"(acc[i]));
    }
  });
  return 2.0 * Dot::GROUP * LANES * CHAINS * static_cast<double>(turns) * threads;
}

void read(const float* p, int64_t count) {
  parallel(count / 1024, 1, [&](int64_t begin, int64_t end) {
    vf acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) acc[i] = zero();
    for (const float *at = p + begin * 1024, *stop = p + end * 1024; at < stop; at += 8 * LANES) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) acc[i] = add(acc[i], load(at + i * LANES));
    }
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) acc[0] = add(acc[0], acc[i]);
    float_sink = sum(acc[0]);
  });
}

void copy(const float* from, float* to, int64_t count) {
  parallel(count / 1024, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * 1024; i < end * 1024; i += LANES) {
#if defined(__AVX512F__)
      _mm512_stream_ps(to + i, load(from + i));
#else
      _mm256_stream_ps(to + i, load(from + i));
#endif
    }
    _mm_sfence();
  });
}

}  // namespace

extern const CeilingKernels ceiling_kernels = {dots<DotF32>, dots<DotBf16>, dots<DotU8S8>, read, copy};

}  // namespace MISS_ISA
}  // namespace miss
