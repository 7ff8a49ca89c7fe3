// fusedopt._cuda: the Python face of the CUDA engine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.h"
#include "python/names.h"

namespace py = pybind11;
using namespace fusedopt::cuda;
using fusedopt::names;

namespace {

py::list describe_kernels() {
  py::list out;
  for (const Entry& entry : entries()) {
    py::dict d = fusedopt::describe(entry.names());
    py::list variants;
    for (const fusedopt::RuleNames& variant : entry.variants) variants.append(names(variant.states));
    d["variants"] = variants;
    out.append(d);
  }
  return out;
}

using SignatureTuple = std::tuple<bool, std::vector<std::string>, std::vector<std::string>, std::string, bool, bool>;

std::vector<std::uint32_t> encode(const KernelSelection& selection, const std::vector<SignatureTuple>& signatures,
                                  int n_states) {
  std::vector<SignatureNames> named;
  for (const auto& [is_strided, codecs, states, average, draws, is_padded] : signatures) {
    named.push_back({is_strided, codecs, states, average, draws, is_padded});
  }
  return selection.encode(named, n_states);
}

template <class T>
T* pointer(const py::dict& addresses, const char* name) {
  return reinterpret_cast<T*>(addresses[name].cast<std::uintptr_t>());
}

Launcher make_launcher(const KernelSelection& selection, const py::dict& addresses, const py::dict& counts, int device,
                       int blocks, int words) {
  const auto count = [&](const char* name) { return counts[name].cast<int>(); };
  Tables t{};
  t.rows = pointer<const std::int64_t>(addresses, "rows");
  t.tiles = pointer<const std::int64_t>(addresses, "tiles");
  t.shares = pointer<const std::int64_t>(addresses, "shares");
  t.borders = pointer<const std::int64_t>(addresses, "borders");
  t.layouts = pointer<const std::int64_t>(addresses, "layouts");
  t.signatures = pointer<const std::uint32_t>(addresses, "signatures");
  t.step_table = pointer<const std::int64_t>(addresses, "step_table");
  t.partials = pointer<double>(addresses, "partials");
  t.numbers = pointer<double>(addresses, "numbers");
  t.counts = pointer<int>(addresses, "counts");
  t.n_rows = count("rows");
  t.n_shares = count("shares");
  t.n_borders = count("borders");
  t.width = count("width");
  t.n_states = count("states");
  t.n_options = count("options");
  t.sums.row_sums = pointer<const std::int64_t>(addresses, "row_sums");
  t.sums.slots = pointer<double>(addresses, "slots");
  t.sums.epilogue_slots = pointer<double>(addresses, "epilogue_slots");
  t.sums.segments = pointer<double>(addresses, "segments");
  t.sums.wholes = pointer<double>(addresses, "wholes");
  t.sums.largest = pointer<double>(addresses, "largest");
  t.sums.epilogue = pointer<double>(addresses, "epilogue");
  t.sums.n_segments = count("segments");
  t.sums.n_scopes = count("scopes");
  t.sums.shared = count("shared");
  t.sums.has_scopes = count("has_scopes");
  t.sums.in_channels = count("in_channels");
  return Launcher(selection, t, device, blocks, words);
}

py::dict layout() {
  py::dict d;
  d["RowWord"] = names(fusedopt::row_words);
  d["StepWord"] = names(fusedopt::step_words);
  d["GroupFlag"] = names(fusedopt::group_flags);
  d["OptionNumber"] = names(fusedopt::option_numbers);
  d["StatusNumber"] = names(fusedopt::status_numbers);
  d["StatusCount"] = names(fusedopt::status_counts);
  d["SumsWord"] = names(fusedopt::sums_words);
  d["Pass"] = names(fusedopt::pass_names);
  d["ADDRESSES"] = fusedopt::kAddresses;
  d["NEW_STATE"] = fusedopt::kNewState;
  d["NEW_AVERAGE"] = fusedopt::kNewAverage;
  d["NO_MEMORY"] = fusedopt::kNoMemory;
  return d;
}

void run(Launcher& launcher, std::uintptr_t words, std::uintptr_t stream, int passes, std::uintptr_t grad_scale,
         std::uintptr_t found_inf) {
  const py::gil_scoped_release release;
  launcher.run(reinterpret_cast<const std::int64_t*>(words), stream, passes, grad_scale, found_inf);
}

}  // namespace

PYBIND11_MODULE(FUSEDOPT_MODULE, m) {
  m.def("kernels", &describe_kernels,
        "Kernels in this build: rule, variants (lists of states), scalars, hyper, coefficients, step_scale.");
  m.def("layout", &layout,
        "The places in the tables that kernels read: names in their order, by the name of the table.");
  m.def("no_device", &no_device, "Why there is no GPU to use; empty if there is one.");
  m.def("has_code_for", &has_code_for, py::arg("device"), "Whether this build has code for a GPU.");
  m.def("words_by_value", &words_by_value, py::arg("device"), py::arg("has_options"),
        "How long a step table may be to go by value.");
  m.attr("tile") = kTile;
  m.attr("runs_per_share") = kRunsPerShare;
  m.attr("device_type") = "cuda";
  // Local, so that several builds can be imported side by side.
  py::class_<KernelSelection>(m, "KernelSelection", py::module_local())
      .def(py::init<const std::string&, const std::vector<std::vector<std::string>>&>(), py::arg("rule"),
           py::arg("states"))
      .def("blocks", &KernelSelection::blocks, py::arg("device"), py::arg("has_options"),
           "How many blocks a device holds at once.")
      .def("encode", &encode, py::arg("signatures"), py::arg("n_states"), "The words of the table of signatures.");
  py::class_<Launcher>(m, "Launcher", py::module_local())
      .def(py::init(&make_launcher), py::arg("selection"), py::arg("addresses"), py::arg("counts"), py::arg("device"),
           py::arg("blocks"), py::arg("words"))
      .def_readwrite("in_one_launch", &Launcher::in_one_launch)
      .def("run", &run, py::arg("words"), py::arg("stream"), py::arg("passes"), py::arg("grad_scale"),
           py::arg("found_inf"));
}
