#include "host/roster.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

namespace fusedopt::host {
namespace {

// With this many parameters their cache misses outweigh starting a team of threads.
constexpr std::size_t kWorthTeam = 512;
constexpr std::size_t kAhead = 16;  // parameters to prefetch ahead: by now the step has driven them out of cache

// No garbage is collected in its lifetime, so that no finalizer runs.
class NoCollection {
 public:
  NoCollection() : was_on_(PyGC_Disable()) {}
  ~NoCollection() {
    if (was_on_) PyGC_Enable();
  }
  NoCollection(const NoCollection&) = delete;
  NoCollection& operator=(const NoCollection&) = delete;

 private:
  int was_on_;
};

bool is_aligned(const void* address, DType dtype) {
  constexpr std::uintptr_t sizes[] = {4, 8, 2, 2};  // in the order of DType
  return reinterpret_cast<std::uintptr_t>(address) % sizes[static_cast<int>(dtype)] == 0;
}

bool is_expected(const Geometry& now, const Expectation& was, const std::int64_t* dims) {
  const std::int64_t* const shape = dims + was.dims;
  return now.address == was.address && now.storage_bytes == was.storage_bytes && now.dtype == was.dtype &&
         now.device_type == was.device_type && now.device_index == was.device_index && now.ndim == was.ndim &&
         !now.conjugated && !now.negated && std::equal(shape, shape + now.ndim, now.shape) &&
         std::equal(shape + now.ndim, shape + 2 * now.ndim, now.strides);
}

}  // namespace

Roster::Roster(py::object param_groups, const py::list& groups, py::object state,
               const std::vector<std::size_t>& members, const std::vector<std::size_t>& new_state)
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
      briefs_.push_back(
          {entry.param.tensor, static_cast<std::int32_t>(g), entry.gradient_dtype, entry.is_member, entry.is_steppable,
           entry.param.is_complex, contains(new_state, i), nullptr,
           torch.abi() && entry.is_member ? torch.abi()->parts(Torch::handle(entry.param.tensor)) : Parts{}});
    }
  }
  may_share_work_ = storages_are_disjoint();
  silent_ = std::all_of(briefs_.begin(), briefs_.end(),
                        [](const Brief& b) { return !b.is_member || torch.is_plain(b.param); }) &&
            PyDict_Check(state_.ptr()) &&
            std::all_of(state_items_.begin(), state_items_.end(),
                        [](const StateItems& items) { return !items.mapping || PyDict_Check(items.mapping); });
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
                           now.ndim, out->is_complex,
                           torch.abi() ? torch.abi()->parts(Torch::handle(tensor)) : Parts{}});
  expected_.push_back(tensor);
  if (now.address && now.storage_bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(now.address) -
                       static_cast<std::uintptr_t>(now.storage_offset * torch.item_size(now.dtype));
    storages_.push_back({begin, begin + static_cast<std::uintptr_t>(now.storage_bytes)});
  }
  return true;
}

bool Roster::storages_are_disjoint() {
  std::sort(storages_.begin(), storages_.end(), [](const Storage& a, const Storage& b) { return a.begin < b.begin; });
  return std::adjacent_find(storages_.begin(), storages_.end(),
                            [](const Storage& a, const Storage& b) { return b.begin < a.end; }) == storages_.end();
}

