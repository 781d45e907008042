// Runs the checks (all, or those named) of the kernels of one instruction set, MISS_ONE_ISA, without PyTorch.
// Exit code 0: all held; 1: some did not; 77: this processor does not have the instruction set.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#include "check.h"
#include "cpu/isa.h"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

namespace check {

Place place = Place::heap;

namespace {

struct Named {
  const char* name;
  void (*run)();
};
std::vector<Named>& all() {
  static std::vector<Named> checks;
  return checks;
}

int64_t failures = 0;
constexpr int64_t SHOWN = 20;

size_t pages_of(size_t bytes) {
  size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

void* take(size_t bytes) {
  if (bytes == 0) return nullptr;  // as an empty tensor's
  if (place == Place::heap) return malloc(bytes);
  size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = pages_of(bytes);
  void* start = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(static_cast<char*>(start) + whole, page, PROT_NONE) != 0) abort();
  return static_cast<char*>(start) + whole - bytes;
}

void give_back(void* memory, size_t bytes, Place from) {
  if (from == Place::heap || bytes == 0) return free(memory);
  size_t whole = pages_of(bytes);
  munmap(static_cast<char*>(memory) + bytes - whole, whole + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
}

uint32_t random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

void near(double got, double wanted, double tolerance, const char* what) {
  double error = got - wanted;
  if (error <= tolerance && -error <= tolerance) return;
  if (++failures <= SHOWN) printf("  %s: got %.9g, wanted %.9g within %.3g\n", what, got, wanted, tolerance);
}

void expect(bool holds, const char* what) {
  if (!holds && ++failures <= SHOWN) printf("  %s\n", what);
}

Check::Check(const char* name, void (*run)()) { all().push_back({name, run}); }

}  // namespace check

int main(int count, char** names) {
  for (miss::Isa one : miss::known_isas())
    if (strcmp(miss::name_of(one), TEXT(MISS_ONE_ISA)) == 0 && !miss::supported(one)) return 77;
  int ran = 0;
  for (const auto& one : check::all()) {
    bool asked = count == 1;
    for (int i = 1; i < count; ++i) asked = asked || strcmp(names[i], one.name) == 0;
    if (!asked) continue;
    for (check::Place place : {check::Place::heap, check::Place::guarded}) {
      check::place = place;
      printf("%s %s %s\n", TEXT(MISS_ONE_ISA), one.name, place == check::Place::heap ? "heap" : "guarded");
      fflush(stdout);
      one.run();
    }
    ++ran;
  }
  if (check::failures > 0) printf("%lld comparisons failed\n", static_cast<long long>(check::failures));
  return check::failures > 0 || ran == 0 ? 1 : 0;
}
