// The Python module miss.kernels._C: what is no tensor operation. Loading it registers the operations of miss_cpu too.
// Only kernels/extension.py imports it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "cpu/decoder_runner.h"
#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels' feature report, and the decode runner.";
  m.def("isa", [] { return std::string(miss::name_of(miss::isa())); }, "The instruction set in use; ValueError where none is.");
  m.def("built", [] {
    std::vector<std::string> names;
    for (miss::Isa one : miss::known_isas()) names.emplace_back(miss::name_of(one));
    return names;
  }, "The instruction sets that there are kernels for, the plainest first.");
  m.def("supported", [] {
    std::vector<std::string> names;
    for (miss::Isa one : miss::known_isas())
      if (miss::supported(one)) names.emplace_back(miss::name_of(one));
    return names;
  }, "Those of them that this processor has.");
  m.def("processor", &miss::processor, "The processor's name for itself.");
  m.def("features", &miss::features, "The instruction sets of interest that the processor reports.");
  using miss::DecoderRunner;
  pybind11::class_<DecoderRunner>(m, "DecoderRunner", "Decode steps of one decoder; addresses are those of tensors that the caller keeps.")
      .def(pybind11::init<bool, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t,
                          const DecoderRunner::Norm&, const std::vector<DecoderRunner::Layer>&,
                          const DecoderRunner::Matrix&, const DecoderRunner::Norm&, const DecoderRunner::Matrix&>())
      .def("step", &DecoderRunner::step, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("trim", [] {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
  }, "Gives freed memory back to the system, where the C library can.");
}
