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

void stream_from_python(const std::vector<std::size_t>& updated, const std::vector<std::size_t>& read, std::int64_t n,
                        int threads) {
  std::vector<float*> u;
  std::vector<const float*> r;
  for (const std::size_t a : updated) u.push_back(reinterpret_cast<float*>(a));
  for (const std::size_t a : read) r.push_back(reinterpret_cast<const float*>(a));
  py::gil_scoped_release release;
  stream(u.data(), static_cast<int>(u.size()), r.data(), static_cast<int>(r.size()), n, threads);
}

}  // namespace
}  // namespace fusedopt::cpu

PYBIND11_MODULE(FUSEDOPT_MODULE, m) {
  using namespace fusedopt::cpu;
  m.def("kernels", &describe_kernels,
        "Kernels in this build: rule, states, scalars, hyper, coefficients, step_scale, kernel capsule.");
  m.def("stream", &stream_from_python, py::arg("updated"), py::arg("read"), py::arg("n"), py::arg("threads"),
        "Touch streams of n floats at the given addresses, as the engine would: the bandwidth limit.");
  m.attr("run") = py::capsule(reinterpret_cast<void*>(&run), "fusedopt.cpu.run");
}
