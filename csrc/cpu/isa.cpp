#include "isa.h"

#include <cpuid.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace miss {

const std::vector<Isa>& known_isas() {
  static const std::vector<Isa> all = {Isa::avx2, Isa::avx512f, Isa::avx512_vnni, Isa::avx512_bf16};
  return all;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512f: return "avx512f";
    case Isa::avx512_vnni: return "avx512_vnni";
    default: return "avx512_bf16";
  }
}

// __builtin_cpu_supports asks the operating system too whether it saves the wide registers.
bool supported(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512f:
      return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_vnni:
      return supported(Isa::avx512f) && __builtin_cpu_supports("avx512vnni");
    default:
      return supported(Isa::avx512_vnni) && __builtin_cpu_supports("avx512bf16");
  }
}

namespace {

Isa choose() {
  std::string here;
  const Isa* best = nullptr;
  for (const Isa& one : known_isas()) {
    if (!supported(one)) continue;
    best = &one;
    here += (here.empty() ? "" : ", ") + std::string(name_of(one));
  }
  if (best == nullptr) throw std::invalid_argument("this processor has none of avx2, avx512f, avx512_vnni, avx512_bf16");
  const char* asked = std::getenv("MISS_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return *best;
  for (const Isa& one : known_isas())
    if (supported(one) && std::strcmp(asked, name_of(one)) == 0) return one;
  throw std::invalid_argument("MISS_CPU_ISA: got \"" + std::string(asked) + "\"; this processor has " + here);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

std::string processor() {
  unsigned words[12];
  for (unsigned i = 0; i < 3; ++i)
    if (!__get_cpuid(0x80000002u + i, words + 4 * i, words + 4 * i + 1, words + 4 * i + 2, words + 4 * i + 3)) return "";
  char text[49] = {};
  std::memcpy(text, words, 48);
  std::string name(text);
  while (!name.empty() && name.back() == ' ') name.pop_back();
  return name;
}

std::vector<std::string> features() {
  std::vector<std::string> found;
#define MISS_FEATURE(name) \
  if (__builtin_cpu_supports(#name)) found.push_back(#name)
  MISS_FEATURE(avx);
  MISS_FEATURE(avx2);
  MISS_FEATURE(fma);
  MISS_FEATURE(f16c);
  MISS_FEATURE(avx512f);
  MISS_FEATURE(avx512bw);
  MISS_FEATURE(avx512dq);
  MISS_FEATURE(avx512vl);
  MISS_FEATURE(avx512vbmi);
  MISS_FEATURE(avx512vnni);
  MISS_FEATURE(avx512bf16);
#undef MISS_FEATURE
  return found;
}

}  // namespace miss
