// fusedopt._host: the plan and its scan, shared by the engines, and what this CPU can run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/anatomy.h"
#include "host/plan.h"

namespace py = pybind11;
using fusedopt::host::Plan;

namespace {

void bind_torch(const py::object& tensor_type, const py::object& parameter_type, const py::object& capsule,
                const py::object& grad_descriptor) {
  fusedopt::host::torch.bind(tensor_type.ptr(), parameter_type.ptr(), capsule.ptr(), grad_descriptor.ptr());
}

using SpecimenFacts = std::tuple<py::object, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t,
                                 std::uint64_t, int, std::vector<std::int64_t>, std::vector<std::int64_t>>;

bool learn_anatomy(const std::vector<SpecimenFacts>& facts) {
  std::vector<fusedopt::host::Specimen> specimens;
  for (const auto& [tensor, impl, storage, data, offset, keys, dtype, shape, stride] : facts) {
    specimens.push_back({tensor.ptr(), impl, storage, data, offset, keys, dtype, shape, stride});
  }
  fusedopt::host::anatomy.learn(specimens);
  return fusedopt::host::anatomy.known();
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

// Plans take part in garbage collection: a parameter's hook may well hold its optimizer.
int traverse_plan(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!reinterpret_cast<py::detail::instance*>(self)->simple_holder_constructed) return 0;
  return py::cast<Plan&>(py::handle(self)).traverse(visit, arg);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("bind_torch", &bind_torch, py::arg("tensor_type"), py::arg("parameter_type"), py::arg("exchange_api"),
        py::arg("grad_descriptor"), "Learn how to read torch tensors. Call once, before anything else.");
  m.def("learn_anatomy", &learn_anatomy, py::arg("specimens"),
        "Find where torch keeps addresses, from (tensor, impl, storage, data, offset, dispatch keys, dtype tag, shape, "
        "stride). "
        "An empty list forgets it. Returns whether it is known.");
  m.def("describe", &describe, py::arg("rule"), py::arg("states"), py::arg("scalars"), py::arg("hyper"),
        "A kernel for plans whose rows a device steps and counts.");
  m.def("isa_level", &isa_level, "The highest x86-64 level this CPU runs: v2, v3, v4; else base.");

  py::class_<Plan>(m, "Plan", py::custom_type_setup([](PyHeapTypeObject* heap_type) {
                     heap_type->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
                     heap_type->ht_type.tp_traverse = traverse_plan;
                   }))
      .def(py::init<py::list, py::list, py::dict, const py::set&, const py::set&>(), py::arg("param_groups"),
           py::arg("groups"), py::arg("state"), py::arg("mine"), py::arg("fresh"))
      .def("scan", &Plan::scan)
      .def("run", &Plan::run, py::arg("engine"), py::arg("threads"), py::arg("inverse_scale"), py::arg("max_norm"),
           py::arg("measure"), py::arg("update"), py::arg("skip_nonfinite"), py::arg("squared_norm"))
      .def("write", &Plan::write, py::arg("live"))
      .def("commit", &Plan::commit)
      .def("release_gradients", &Plan::release_gradients)
      .def_property_readonly("rows", &Plan::rows)
      .def_property_readonly("cohorts", &Plan::cohorts);
}
