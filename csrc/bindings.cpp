// The Python module miss.kernels._C: what is no tensor operation. Loading it registers the operations of miss_cpu too.
// Only kernels/extension.py imports it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels' feature report.";
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
}
