#include "host/roster.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

namespace fusedopt::host {
Roster::Roster(py::object param_groups, const py::list& groups, py::object state,
               const std::vector<std::size_t>& members, const std::vector<std::size_t>& new_state,
               const std::vector<std::size_t>& new_average)
    : param_groups_(std::move(param_groups)), state_(std::move(state)) {
  const auto sequence = py::reinterpret_steal<py::tuple>(PySequence_Tuple(param_groups_.ptr()));
  if (!sequence) throw py::error_already_set();
  if (sequence.size() != groups.size()) {
    throw std::runtime_error("the param groups changed while the step was being planned");
  }
  for (std::size_t g = 0; g < groups.size(); ++g) {
    groups_.emplace_back(sequence[g], py::reinterpret_borrow<py::tuple>(groups[g]));
  }
  each_item(state_.ptr(), [&](PyObject* key, PyObject* value) {
    all_states_.push_back({key, value});
    held_.push_back(py::reinterpret_borrow<py::object>(key));
    held_.push_back(py::reinterpret_borrow<py::object>(value));
    return true;
  });
  if (PyErr_Occurred()) throw py::error_already_set();
  const auto contains = [](const std::vector<std::size_t>& sorted, std::size_t i) {
    return std::binary_search(sorted.begin(), sorted.end(), i);
  };
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    has_members_.push_back(false);
    for (std::size_t k = 0; k < groups_[g].size(); ++k) {
      const std::size_t i = entries_.size();
      state_items_.emplace_back();
      like_.emplace_back();
      has_members_[g] = has_members_[g] || contains(members, i);
      entries_.push_back(contains(members, i) ? entry_of(g, groups_[g].param(k)) : Entry{});
      const Entry& entry = entries_.back();
      briefs_.push_back({entry.whole, static_cast<std::int32_t>(g), entry.gradient_dtype, entry.is_member,
                         entry.is_steppable, entry.param.is_complex, contains(new_state, i), contains(new_average, i),
                         entry.is_member && torch.is_dtensor(entry.whole), Py_TYPE(groups_[g].param(k)), nullptr,
                         torch.abi() && entry.is_member ? torch.abi()->parts(Torch::handle(entry.whole)) : Parts{}});
    }
  }
  may_share_work_ = storages_are_disjoint();
  find_written();
  silent_ = std::all_of(briefs_.begin(), briefs_.end(),
                        [](const Brief& b) { return !b.is_member || torch.is_silent(b.param); }) &&
            PyDict_Check(state_.ptr()) &&
            std::all_of(state_items_.begin(), state_items_.end(),
                        [](const StateItems& items) { return !items.mapping || PyDict_Check(items.mapping); });
  gradient_placements_.resize(entries_.size());
  gradients_.resize(entries_.size());
  addresses_.resize(entries_.size());
  step_strides_.resize(entries_.size());
}

// Takes up what a tensor is now, which it must be in every scan from now on. False if that cannot be read.
bool Roster::expect(PyObject* tensor, Member* out) {
  Geometry now;
  if (!torch.read(tensor, Access::kWrite, &now) || now.conjugated || now.negated) return false;
  const std::optional<DType> dtype = torch.element_type(now.dtype);
  if (!dtype) return false;
  *out = {tensor,
          now.address,
          *dtype,
          torch.is_complex(now.dtype),
          now.has_memory(torch.item_size(now.dtype)),
          static_cast<std::uint32_t>(dims_.size())};
  dims_.insert(dims_.end(), now.shape, now.shape + now.ndim);
  dims_.insert(dims_.end(), now.strides, now.strides + now.ndim);
  expectations_.push_back({Torch::handle(tensor), now.address, now.storage_bytes, out->dims, now.dtype,
                           static_cast<std::int16_t>(now.device_type), static_cast<std::int16_t>(now.device_index),
                           now.ndim, out->is_complex, Py_TYPE(tensor),
                           torch.abi() ? torch.abi()->parts(Torch::handle(tensor)) : Parts{}});
  expected_.push_back(tensor);
  if (now.address && now.storage_bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(now.address) -
                       static_cast<std::uintptr_t>(now.storage_offset * torch.item_size(now.dtype));
    storages_.push_back({begin, begin + static_cast<std::uintptr_t>(now.storage_bytes)});
  }
  return true;
}

// The same of the part that is here, of a tensor that is spread over ranks.
bool Roster::expect_local(PyObject* tensor, Member* out) {
  if (!torch.is_dtensor(tensor)) return torch.is_readable(tensor) && expect(tensor, out);
  const auto local = py::reinterpret_steal<py::object>(torch.local(tensor));
  const auto placement = local ? py::reinterpret_steal<py::object>(torch.placement(tensor)) : py::object();
  if (!placement || !torch.is_readable(local.ptr()) || !expect(local.ptr(), out)) return false;
  dtensors_.push_back({tensor, placement, expected_.size() - 1, local});
  return true;
}

