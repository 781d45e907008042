// The probes as functions of PyTorch tensors: for tests/kernels/test_vectors.py, nothing else calls them.
#include "probe.h"
#include "torch_abi.h"

namespace miss {

namespace {

Function function_of(const std::string& name) {
  if (name == "exp") return Function::exp;
  if (name == "normal_cdf") return Function::normal_cdf;
  if (name == "gelu") return Function::gelu;
  if (name == "gelu_slope") return Function::gelu_slope;
  if (name == "power_of_two") return Function::power_of_two;
  if (name == "round") return Function::round;
  if (name == "sum") return Function::sum;
  if (name == "max_of") return Function::max_of;
  STD_TORCH_CHECK(name == "min_of", "miss_cpu::probe: no function named ", name);
  return Function::min_of;
}

// x contiguous, of any alignment. to_bf16 and to_bytes: of float32; to_float: of any type; else float32 to float32.
Tensor probe(std::string function, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "miss_cpu::probe: wants a contiguous tensor");
  const ProbeKernels& kernels = probe_kernels();
  auto make = [&](ScalarType dtype) { return torch::stable::empty({x.numel()}, dtype); };
  if (function == "to_float") {
    Tensor y = make(ScalarType::Float);
    kernels.to_float(bytes_of(x), type_of(x), y.mutable_data_ptr<float>(), x.numel());
    return y;
  }
  STD_TORCH_CHECK(type_of(x) == Type::f32, "miss_cpu::probe: ", function, " wants float32");
  const float* from = x.const_data_ptr<float>();
  if (function == "to_bf16") {
    Tensor y = make(ScalarType::BFloat16);
    kernels.to_bf16(from, reinterpret_cast<bf16*>(bytes_to(y)), x.numel());
    return y;
  }
  if (function == "to_bytes") {
    Tensor y = make(ScalarType::Byte);
    kernels.to_bytes(from, reinterpret_cast<uint8_t*>(bytes_to(y)), x.numel());
    return y;
  }
  Tensor y = make(ScalarType::Float);
  kernels.apply(function_of(function), from, y.mutable_data_ptr<float>(), x.numel());
  return y;
}

// a (1 to 6, K), rows of any stride, times a panel (ceil(K / group), 64, group): into sums (rows, 64), or added to them.
void probe_product(const Tensor& a, const Tensor& panel, const Tensor& sums, bool fresh, int64_t columns) {
  STD_TORCH_CHECK(a.dim() == 2 && a.size(0) >= 1 && a.size(0) <= 6 && a.stride(1) == 1 && sums.is_contiguous() &&
                      panel.is_contiguous() && sums.size(0) == a.size(0) && sums.size(1) == 64,
                  "miss_cpu::probe_product: shapes");
  Type type = type_of(a);
  int64_t size = type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1;
  STD_TORCH_CHECK(panel.numel() * size >= (a.size(1) * size + 3) / 4 * 256, "miss_cpu::probe_product: a short panel");
  probe_kernels().product(type, static_cast<int>(a.size(0)), bytes_of(a), a.stride(0) * size, a.size(1) * size,
                          bytes_of(panel), bytes_to(sums), fresh, static_cast<int>(columns));
}

int64_t lanes() { return probe_kernels().lanes; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def("probe(str function, Tensor x) -> Tensor");
  m.def("probe_product(Tensor a, Tensor panel, Tensor(a!) sums, bool fresh, int columns) -> ()");
  m.def("probe_lanes() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CompositeExplicitAutograd, m) { m.impl("probe_lanes", TORCH_BOX(&lanes)); }

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("probe", TORCH_BOX(&probe));
  m.impl("probe_product", TORCH_BOX(&probe_product));
}

}  // namespace miss
