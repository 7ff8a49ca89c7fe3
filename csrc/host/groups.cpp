#include "host/groups.h"

#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>

#include "host/tensors.h"

namespace fusedopt::host {
namespace {

PyObject* const* items(const py::object& sequence) { return PySequence_Fast_ITEMS(sequence.ptr()); }
Py_ssize_t length(const py::object& sequence) { return PySequence_Fast_GET_SIZE(sequence.ptr()); }

PyObject* params_key() {
  static PyObject* const key = PyUnicode_InternFromString("params");
  return key;
}

}  // namespace

py::object look_up(PyObject* mapping, PyObject* key) {
  // Not by PyObject_GetItem in a dict: a defaultdict would make an entry.
  if (PyDict_Check(mapping)) return py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(mapping, key));
  return py::reinterpret_steal<py::object>(PyObject_GetItem(mapping, key));
}

int truth(const py::object& value) { return value ? PyObject_IsTrue(value.ptr()) : -1; }

py::object as_sequence(PyObject* iterable) {
  return py::reinterpret_steal<py::object>(PySequence_Fast(iterable, "params must be a sequence"));
}

NamedKernel::NamedKernel(std::string rule, std::vector<std::string> states, std::vector<std::string> scalars,
                         std::vector<std::string> hyper)
    : rule(std::move(rule)), states(std::move(states)), scalars(std::move(scalars)), hyper(std::move(hyper)), kernel{} {
  for (const auto* list : {&this->states, &this->scalars, &this->hyper})
    names.insert(names.end(), list->begin(), list->end());
  const std::span<const std::string_view> all = names;
  const std::size_t n_states = this->states.size(), n_scalars = this->scalars.size();
  kernel.names = {this->rule,
                  all.first(n_states),
                  all.subspan(n_states, n_scalars),
                  all.subspan(n_states + n_scalars),
                  {},
                  {},
                  {},
                  {},
                  false};
}

Group::Group(py::object group, const py::tuple& spec) : group_(std::move(group)) {
  const py::object params = look_up(group_.ptr(), params_key());
  const py::object sequence = params ? as_sequence(params.ptr()) : py::object();
  if (!sequence) throw std::invalid_argument("a param group has no sequence of params");
  for (Py_ssize_t i = 0; i < length(sequence); ++i) {
    params_.push_back(py::reinterpret_borrow<py::object>(items(sequence)[i]));
  }
  kernel_owner_ = spec[0];
  kernel_ = py::reinterpret_borrow<py::capsule>(kernel_owner_).get_pointer<const Kernel>();
  for (const py::handle item : py::object(spec[1])) {
    const auto h = py::reinterpret_borrow<py::tuple>(item);
    hyper_.push_back(
        {h[0], h[1].cast<Py_ssize_t>(), h[2].cast<Py_ssize_t>(), h[3].cast<double>(), h[4].cast<double>()});
  }
  values.resize(hyper_.size());
  sources.resize(hyper_.size());
  const std::size_t expected = 2 + kernel_->names.hyper.size();
  has_options_ = hyper_.size() == expected + kOptionNumbers;
  if (hyper_.size() != expected && !has_options_) {
    throw std::logic_error("hyperparameters do not match the kernel");
  }
  for (const py::handle item : py::object(spec[2])) {
    const auto s = py::reinterpret_borrow<py::tuple>(item);
    switches_.push_back({s[0], s[1].cast<bool>()});
  }
  decoupled_ = spec[3];
  if (!py::object(spec[4]).is_none()) {
    average_name_ = py::object(spec[4]).cast<std::string>();
    average_ = average_name_ == "ema" ? Average::kEma : Average::kSlow;
  }
  counts_ = py::object(spec[5]).cast<bool>();
  if (!py::object(spec[6]).is_none()) {
    const auto kind = py::object(spec[6]).cast<std::string>();
    master_ = kind == "fp32" ? Master::kWhole : kind == "split" ? Master::kSplit : Master::kStochastic;
  }
  if (!py::object(spec[7]).is_none()) master_state_ = py::object(spec[7]).cast<std::string>();
  signed_ = py::object(spec[8]).cast<std::vector<bool>>();
  for (const std::string_view state : kernel_->names.states) scales_.push_back(std::string(state) + "_scale");
  if (signed_.size() != scales_.size()) throw std::logic_error("states do not match the kernel");
  for (const py::handle item : py::object(spec[9])) {
    const auto constant = py::reinterpret_borrow<py::tuple>(item);
    constants_.emplace_back(constant[0], constant[1]);
  }
}

