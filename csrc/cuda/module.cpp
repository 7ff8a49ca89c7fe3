// fusedopt._cuda: the Python face of the CUDA engine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/names.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace fusedopt::cuda;
using fusedopt::names;

namespace {

py::list describe_kernels() {
  py::list out;
  for (const Entry& entry : entries()) {
    py::dict d;
    py::list variants;
    for (const Variant& variant : entry.variants) variants.append(names(variant.states, variant.n_states));
    d["rule"] = entry.rule;
    d["variants"] = variants;
    d["scalars"] = names(entry.scalars, entry.n_scalars);
    d["hyper"] = names(entry.hyper, entry.n_hyper);
    out.append(d);
  }
  return out;
}

template <class T>
T* pointer(const py::dict& addresses, const char* name) {
  return reinterpret_cast<T*>(addresses[name].cast<std::uintptr_t>());
}

Launcher make_launcher(const Choice& choice, const py::dict& addresses,
                       const std::vector<std::tuple<bool, std::vector<std::string>, std::vector<std::string>>>& kinds,
                       int device, int blocks, int rows, int width, int max_states, int words) {
  Tables t{};
  t.rows = pointer<const std::int64_t>(addresses, "rows");
  t.tiles = pointer<const std::int64_t>(addresses, "tiles");
  t.shares = pointer<const std::int64_t>(addresses, "shares");
  t.layouts = pointer<const std::int64_t>(addresses, "layouts");
  t.live = pointer<const std::int64_t>(addresses, "live");
  t.partials = pointer<double>(addresses, "partials");
  t.verdict = pointer<double>(addresses, "verdict");
  t.counters = pointer<int>(addresses, "counters");
  t.n_rows = rows;
  t.width = width;
  t.max_states = max_states;
  std::vector<KindNames> named;
  for (const auto& [strided, types, states] : kinds) named.push_back({strided, types, states});
  return Launcher(choice, t, named, device, blocks, words);
}

void run(Launcher& launcher, std::uintptr_t words, std::uintptr_t stream, bool measure, bool update,
         std::uintptr_t grad_scale, std::uintptr_t found_inf) {
  const py::gil_scoped_release release;
  launcher.run(reinterpret_cast<const std::int64_t*>(words), stream, measure, update, grad_scale, found_inf);
}

}  // namespace

PYBIND11_MODULE(FUSEDOPT_MODULE, m) {
  m.def("kernels", &describe_kernels, "Kernels in this build: rule, variants (lists of states), scalars, hyper.");
  m.def("no_device", &no_device, "Why there is no GPU to use; empty if there is one.");
  m.def("has_code_for", &has_code_for, py::arg("device"), "Whether this build has code for a GPU.");
  m.def("words_by_value", &words_by_value, py::arg("device"), "How long a live table may be to go by value.");
  m.attr("tile") = kTile;
  m.attr("device_type") = "cuda";
  py::class_<Choice>(m, "Choice")
      .def(py::init<const std::string&, const std::vector<std::vector<std::string>>&>(), py::arg("rule"),
           py::arg("states"))
      .def("blocks", &Choice::blocks, py::arg("device"), "How many blocks a device holds at once.");
  py::class_<Launcher>(m, "Launcher")
      .def(py::init(&make_launcher), py::arg("choice"), py::arg("addresses"), py::arg("kinds"), py::arg("device"),
           py::arg("blocks"), py::arg("rows"), py::arg("width"), py::arg("max_states"), py::arg("words"))
      .def("run", &run, py::arg("words"), py::arg("stream"), py::arg("measure"), py::arg("update"),
           py::arg("grad_scale"), py::arg("found_inf"));
}