Entry Roster::entry_of(std::size_t group, PyObject* param) {
  Entry entry;
  entry.is_member = true;
  entry.group = static_cast<std::int32_t>(group);
  const std::size_t first = expectations_.size();
  if (!torch.is_readable(param) || !expect(param, &entry.param)) {
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

  const Kernel& kernel = groups_[group].kernel();
  const auto is_whole = [](const Member& m) { return m.tensor && m.has_memory; };
  const auto is_here = [&](const Expectation& e) {
    return e.device_type == is.device_type && e.device_index == is.device_index;
  };
  entry.is_steppable =
      is_whole(entry.param) && is_aligned(entry.param.address, entry.param.dtype) &&
      std::all_of(entry.states, entry.states + kernel.n_states, is_whole) &&
      std::all_of(entry.scalars, entry.scalars + kernel.n_scalars, is_whole) &&
      std::all_of(expectations_.begin() + static_cast<std::ptrdiff_t>(first), expectations_.end(), is_here);
  return entry;
}

GradientExpectation Roster::gradient_of(Entry& entry, const Expectation& param) {
  const auto ndim = static_cast<std::uint32_t>(param.ndim);
  GradientExpectation like{
      nullptr,    0, 0, param.dims, param.dims + ndim, param.dtype, param.device_type, param.device_index,
      param.ndim, 0, {}};
  PyObject* given = torch.grad(entry.param.tensor);
  if (given && torch.is_readable(given)) given = torch.resolved(given, entry.param.is_complex);
  const auto gradient = py::reinterpret_steal<py::object>(given);
  if (!gradient) throw py::error_already_set();
  Geometry g;
  entry.gradient_dtype = entry.param.dtype;
  if (torch.is_readable(gradient.ptr()) && torch.read(gradient.ptr(), Access::kRead, &g) &&
      torch.element_type(g.dtype)) {
    entry.gradient_dtype = *torch.element_type(g.dtype);
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
  const Kernel& kernel = groups_[static_cast<std::size_t>(entry.group)].kernel();
  const py::object mapping = look_up(state_.ptr(), entry.param.tensor);
  if (!mapping) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_KeyError)) throw py::error_already_set();
    PyErr_Clear();
    return;
  }
  StateItems& items = state_items_[i];
  items.mapping = mapping.ptr();
  held_.push_back(mapping);
  items.first = static_cast<std::uint32_t>(items_.size());
  const auto find = [&](const char* const* names, int n, Member* members, const char* key, PyObject* value) {
    const int k = static_cast<int>(std::find(names, names + n, std::string_view(key)) - names);
    if (k < n && torch.is_tensor(value)) expect(value, &members[k]);
  };
  each_item(mapping.ptr(), [&](PyObject* key, PyObject* value) {
    items_.push_back({key, value});
    held_.push_back(py::reinterpret_borrow<py::object>(key));
    held_.push_back(py::reinterpret_borrow<py::object>(value));
    ++items.count;
    const char* const name = PyUnicode_Check(key) ? PyUnicode_AsUTF8(key) : nullptr;
    if (!name) return !PyErr_Occurred();
    find(kernel.states, kernel.n_states, entry.states, name, value);
    find(kernel.scalars, kernel.n_scalars, entry.scalars, name, value);
    return true;
  });
  if (PyErr_Occurred()) throw py::error_already_set();
}

bool Roster::scan(int threads, SourceOf source_of, const void* context) {
  release();
  const bool was_silent = silent_;
  bool valid = read_all(threads, source_of, context);
  if (!valid && was_silent && !silent_) {
    release();
    valid = read_all(threads, source_of, context);
  }
  if (!valid) release();
  if (PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();  // Ctrl-C
    PyErr_Clear();  // planning anew finds the cause and says it
    return false;
  }
  return valid;
}

bool Roster::read_all(int threads, SourceOf source_of, const void* context) {
  if (!read_groups(source_of, context)) return false;
  const bool silent = can_be_silent();
  if (!silent && !fetch_gradients()) return false;
  if (!groups_are_unchanged()) return false;
  if (!silent && !states_are_unchanged()) return false;
  const auto meanwhile = [&] { return !silent || (fetch_gradients_silently() && states_are_unchanged()); };
  if (!tensors_are_unchanged(threads, meanwhile)) return false;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (!gradients_[i]) continue;
    if (!briefs_[i].is_steppable) return false;
    if (!addresses_[i] && !find_address(i)) return false;
    if (!is_aligned(addresses_[i], briefs_[i].gradient_dtype)) return false;
  }
  return true;
}

bool Roster::read_groups(SourceOf source_of, const void* context) {
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    if (has_members_[g] && !groups_[g].read(source_of, context)) return false;
  }
  return true;
}

