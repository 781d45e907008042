// The benchmarks' ceilings as functions of PyTorch tensors.
#include "ceilings.h"
#include "torch_abi.h"

namespace miss {

static double ceiling_rate(std::string kind, int64_t turns) {
  const CeilingKernels& kernels = ceiling_kernels();
  if (kind == "fp32") return kernels.fp32(turns);
  if (kind == "bf16") return kernels.bf16(turns);
  STD_TORCH_CHECK(kind == "int8", "kind: got ", kind, "; accepted: fp32, bf16, int8");
  return kernels.int8(turns);
}

static void ceiling_read(const Tensor& from) { ceiling_kernels().read(from.const_data_ptr<float>(), from.numel()); }

static void ceiling_copy(const Tensor& from, const Tensor& to) {
  ceiling_kernels().copy(from.const_data_ptr<float>(), to.mutable_data_ptr<float>(), to.numel());
}

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def("ceiling_rate(str kind, int turns) -> float");
  m.def("ceiling_read(Tensor source) -> ()");
  m.def("ceiling_copy(Tensor source, Tensor(a!) target) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CompositeExplicitAutograd, m) {
  m.impl("ceiling_rate", TORCH_BOX(&ceiling_rate));
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("ceiling_read", TORCH_BOX(&ceiling_read));
  m.impl("ceiling_copy", TORCH_BOX(&ceiling_copy));
}

}  // namespace miss
