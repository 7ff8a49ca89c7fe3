// Python face of one CPU engine build (one per ISA level).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/engine.h"
#include "cpu/registry.h"
#include "cpu/stream.h"
#include "python/names.h"

namespace py = pybind11;

namespace fusedopt::cpu {
namespace {

py::list describe_kernels() {
  py::list out;
  for (const Kernel& k : kernels()) {
    py::dict d = describe(k.names);
    d["kernel"] = py::capsule(&k, "fusedopt.kernel");
    out.append(d);
  }
  return out;
}

float stream_from_python(const std::vector<std::size_t>& addresses, int measured, std::int64_t n, int threads) {
  std::vector<float*> streams;
  for (const std::size_t address : addresses) streams.push_back(reinterpret_cast<float*>(address));
  if (streams.size() < 2 || measured < 0 || measured > static_cast<int>(streams.size())) {
    throw py::value_error("streams are two or more, and no others are measured");
  }
  py::gil_scoped_release release;
  return stream(streams.data(), static_cast<int>(streams.size()), measured, n, threads);
}

}  // namespace
}  // namespace fusedopt::cpu

PYBIND11_MODULE(FUSEDOPT_MODULE, m) {
  using namespace fusedopt::cpu;
  m.def("kernels", &describe_kernels,
        "Kernels in this build: rule, states, scalars, hyper, coefficients, step_scale, kernel capsule.");
  m.def("stream", &stream_from_python, py::arg("streams"), py::arg("measured"), py::arg("n"), py::arg("threads"),
        "Read the first `measured` streams of n floats at the given addresses, then update all but the second, as a "
        "step would: the bandwidth limit.");
  m.attr("run") = py::capsule(reinterpret_cast<void*>(&run), "fusedopt.cpu.run");
}