bool Roster::storages_are_disjoint() {
  std::sort(storages_.begin(), storages_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  return std::adjacent_find(storages_.begin(), storages_.end(),
                            [](const Span& a, const Span& b) { return b.begin < a.end; }) == storages_.end();
}

// All that the optimizer's step writes, but for states that a differentiable step puts in place of others.
void Roster::find_written() {
  static PyObject* const differentiable = PyUnicode_InternFromString("differentiable");
  std::vector<py::object> tensors;  // held, for looking at them may run Python
  const auto take = [&](PyObject*, PyObject* value) {
    if (!torch.is_tensor(value)) return true;
    tensors.push_back(torch.is_dtensor(value) ? py::reinterpret_steal<py::object>(torch.local(value))
                                              : py::reinterpret_borrow<py::object>(value));
    if (!tensors.back()) PyErr_Clear();  // without a part that is here
    return true;
  };
  for (const Group& group : groups_) {
    const int replaces = truth(group.option(differentiable));
    if (PyErr_Occurred()) throw py::error_already_set();
    for (std::size_t k = 0; k < group.size(); ++k) {
      take(nullptr, group.param(k));
      const py::object state = replaces == 1 ? py::object() : look_up(state_.ptr(), group.param(k));
      if (state) each_item(state.ptr(), take);
      if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
      PyErr_Clear();  // what is not a mapping is said elsewhere
    }
  }
  for (const py::object& tensor : tensors) {
    Geometry t;
    if (tensor && torch.is_readable(tensor.ptr()) && torch.read(tensor.ptr(), Access::kRead, &t)) {
      written_.add(t.address, t.reach(torch.item_size(t.dtype)));
    }
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  written_.finish();
}

Entry Roster::entry_of(std::size_t group, PyObject* param) {
  Entry entry;
  entry.whole = param;
  entry.is_member = true;
  entry.group = static_cast<std::int32_t>(group);
  const std::size_t first = expectations_.size();
  if (!expect_local(param, &entry.param)) {
    if (PyErr_Occurred()) throw py::error_already_set();
    throw std::runtime_error("a parameter has no memory that an engine can read");
  }
  const Expectation is = expectations_[first];
  device_.device_type = is.device_type;
  device_.device_index = is.device_index;
  entry.ndim = is.ndim;
  entry.numel = 1;
  for (int d = 0; d < is.ndim; ++d) entry.numel *= dims_[is.dims + static_cast<std::uint32_t>(d)];
  like_.back() = gradient_of(entry, is);
  add_states(entry, state_items_.size() - 1);

  const auto is_here = [&](const Expectation& e) {
    return e.device_type == is.device_type && e.device_index == is.device_index;
  };
  entry.is_steppable =
      has_all(entry) && is_aligned(entry.param.address, entry.param.dtype) &&
      std::all_of(expectations_.begin() + static_cast<std::ptrdiff_t>(first), expectations_.end(), is_here);
  return entry;
}

// Whether a parameter and all that its step uses is there, with memory.
bool Roster::has_all(const Entry& entry) const {
  const auto is_whole = [](const Member& m) { return m.tensor && m.has_memory; };
  const auto is_whole_if_any = [&](const Member* m) { return !m || is_whole(*m); };
  bool all = is_whole(entry.param) && is_whole_if_any(average(entry)) && is_whole_if_any(counter(entry)) &&
             is_whole_if_any(master(entry));
  for (const auto& some : {states(entry), scalars(entry)}) all &= std::all_of(some.begin(), some.end(), is_whole);
  for (std::size_t k = 0; k < states(entry).size(); ++k) all &= is_whole_if_any(scales(entry, k));
  return all;
}

GradientExpectation Roster::gradient_of(Entry& entry, const Expectation& param) {
  const auto ndim = static_cast<std::uint32_t>(param.ndim);
  GradientExpectation like{
      nullptr,    0, 0, param.dims, param.dims + ndim, param.dtype, param.device_type, param.device_index,
      param.ndim, 0, {}};
  PyObject* held = torch.grad(entry.whole);
  if (held && torch.is_dtensor(held) && torch.is_dtensor(entry.whole)) {
    const auto whole = py::reinterpret_steal<py::object>(held);
    held = torch.local(held);
  }
  if (held && torch.is_readable(held)) held = torch.resolved(held, entry.param.is_complex);
  const auto gradient = py::reinterpret_steal<py::object>(held);
  if (!gradient) throw py::error_already_set();
  Geometry g;
  entry.gradient_dtype = entry.param.dtype;
  if (torch.is_readable(gradient.ptr()) && torch.read(gradient.ptr(), Access::kRead, &g) &&
      torch.element_type(g.dtype)) {
    entry.gradient_dtype = *torch.element_type(g.dtype);
    entry.gradient_address = g.address;
    like.dtype = g.dtype;
    if (g.ndim == param.ndim) {
      like.strides = static_cast<std::uint32_t>(dims_.size());
      dims_.insert(dims_.end(), g.strides, g.strides + g.ndim);
    }
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  Geometry planned;
  planned.ndim = param.ndim;
  planned.shape = dims_.data() + like.shape;
  planned.strides = dims_.data() + like.strides;
  like.item_size = static_cast<std::int8_t>(torch.item_size(like.dtype));
  like.reach = planned.reach(like.item_size);
  entry.gradient_strides = like.strides;
  return like;
}

// Takes up the states and scalars of entry i, as far as it has them.
void Roster::add_states(Entry& entry, std::size_t i) {
  const RuleNames& names = kernel(entry).names;
  entry.first = static_cast<std::uint32_t>(members_.size());
  const Group& group = group_of(entry);
  const std::size_t own = own_of(entry);
  members_.resize(own + kScales + names.states.size());
  const py::object mapping = look_up(state_.ptr(), entry.whole);
  if (!mapping) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_KeyError)) throw py::error_already_set();
    PyErr_Clear();
    return;
  }
  StateItems& items = state_items_[i];
  items.mapping = mapping.ptr();
  held_.push_back(mapping);
  items.first = static_cast<std::uint32_t>(items_.size());
  const auto find = [&](const auto& list, std::size_t first, std::string_view key, PyObject* value) {
    const auto k = static_cast<std::size_t>(std::find(list.begin(), list.end(), key) - list.begin());
    if (k < list.size() && torch.is_tensor(value)) expect_local(value, &members_[first + k]);
  };
  const std::string_view engines[kScales] = {group.average_name(), group.counts() ? "step" : "", group.master_state()};
  std::vector<std::string_view> scales;
  for (std::size_t k = 0; k < names.states.size(); ++k) scales.push_back(group.scale_of(k));
  each_item(mapping.ptr(), [&](PyObject* key, PyObject* value) {
    items_.push_back({key, value});
    held_.push_back(py::reinterpret_borrow<py::object>(key));
    held_.push_back(py::reinterpret_borrow<py::object>(value));
    ++items.count;
    const char* const name = PyUnicode_Check(key) ? PyUnicode_AsUTF8(key) : nullptr;
    if (!name) return !PyErr_Occurred();
    find(names.states, entry.first, name, value);
    find(names.scalars, entry.first + names.states.size(), name, value);
    if (*name) find(std::span(engines), own, name, value);
    find(scales, own + kScales, name, value);
    return true;
  });
  if (PyErr_Occurred()) throw py::error_already_set();
}