py::object Group::option(PyObject* key) const { return look_up(group_.ptr(), key); }

bool Group::is_unchanged(PyObject* group) const {
  if (group != group_.ptr()) return false;
  const py::object params = look_up(group, params_key());
  const py::object sequence = params ? as_sequence(params.ptr()) : py::object();
  if (!sequence || length(sequence) != static_cast<Py_ssize_t>(params_.size())) return false;
  for (std::size_t i = 0; i < params_.size(); ++i) {
    if (items(sequence)[i] != params_[i].ptr()) return false;
  }
  return true;
}

bool Group::read_value(const HyperKey& h, SourceOf source_of, const void* context, double* value,
                       std::int64_t* source) const {
  *value = 0;
  *source = 0;
  if (h.key.is_none()) return true;
  py::object found = look_up(group_.ptr(), h.key.ptr());
  if (!found) return false;
  if (h.index >= 0) {
    if (!PyTuple_Check(found.ptr()) && !PyList_Check(found.ptr())) return false;
    if (length(found) != h.count) return false;
    found = py::reinterpret_borrow<py::object>(items(found)[h.index]);
  }
  *source = source_of ? source_of(found.ptr(), context) : 0;
  if (*source) return true;
  if (PyErr_Occurred()) return false;
  return torch.number(found.ptr(), value) && *value >= h.low && *value <= h.high;
}

int Group::flag(PyObject* key) const {
  const py::object value = look_up(group_.ptr(), key);
  if (value) return truth(value);
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_KeyError)) return -1;
  PyErr_Clear();
  return 0;
}

bool Group::read(SourceOf source_of, const void* context) {
  static PyObject* const maximize_key = PyUnicode_InternFromString("maximize");
  static PyObject* const cautious_key = PyUnicode_InternFromString("cautious_weight_decay");
  for (std::size_t k = 0; k < hyper_.size(); ++k) {
    if (!read_value(hyper_[k], source_of, context, &values[k], &sources[k])) return false;
  }
  for (const Switch& s : switches_) {
    if (flag(s.key.ptr()) != static_cast<int>(s.on)) return false;
  }
  for (const auto& [key, value] : constants_) {
    const py::object now = look_up(group_.ptr(), key.ptr());
    if (!now || PyObject_RichCompareBool(now.ptr(), value.ptr(), Py_EQ) != 1) return false;
  }
  const int maximize = truth(look_up(group_.ptr(), maximize_key));
  const int decoupled = truth(PyUnicode_Check(decoupled_.ptr()) ? look_up(group_.ptr(), decoupled_.ptr()) : decoupled_);
  if (maximize < 0 || decoupled < 0) return false;
  const int cautious = flag(cautious_key);
  if (cautious < 0 || (cautious && !decoupled)) return false;
  is_cautious = cautious;
  is_decoupled = decoupled;
  sign = maximize ? -1 : 1;
  return true;
}

StepOptions Group::step_options(double step, bool new_average) const {
  StepOptions out;
  const double* const numbers = options();
  if (!numbers) return out;
  out.step = step > 0 ? static_cast<std::uint32_t>(step - 1) : 0;
  if (numbers[kEta] > 0) {
    out.noise = std::sqrt(numbers[kEta] / std::pow(step, numbers[kGamma]));
    out.seed = static_cast<std::uint32_t>(numbers[kSeed]);
  }
  if (average_ == Average::kEma) {
    out.averages = true;
    out.weight = new_average ? 1 : 1 - numbers[kDecayOrPeriod];
  } else if (average_ == Average::kSlow) {
    out.averages = out.puts_back = std::fmod(step, numbers[kDecayOrPeriod]) == 0;
    out.weight = numbers[kAlpha];
  }
  return out;
}

int Group::traverse(visitproc visit, void* arg) const {
  Py_VISIT(group_.ptr());
  for (const py::object& param : params_) Py_VISIT(param.ptr());
  return 0;
}

}  // namespace fusedopt::host
