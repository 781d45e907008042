// Numbers from one type to another. Included by the file of each instruction set.
#include "convert.h"

namespace miss {
namespace MISS_ISA {
namespace {

template <class From, class To>
void convert_row(const From* from, To* to, int64_t count) {
  spans(count, [&](int64_t i, auto span) { put(to + i, get(from + i, span), span); });
}

}  // namespace

extern const ConvertKernels convert_kernels = {convert_row<bf16, float>, convert_row<float, bf16>};

}  // namespace MISS_ISA
}  // namespace miss
