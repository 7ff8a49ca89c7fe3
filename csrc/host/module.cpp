// fusedopt._host: what reads an optimizer's tensors before every step, shared by the engines, and what this CPU runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/cpu_job.h"
#include "host/device_table.h"
#include "host/tensors.h"

namespace py = pybind11;
using fusedopt::host::torch;

namespace {

// (address, dtype, shape, strides, device type, device index, storage bytes, storage offset, conjugated, negated) of a
// tensor, and what its gradient's handle points to, 0 without one; None where it cannot be read. dtype and device type
// are numbers of the reading path, and DLPack tells no gradient.
py::object geometry(const py::object& tensor) {
  fusedopt::host::Geometry g;
  if (!torch.read(tensor.ptr(), fusedopt::host::Access::kRead, &g)) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return py::none();
  }
  return py::make_tuple(reinterpret_cast<std::uintptr_t>(g.address), g.dtype,
                        std::vector<std::int64_t>(g.shape, g.shape + g.ndim),
                        std::vector<std::int64_t>(g.strides, g.strides + g.ndim), g.device_type, g.device_index,
                        g.storage_bytes, g.storage_offset, g.conjugated, g.negated, torch.gradient_of(tensor.ptr()));
}

// A capsule of a kernel of which only the names matter.
py::capsule describe(std::string rule, std::vector<std::string> states, std::vector<std::string> scalars,
                     std::vector<std::string> hyper) {
  using fusedopt::host::NamedKernel;
  auto* named = new NamedKernel(std::move(rule), std::move(states), std::move(scalars), std::move(hyper));
  PyObject* capsule = PyCapsule_New(
      &named->kernel, nullptr, [](PyObject* self) { delete static_cast<NamedKernel*>(PyCapsule_GetContext(self)); });
  if (!capsule) {
    delete named;
    throw py::error_already_set();
  }
  PyCapsule_SetContext(capsule, named);
  return py::reinterpret_steal<py::capsule>(capsule);
}

const char* isa_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "v3";
  if (__builtin_cpu_supports("x86-64-v2")) return "v2";
#endif
  return "base";
}

// Takes part in garbage collection: a parameter's hook may well hold its optimizer.
template <class T>
int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!reinterpret_cast<py::detail::instance*>(self)->simple_holder_constructed) return 0;
  return py::cast<T&>(py::handle(self)).roster().traverse(visit, arg);
}

template <class T>
py::class_<T> add_class(py::module_& m, const char* name) {
  const auto collected = [](PyHeapTypeObject* heap_type) {
    heap_type->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    heap_type->ht_type.tp_traverse = traverse<T>;
  };
  py::class_<T> c(m, name, py::custom_type_setup(collected));
  c.def("scan", &T::scan, py::arg("threads"));
  c.def("release", &T::release);
  c.def("increment_versions", [](const T& self) { self.roster().increment_versions(); });
  c.def("rebind", &T::rebind, py::arg("param_groups"));
  c.def("check", &T::check, py::arg("threads"));
  c.def("facts", [](const T& self) { return self.roster().facts(); });
  return c;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def(
      "bind_torch", [](const py::dict& names) { torch.bind(names); }, py::arg("names"),
      "Learn how to ask torch. Call once, before anything else.");
  m.def(
      "bind_abi",
      [](const py::dict& addresses, const py::dict& numbers, const py::list& probes) {
        return torch.bind_abi(addresses, numbers, probes);
      },
      py::arg("addresses"), py::arg("numbers"), py::arg("probes"),
      "Read tensors through torch's C ABI from now on. False, and DLPack stays, if handles are not where they should "
      "be.");
  m.def(
      "bind_dtensor", [](const py::type& type) { torch.bind_dtensor(type); }, py::arg("type"),
      "Learn the class of tensors that are spread over ranks.");
  m.def("forget_abi", [] { torch.forget_abi(); }, "Read tensors through DLPack from now on.");
  m.def("geometry", &geometry, py::arg("tensor"), "What is read of a tensor; None if it cannot be read.");
  m.def(
      "has_function_mode", [] { return torch.abi() && torch.abi()->has_function_mode(); },
      "Whether the ABI says that asking a tensor for its gradient runs Python.");
  m.def("describe", &describe, py::arg("rule"), py::arg("states"), py::arg("scalars"), py::arg("hyper"),
        "A kernel for tables whose rows a device steps and counts.");
  m.def(
      "codecs",
      [] { return std::vector<std::string>(std::begin(fusedopt::kCodecNames), std::end(fusedopt::kCodecNames)); },
      "The names of codecs, in the order of their numbers.");
  m.def("isa_level", &isa_level, "The highest x86-64 level this CPU runs: v2, v3, v4; else base.");

  using fusedopt::host::CpuJob;
  using Members = std::vector<std::size_t>;
  add_class<CpuJob>(m, "CpuJob")
      .def(py::init<py::object, const py::list&, py::object, const Members&, const Members&, const Members&, bool>(),
           py::arg("param_groups"), py::arg("groups"), py::arg("state"), py::arg("members"), py::arg("new_state"),
           py::arg("new_average"), py::arg("in_channels") = false)
      .def("draw", &CpuJob::draw, py::arg("row"), py::arg("tensor"), py::arg("stream"), py::arg("first"),
           py::arg("strides"))
      .def("keep_sums", &CpuJob::keep_sums, py::arg("has_scopes"), py::arg("first"), py::arg("scopes"),
           py::arg("addresses"), py::arg("shared"))
      .def("step", &CpuJob::step, py::arg("engine"), py::arg("threads"), py::arg("passes"), py::arg("inverse_scale"),
           py::arg("max_norm"), py::arg("skip_nonfinite"), py::arg("frees") = false)
      .def("run", &CpuJob::run, py::arg("engine"), py::arg("threads"), py::arg("passes"), py::arg("inverse_scale"),
           py::arg("max_norm"), py::arg("skip_nonfinite"), py::arg("squared_norm"))
      .def_property_readonly("stepped", &CpuJob::stepped)
      .def_property_readonly("rows", &CpuJob::rows)
      .def_property_readonly("cohorts", &CpuJob::cohorts);
  using fusedopt::host::DeviceTable;
  add_class<DeviceTable>(m, "DeviceTable")
      .def(py::init<py::object, const py::list&, py::object, const Members&, const Members&, const Members&>(),
           py::arg("param_groups"), py::arg("groups"), py::arg("state"), py::arg("members"), py::arg("new_state"),
           py::arg("new_average"))
      .def("write", &DeviceTable::write, py::arg("words"))
      .def("commit", &DeviceTable::commit);
}
