// What a step reads of the param groups.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "core/device_tables.h"
#include "cpu/job.h"

namespace fusedopt::host {

namespace py = pybind11;

// A hyperparameter in a group: group[key], or group[key][index] of `count` numbers when index >= 0; 0 if key is None.
struct HyperKey {
  py::object key;
  Py_ssize_t index, count;
  double low, high;  // what it may be, ends included
};

// What an average of the parameters is, by the name of its state.
enum class Average { kNone, kEma, kSlow };

// How what parameters of 2 bytes cannot hold of their values is kept, by what a group calls it.
enum class Master { kNone, kWhole, kSplit, kStochastic };

constexpr std::size_t kOptionNumbers = option_numbers.size();

// A hyperparameter that decides which states there are; it must keep its truth value, and is false where it is missing.
struct Switch {
  py::object key;
  bool on;
};

// A kernel of which the host knows only names: a device prepares its coefficients, and counts its steps.
struct NamedKernel {
  std::string rule;
  std::vector<std::string> states, scalars, hyper;
  std::vector<std::string_view> names;  // of all three
  Kernel kernel;
  NamedKernel(std::string rule, std::vector<std::string> states, std::vector<std::string> scalars,
              std::vector<std::string> hyper);
};

// Tells where a device reads a hyperparameter that is a tensor there: an address whose bit 0 says that it is a double.
// 0: the host reads it.
using SourceOf = std::int64_t (*)(PyObject* value, const void* context);

class Group {
 public:
  // spec: (kernel capsule, [(key, index, count, low, high)], [(key, on)], decoupled: True, False or the key of a flag,
  // the name of the average or None, whether the engine counts steps, the kind of masters or None, the name of their
  // state or None, for each of the kernel's states whether it is signed, [(key, what it must remain)]). Behind the
  // kernel's hyperparameters there may be kOptionNumbers of the engine's.
  Group(py::object group, const py::tuple& spec);

  // Reads all hyperparameters; false, perhaps with a Python error, when the plan does not fit them. May run Python.
  bool read(SourceOf source_of, const void* context);
  // The same group, with the same parameters in the same order.
  bool is_unchanged(PyObject* group) const;

  const Kernel& kernel() const { return *kernel_; }
  std::size_t size() const { return params_.size(); }
  // Its value for a key; empty, perhaps with a Python error, if it has none.
  py::object option(PyObject* key) const;
  PyObject* param(std::size_t i) const { return params_[i].ptr(); }
  int traverse(visitproc visit, void* arg) const;

  // What `read` found.
  std::vector<double> values;  // lr, weight_decay, then the kernel's hyperparameters
  std::vector<std::int64_t> sources;
  bool is_decoupled = false, is_cautious = false;
  double sign = 1;  // -1 to maximize
  // What the engine does besides the rule in a step, which is a parameter's `step`-th, from 1 on.
  StepOptions step_options(double step, bool new_average) const;
  const double* options() const { return has_options_ ? values.data() + values.size() - kOptionNumbers : nullptr; }

  Average average() const { return average_; }
  std::string_view average_name() const { return average_name_; }  // of the state, empty if there is none
  bool counts() const { return counts_; }                          // a step that the rule does not
  Master master() const { return master_; }
  std::string_view master_state() const { return master_state_; }  // its name, empty if there is none
  bool is_signed(std::size_t state) const { return signed_[state]; }
  const std::string& scale_of(std::size_t state) const { return scales_[state]; }  // the name of what it may have

 private:
  // Its truth, which is 0 where it is missing; -1 perhaps with a Python error.
  int flag(PyObject* key) const;
  bool read_value(const HyperKey& h, SourceOf source_of, const void* context, double* value,
                  std::int64_t* source) const;

  py::object group_;
  std::vector<py::object> params_;  // kept alive, so that an address means the same object
  const Kernel* kernel_;
  py::object kernel_owner_;
  std::vector<HyperKey> hyper_;
  std::vector<Switch> switches_;
  py::object decoupled_;
  bool has_options_ = false, counts_ = false;
  Average average_ = Average::kNone;
  std::string average_name_;
  Master master_ = Master::kNone;
  std::string master_state_;
  std::vector<bool> signed_;
  std::vector<std::string> scales_;
  std::vector<std::pair<py::object, py::object>> constants_;
};

// mapping[key] of a dict or any other mapping; empty, perhaps with a Python error, if it is not there.
py::object look_up(PyObject* mapping, PyObject* key);

// 1, 0, or -1: for an empty value, or with a Python error.
int truth(const py::object& value);

// The items of a list or tuple, or of any other iterable; empty with a Python error.
py::object as_sequence(PyObject* iterable);

// Calls visit(key, value) for the items of a dict, in its order, or of any other mapping, until one returns false.
// Returns whether all returned true; perhaps with a Python error if not.
template <class Visit>
bool each_item(PyObject* mapping, Visit visit) {
  if (PyDict_Check(mapping)) {
    Py_ssize_t position = 0;
    for (PyObject *key, *value; PyDict_Next(mapping, &position, &key, &value);) {
      if (!visit(key, value)) return false;
    }
    return true;
  }
  const auto items = py::reinterpret_steal<py::object>(PyMapping_Items(mapping));
  if (!items) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(items.ptr()); ++i) {
    PyObject* const item = PyList_GET_ITEM(items.ptr(), i);
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 2) return false;
    if (!visit(PyTuple_GET_ITEM(item, 0), PyTuple_GET_ITEM(item, 1))) return false;
  }
  return true;
}

}  // namespace fusedopt::host