bool Roster::can_be_silent() const { return silent_ && torch.abi() && !torch.abi()->has_function_mode(); }

bool Roster::fetch_gradients() {
  for (std::size_t i = 0; i < briefs_.size(); ++i) {
    const Brief& brief = briefs_[i];
    if (!brief.is_member) continue;
    PyObject* gradient = torch.grad(brief.param);
    if (!gradient) return false;
    if (torch.is_readable(gradient)) gradient = torch.resolved(gradient, brief.is_complex);
    if (gradient && torch.is_readable(gradient)) {  // again: a subclass may resolve to anything
      gradients_[i] = Torch::handle(gradient);
      continue;
    }
    const bool is_none = gradient == Py_None;
    Py_XDECREF(gradient);
    if (!is_none) return false;
  }
  return true;
}

// As the above, but no Python runs: none of the user's, no finalizer, no warning. Where that cannot be, false, and not
// silent any more.
bool Roster::fetch_gradients_silently() {
  const Abi& abi = *torch.abi();
  const NoCollection none;
  for (std::size_t i = 0; i < briefs_.size(); ++i) {
    prefetch_gradient(i);
    Brief& brief = briefs_[i];
    if (!brief.is_member) continue;
    bool is_defined;
    if (abi.get_is_defined(abi.gradient(Torch::handle(brief.param)), &is_defined)) return silent_ = false;
    if (!is_defined) continue;
    PyObject* const gradient = torch.grad(brief.param);
    if (!gradient) PyErr_Clear();  // it comes again
    if (!gradient || !torch.is_plain(gradient) || torch.is_lazy(gradient, brief.is_complex)) {
      Py_XDECREF(gradient);
      return silent_ = false;
    }
    gradients_[i] = Torch::handle(gradient);
    brief.gradient = gradient;
    like_[i].parts.impl = *static_cast<const char* const*>(gradients_[i]);
  }
  return true;
}

void Roster::prefetch_gradient(std::size_t i) const {
  const Abi& abi = *torch.abi();
  if (i + 2 * kAhead < briefs_.size()) {
    const Brief& far = briefs_[i + 2 * kAhead];
    __builtin_prefetch(far.param);
    far.parts.prefetch_to_gradient();
    __builtin_prefetch(far.gradient);
  }
  if (i + kAhead < briefs_.size() && briefs_[i + kAhead].is_member) {
    const Abi::Handle gradient = abi.gradient(Torch::handle(briefs_[i + kAhead].param));
    __builtin_prefetch(*static_cast<const void* const*>(gradient));
  }
}

bool Roster::groups_are_unchanged() const {
  // A copy of its own: containers of other kinds than torch's run Python when they are looked at.
  const auto sequence = py::reinterpret_steal<py::object>(PySequence_Tuple(param_groups_.ptr()));
  if (!sequence || PyTuple_GET_SIZE(sequence.ptr()) != static_cast<Py_ssize_t>(groups_.size())) return false;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    if (!groups_[g].is_unchanged(PyTuple_GET_ITEM(sequence.ptr(), static_cast<Py_ssize_t>(g)))) return false;
  }
  return true;
}

bool Roster::states_are_unchanged() const {
  std::size_t at = 0;
  const bool same = each_item(state_.ptr(), [&](PyObject* key, PyObject* value) {
    return at < all_states_.size() && key == all_states_[at].key && value == all_states_[at++].value;
  });
  if (!same || at != all_states_.size()) return false;
  for (std::size_t i = 0; i < state_items_.size(); ++i) {
    if (i + 2 * kAhead < state_items_.size()) {
      __builtin_prefetch(state_items_[i + 2 * kAhead].mapping);
      PyObject* const mapping = state_items_[i + kAhead].mapping;
      if (mapping && PyDict_CheckExact(mapping)) {
        const auto* keys = reinterpret_cast<const char*>(reinterpret_cast<const PyDictObject*>(mapping)->ma_keys);
        for (int line = 0; line < 3; ++line) __builtin_prefetch(keys + 64 * line);
      }
    }
    if (state_items_[i].mapping && !items_are_unchanged(i)) return false;
  }
  return true;
}