py::list Roster::facts() const {
  py::list out;
  const auto add = [&](PyObject* tensor, const void* address, std::int32_t dtype, int ndim, const std::int64_t* shape,
                       const std::int64_t* strides, std::int64_t bytes) {
    out.append(py::make_tuple(py::handle(tensor), reinterpret_cast<std::uintptr_t>(address), dtype,
                              std::vector<std::int64_t>(shape, shape + ndim),
                              std::vector<std::int64_t>(strides, strides + ndim), bytes));
  };
  for (std::size_t k = 0; k < expectations_.size(); ++k) {
    const Expectation& e = expectations_[k];
    const std::int64_t* const shape = dims_.data() + e.dims;
    add(expected_[k], e.address, e.dtype, e.ndim, shape, shape + e.ndim, e.storage_bytes);
  }
  for (std::size_t i = 0; i < gradients_.size(); ++i) {
    if (!gradients_[i]) continue;
    const GradientExpectation& like = like_[i];
    const std::int64_t* const planned = dims_.data() + like.strides;
    add(Torch::object(gradients_[i]), addresses_[i], like.dtype, like.ndim, dims_.data() + like.shape,
        gradient_strides(i) ? gradient_strides(i) : planned, -1);
  }
  return out;
}

int Roster::traverse(visitproc visit, void* arg) const {
  Py_VISIT(param_groups_.ptr());
  Py_VISIT(state_.ptr());
  for (const Group& group : groups_) {
    if (const int stop = group.traverse(visit, arg)) return stop;
  }
  for (const py::object& object : held_) Py_VISIT(object.ptr());
  for (const DTensor& t : dtensors_) {
    Py_VISIT(t.local.ptr());
    Py_VISIT(t.placement.ptr());
  }
  for (const py::object& placement : gradient_placements_) Py_VISIT(placement.ptr());
  for (const Abi::Handle gradient : gradients_) {
    if (gradient) Py_VISIT(Torch::object(gradient));
  }
  return 0;
}

}  // namespace fusedopt::host
