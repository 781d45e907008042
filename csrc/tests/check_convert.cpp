#include "check.h"
#include "cpu/convert.h"

MISS_CHECK(convert) {
  for (int64_t count : {0, 1, 7, 8, 15, 16, 17, 33, 1025}) {
    check::Buffer<float> wide(count), back(count);
    check::Buffer<miss::bf16> narrow(count);
    check::randomise(wide);
    miss::convert_kernels().narrow(wide.data(), narrow.data(), count);
    miss::convert_kernels().widen(narrow.data(), back.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      miss::bf16 wanted;
      miss::convert(wide[i], wanted);
      check::near(narrow[i].bits, wanted.bits, 0, "narrow");
      check::near(back[i], check::number(wanted), 0, "widen");
    }
  }
}