// The state has the same values under the same keys, in the same order.
bool Roster::items_are_unchanged(std::size_t i) const {
  const StateItems& items = state_items_[i];
  const Item* item = items_.data() + items.first;
  const Item* const end = item + items.count;
  const bool same = each_item(items.mapping, [&](PyObject* key, PyObject* value) {
    const bool is_next = item != end && key == item->key && value == item->value;
    ++item;
    return is_next;
  });
  return same && item == end;
}

bool Roster::tensors_are_unchanged(int threads, const std::function<bool()>& meanwhile) {
  if (const Abi* const abi = torch.abi()) {
    const Inspection all{*abi,
                         expectations_.data(),
                         static_cast<std::int64_t>(expectations_.size()),
                         like_.data(),
                         gradients_.data(),
                         addresses_.data(),
                         static_cast<std::int64_t>(entries_.size()),
                         dims_.data()};
    return inspect(all, entries_.size() < kWorthTeam || !may_share_work_ ? 1 : threads, meanwhile);
  }
  for (std::size_t k = 0; k < expectations_.size(); ++k) {
    Geometry now;
    if (!torch.read(expected_[k], Access::kWrite, &now) || !is_expected(now, expectations_[k], dims_.data()))
      return false;
  }
  return meanwhile();
}

void Roster::check(int threads) {
  if (is_still_valid(threads)) return;
  if (PyErr_Occurred()) throw py::error_already_set();
  throw std::runtime_error("a parameter, gradient or state was changed while a step was under way");
}

bool Roster::is_still_valid(int threads) {
  const std::vector<const void*> addresses = addresses_;
  const std::vector<std::size_t> strides = step_strides_;
  const std::vector<std::int64_t> dims = step_dims_;
  forget_addresses();
  if (!tensors_are_unchanged(threads, [] { return true; })) return false;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (gradients_[i] && !addresses_[i] && !find_address(i)) return false;
  }
  return addresses == addresses_ && strides == step_strides_ && dims == step_dims_;
}

// Of a gradient that is not laid out as planned, or has no elements, or that the ABI was not asked of.
bool Roster::find_address(std::size_t i) {
  const GradientExpectation& like = like_[i];
  Geometry g;
  if (!torch.read(Torch::object(gradients_[i]), Access::kRead, &g) || g.conjugated || g.negated) return false;
  const std::int64_t* const shape = dims_.data() + like.shape;
  if (g.dtype != like.dtype || g.device_type != like.device_type || g.device_index != like.device_index ||
      g.ndim != like.ndim || !std::equal(shape, shape + g.ndim, g.shape) || !g.has_memory(like.item_size)) {
    return false;
  }
  addresses_[i] = g.address;
  if (!std::equal(g.strides, g.strides + g.ndim, dims_.data() + like.strides)) {
    step_strides_[i] = step_dims_.size() + 1;
    step_dims_.insert(step_dims_.end(), g.strides, g.strides + g.ndim);
  }
  return true;
}

void Roster::release() {
  for (std::size_t i = 0; i < gradients_.size(); ++i) {
    if (i + kAhead < gradients_.size()) __builtin_prefetch(gradients_[i + kAhead]);
    const Abi::Handle gradient = gradients_[i];
    gradients_[i] = nullptr;  // first: letting go may run Python
    if (gradient) Py_DECREF(Torch::object(gradient));
  }
  forget_addresses();
}

void Roster::forget_addresses() {
  std::fill(addresses_.begin(), addresses_.end(), nullptr);
  if (step_dims_.empty()) return;
  std::fill(step_strides_.begin(), step_strides_.end(), 0);
  step_dims_.clear();
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
  for (const Abi::Handle gradient : gradients_) {
    if (gradient) Py_VISIT(Torch::object(gradient));
  }
  return 0;
}

}  // namespace fusedopt::host
