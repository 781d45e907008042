// Which instruction sets this library has kernels for, which this processor has, and which one is used.
// Knows cpuid and MISS_CPU_ISA; does not know what the kernels compute.
#pragma once

#include <string>
#include <vector>

namespace miss {

// From the plainest to the most capable; each needs all that stand before it.
enum class Isa { avx2, avx512f, avx512_vnni, avx512_bf16 };

const std::vector<Isa>& known_isas();
const char* name_of(Isa isa);
bool supported(Isa isa);

// What runs: MISS_CPU_ISA where it is set, else the best that is supported. Read once.
// Throws std::invalid_argument where MISS_CPU_ISA is no instruction set that this processor has, or none is supported.
Isa isa();

// The processor's own name for itself, and the instruction sets of interest that cpuid reports.
std::string processor();
std::vector<std::string> features();

}  // namespace miss

// Declares an operation's table of kernels in the namespace of each instruction set, and a function of the table's name
// that returns the one in use:   MISS_TABLE(LinearKernels, linear_kernels)   ->   linear_kernels().forward(...)
#ifdef MISS_ONE_ISA  // csrc/tests: a program for one instruction set alone
#define MISS_TABLE(Table, name)                                 \
  namespace MISS_ONE_ISA { extern const Table name; }           \
  inline const Table& name() { return MISS_ONE_ISA::name; }
#else
#define MISS_TABLE(Table, name)                                  \
  namespace avx2 { extern const Table name; }                    \
  namespace avx512f { extern const Table name; }                 \
  namespace avx512_vnni { extern const Table name; }             \
  namespace avx512_bf16 { extern const Table name; }             \
  inline const Table& name() {                                   \
    switch (isa()) {                                             \
      case Isa::avx2: return avx2::name;                         \
      case Isa::avx512f: return avx512f::name;                   \
      case Isa::avx512_vnni: return avx512_vnni::name;           \
      default: return avx512_bf16::name;                         \
    }                                                            \
  }
#endif
