// What a roster does before every step.
#include <algorithm>
#include <stdexcept>

#include "host/roster.h"

namespace fusedopt::host {
namespace {

// With this many parameters their cache misses outweigh starting a team of threads.
constexpr std::size_t kWorthTeam = 512;
constexpr int kMostAskingScans = 3;        // in a row; then all that come are taken to ask
constexpr std::size_t kEntriesAhead = 16;  // to prefetch: by now the step has driven them out of cache

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

bool is_expected(const Geometry& now, const Expectation& was, const std::int64_t* dims) {
  const std::int64_t* const shape = dims + was.dims;
  return now.address == was.address && now.storage_bytes == was.storage_bytes && now.dtype == was.dtype &&
         now.device_type == was.device_type && now.device_index == was.device_index && now.ndim == was.ndim &&
         !now.conjugated && !now.negated && std::equal(shape, shape + now.ndim, now.shape) &&
         std::equal(shape + now.ndim, shape + 2 * now.ndim, now.strides);
}

}  // namespace

bool Roster::scan(int threads, SourceOf source_of, const void* context) {
  release();
  const bool was_silent = silent_;
  asks_ = false;
  bool valid = read_all(threads, source_of, context);
  if (!valid && was_silent && !silent_) {
    release();
    valid = read_all(threads, source_of, context);
    if (asks_ && ++asking_scans_ < kMostAskingScans) silent_ = valid;  // it need not be asked again
  } else {
    asking_scans_ = 0;
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
  if (!find_parts()) return false;
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

// Of what is spread over ranks as it was, the part that is here now: whichever tensor it is, its memory is compared
// with the planned one like any other's.
bool Roster::find_parts() {
  for (DTensor& t : dtensors_) {
    t.local = py::reinterpret_steal<py::object>(torch.local(t.whole));
    const auto placement = t.local ? py::reinterpret_steal<py::object>(torch.placement(t.whole)) : py::object();
    if (!placement || !placement.is(t.placement) || !torch.is_readable(t.local.ptr())) return false;
    expected_[t.expected] = t.local.ptr();
    expectations_[t.expected].tensor = Torch::handle(t.local.ptr());
    expectations_[t.expected].type = Py_TYPE(t.local.ptr());
  }
  return true;
}

// The part that is here is the tensor that the scan found.
bool Roster::parts_are_unchanged() const {
  return std::all_of(dtensors_.begin(), dtensors_.end(), [](const DTensor& t) {
    const auto now = py::reinterpret_steal<py::object>(torch.local(t.whole));
    return now && now.is(t.local);
  });
}

// Of a gradient of entry i the part that is here, if it is spread as its parameter is. Steals and returns a reference;
// null, perhaps with a Python error, where the gradient is another. Runs no Python while the roster is silent, which it
// is no more if it would have to.
PyObject* Roster::local_gradient(std::size_t i, PyObject* gradient) {
  const auto whole = py::reinterpret_steal<py::object>(gradient);
  if (!torch.is_dtensor(gradient)) return nullptr;
  const auto placement = py::reinterpret_steal<py::object>(torch.placement(gradient));
  if (!placement) return nullptr;
  if (placement.ptr() != gradient_placements_[i].ptr()) {
    asks_ = true;
    if (silent_) {
      silent_ = false;
      return nullptr;
    }
    const auto of_param = py::reinterpret_steal<py::object>(torch.placement(briefs_[i].param));
    if (!of_param || !torch.is_same_placement(placement.ptr(), of_param.ptr())) return nullptr;
    gradient_placements_[i] = placement;
  }
  return torch.local(gradient);
}

bool Roster::fetch_gradients() {
  for (std::size_t i = 0; i < briefs_.size(); ++i) {
    const Brief& brief = briefs_[i];
    if (!brief.is_member) continue;
    PyObject* gradient = torch.grad(brief.param);
    if (gradient && brief.is_dtensor && gradient != Py_None) gradient = local_gradient(i, gradient);
    if (!gradient) return false;
    if (torch.is_readable(gradient)) {
      if (is_lazily_written(gradient, brief.is_complex)) {
        Py_DECREF(gradient);
        return false;
      }
      gradient = torch.resolved(gradient, brief.is_complex);
    }
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

// What a lazily conjugated or negated gradient stands for may change before the step reads it.
bool Roster::is_lazily_written(PyObject* gradient, bool is_complex) const {
  Geometry g;
  return torch.abi() && torch.is_lazy(gradient, is_complex) && torch.read(gradient, Access::kRead, &g) &&
         written_.meets(g.address, g.reach(torch.item_size(g.dtype)));
}

// As the above, but no Python runs: none of the user's, no finalizer, no warning. Where that cannot be, false, and not
// silent any more.
bool Roster::fetch_gradients_silently() {
  const Abi& abi = *torch.abi();
  const NoCollection none;
  if (!can_be_silent()) return silent_ = false;  // since it was asked, a group may have run Python
  for (std::size_t i = 0; i < briefs_.size(); ++i) {
    prefetch_gradient(i);
    Brief& brief = briefs_[i];
    if (!brief.is_member) continue;
    if (Py_TYPE(brief.param) != brief.type) return false;
    bool is_defined;
    if (abi.get_is_defined(abi.gradient(Torch::handle(brief.param)), &is_defined)) return silent_ = false;
    if (!is_defined) continue;
    PyObject* gradient = torch.grad(brief.param);
    if (gradient && brief.is_dtensor) gradient = local_gradient(i, gradient);
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
  if (i + 2 * kEntriesAhead < briefs_.size()) {
    const Brief& far = briefs_[i + 2 * kEntriesAhead];
    __builtin_prefetch(far.param);
    far.parts.prefetch_to_gradient();
    __builtin_prefetch(far.gradient);
  }
  if (i + kEntriesAhead < briefs_.size() && briefs_[i + kEntriesAhead].is_member) {
    const Abi::Handle gradient = abi.gradient(Torch::handle(briefs_[i + kEntriesAhead].param));
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
    if (i + 2 * kEntriesAhead < state_items_.size()) {
      __builtin_prefetch(state_items_[i + 2 * kEntriesAhead].mapping);
      PyObject* const mapping = state_items_[i + kEntriesAhead].mapping;
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
                         dims_.data(),
                         written_};
    return inspect(all, entries_.size() < kWorthTeam || !may_share_work_ ? 1 : threads, meanwhile);
  }
  for (std::size_t k = 0; k < expectations_.size(); ++k) {
    Geometry now;
    if (Py_TYPE(expected_[k]) != expectations_[k].type || !torch.read(expected_[k], Access::kWrite, &now) ||
        !is_expected(now, expectations_[k], dims_.data()))
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
  if (!parts_are_unchanged() || !tensors_are_unchanged(threads, [] { return true; })) return false;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (gradients_[i] && !addresses_[i] && !find_address(i)) return false;
  }
  return addresses == addresses_ && strides == step_strides_ && dims == step_dims_;
}

// Of a gradient that is not laid out as planned, or has no elements, or that the ABI was not asked of.
bool Roster::find_address(std::size_t i) {
  GradientExpectation& like = like_[i];
  Geometry g;
  if (!torch.read(Torch::object(gradients_[i]), Access::kRead, &g) || g.conjugated || g.negated) return false;
  const std::int64_t* const shape = dims_.data() + like.shape;
  if (g.dtype != like.dtype || g.device_type != like.device_type || g.device_index != like.device_index ||
      g.ndim != like.ndim || !std::equal(shape, shape + g.ndim, g.shape) || !g.has_memory(like.item_size)) {
    return false;
  }
  const bool has_planned_strides = std::equal(g.strides, g.strides + g.ndim, dims_.data() + like.strides);
  // Where it was when the plan was made, the planner saw that it may be.
  const bool is_planned = g.address == entries_[i].gradient_address && has_planned_strides;
  if (!is_planned && written_.meets(g.address, g.reach(like.item_size))) return false;
  addresses_[i] = g.address;
  if (!has_planned_strides) {
    step_strides_[i] = step_dims_.size() + 1;
    step_dims_.insert(step_dims_.end(), g.strides, g.strides + g.ndim);
  } else {
    like.address = g.address;
    like.storage_bytes = g.storage_bytes;
  }
  return true;
}

void Roster::release() {
  for (std::size_t i = 0; i < gradients_.size(); ++i) {
    if (i + kEntriesAhead < gradients_.size()) __builtin_prefetch(gradients_[i + kEntriesAhead]);
    const Abi::Handle gradient = gradients_[i];
    gradients_[i] = nullptr;  // first: letting go may run Python
    if (gradient) Py_DECREF(Torch::object(gradient));
  }
  for (DTensor& t : dtensors_) t.local = py::object();
  forget_addresses();
}

void Roster::free_gradients() {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  for (std::size_t i = 0; i < gradients_.size(); ++i) {
    if (gradients_[i] && PyObject_SetAttr(briefs_[i].param, name, Py_None)) throw py::error_already_set();
  }
}

void Roster::increment_versions() const {
  py::list others;
  for (std::size_t i = 0; i < gradients_.size(); ++i) {
    if (gradients_[i] && !torch.increment_version(briefs_[i].param)) others.append(py::handle(briefs_[i].param));
  }
  if (!others.empty()) torch.increment_versions(others);
}

void Roster::forget_addresses() {
  std::fill(addresses_.begin(), addresses_.end(), nullptr);
  if (step_dims_.empty()) return;
  std::fill(step_strides_.begin(), step_strides_.end(), 0);
  step_dims_.clear();
}

}  // namespace fusedopt::host
