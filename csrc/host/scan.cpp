// Plan::scan: what the host does in each step.
#include <algorithm>
#include <atomic>
#include <iterator>

#include "host/anatomy.h"
#include "host/plan.h"

namespace fusedopt::host {
namespace {

// With this many tensors their cache misses outweigh starting a team of threads.
constexpr std::size_t kWorthTeam = 512;
// A float counter stops at 2^24; the plan is then built anew with a double one.
constexpr double kLastFloatStep = 16777216;
// Cohorts are looked for among the newest only; a missed match costs one more prepare.
constexpr std::size_t kCohortsSearched = 16;

bool read_number(PyObject* value, double* out) {
  if (PyFloat_CheckExact(value)) {
    *out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  PyObject* number = PyNumber_Float(value);  // int, bool, one-element tensor
  if (!number) return false;
  *out = PyFloat_AS_DOUBLE(number);
  Py_DECREF(number);
  return true;
}

double read_scalar(const Scalar& s) {
  return s.wide ? *static_cast<const double*>(s.address) : *static_cast<const float*>(s.address);
}

bool same_type(const DLDataType& a, const DLDataType& b) { return a.code == b.code && a.bits == b.bits; }

// Whether an operand's elements, or their parts, do not lie at multiples of their size.
bool misaligned(const Row& row, int operand) {
  constexpr std::uintptr_t sizes[] = {4, 8, 2, 2};  // in the order of DType
  return reinterpret_cast<std::uintptr_t>(row.data[operand]) % sizes[static_cast<int>(row.dtype[operand])] != 0;
}

bool truth(PyObject* value) {
  const int on = PyObject_IsTrue(value);
  if (on < 0) PyErr_Clear();
  return on > 0;
}

}  // namespace

PyObject* resolved(PyObject* g) {
  for (const char* method : {"resolve_conj", "resolve_neg"}) {
    PyObject* next = PyObject_CallMethod(g, method, nullptr);
    Py_DECREF(g);
    if (!next) return nullptr;
    g = next;
  }
  return g;
}

bool Plan::scan() {
  release_gradients();
  step_layouts_.clear();
  step_tables_.clear();
  cohorts_.clear();
  cohort_keys_.clear();
  const bool stands = groups_stand() && states_stand() && read_all();
  if (PyErr_Occurred()) PyErr_Clear();  // building anew finds the cause and says it
  if (!stands) release_gradients();
  return stands;
}

bool Plan::read_all() {
  gradients_.assign(entries_.size(), nullptr);
  unusual_.clear();
  if (entries_.size() >= kWorthTeam) {
    if (!read_in_team()) return false;
  } else {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i].quick && !state_stands(i)) return false;
      if (!read_entry(i)) return false;
    }
  }
  for (const std::size_t i : unusual_) {
    if (!read_unusual(i)) return false;
  }
  return true;
}

// This thread, which holds the GIL, reads the gradients. The others meanwhile look whether states
// stand: they only read objects that the GIL keeps still, and change no reference count. What may run
// Python code waits in unusual_ until they are done.
bool Plan::read_in_team() {
  constexpr std::ptrdiff_t block = 64;
  const auto n = static_cast<std::ptrdiff_t>(entries_.size());
  std::atomic<std::ptrdiff_t> next{0};
  std::atomic<bool> stands{true};
#pragma omp parallel
  {
#pragma omp master
    for (std::ptrdiff_t i = 0; stands && i < n; ++i) {
      prefetch_gradient(static_cast<std::size_t>(i));
      if (!read_entry(static_cast<std::size_t>(i))) stands = false;
    }
    for (std::ptrdiff_t begin; stands && (begin = next.fetch_add(block)) < n;) {
      for (std::ptrdiff_t i = begin; i < std::min(begin + block, n); ++i) {
        prefetch_states(static_cast<std::size_t>(i));
        if (entries_[i].quick && !state_stands(static_cast<std::size_t>(i))) stands = false;
      }
    }
  }
  return stands;
}

// Tensors of many small parameters do not fit in cache. Their misses overlap when each stage works some
// tensors ahead of the next. The gradient's place is a guess: torch's allocator likes to reuse places.
void Plan::prefetch_gradient(std::size_t i) const {
  constexpr std::size_t object = 24, impl = 16, storage = 8;
  if (i + object < entries_.size()) {
    __builtin_prefetch(entries_[i + object].param);
    __builtin_prefetch(entries_[i + object].scalars[0].address, 1);
    Anatomy::prefetch(last_gradients_[i + object]);
    anatomy.prefetch_impl(entries_[i + impl].param);
    anatomy.prefetch_storage(entries_[i + storage].param);
  }
}

void Plan::prefetch_states(std::size_t i) const {
  constexpr std::size_t object = 12, impl = 8, storage = 4;
  if (i + object >= states_.size()) return;
  const auto each = [&](std::size_t at, auto call) {
    const StateWatch& state = states_[at];
    for (std::uint32_t k = state.first; k < state.first + state.count; ++k) {
      if (watches_[k].address) call(watches_[k].object);
    }
  };
  each(i + object, [](PyObject* t) { __builtin_prefetch(t); });
  each(i + impl, [](PyObject* t) { anatomy.prefetch_address(t); });
  each(i + storage, [](PyObject* t) { anatomy.prefetch_storage(t); });
  __builtin_prefetch(states_[i + object].dict);
  if (const auto* dict = reinterpret_cast<const PyDictObject*>(states_[i + impl].dict)) {
    const char* keys = reinterpret_cast<const char*>(dict->ma_keys);
    for (int line = 0; line < 3; ++line) __builtin_prefetch(keys + 64 * line);
  }
}

bool Plan::groups_stand() {
  if (param_groups_.size() != groups_.size()) return false;
  std::size_t i = 0;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    if (PyList_GET_ITEM(param_groups_.ptr(), g) != group.dict.ptr()) return false;
    static PyObject* const params = PyUnicode_InternFromString("params");
    if (PyDict_GetItemWithError(group.dict.ptr(), params) != group.params.ptr()) return false;
    if (group.params.size() != group.held.size()) return false;
    for (std::size_t k = 0; k < group.held.size(); ++k, ++i) {
      if (PyList_GET_ITEM(group.params.ptr(), k) != entries_[i].param) return false;
    }
    if (group.mine && !read_group(group)) return false;
  }
  return true;
}

bool Plan::read_group(Group& group) const {
  static PyObject* const maximize_key = PyUnicode_InternFromString("maximize");
  PyObject* const dict = group.dict.ptr();
  double* const numbers = group.values;
  for (std::size_t k = 0; k < group.hyper.size(); ++k) {
    const HyperKey& h = group.hyper[k];
    PyObject* value = PyDict_GetItemWithError(dict, h.key.ptr());
    if (!value) return false;
    if (h.index >= 0) {
      if (!PyTuple_Check(value) && !PyList_Check(value)) return false;
      if (PySequence_Fast_GET_SIZE(value) <= h.index) return false;
      value = PySequence_Fast_GET_ITEM(value, h.index);
    }
    group.sources[k] = 0;
    if (counts_on_device_ && find_source(value, &group.sources[k])) {
      numbers[k] = 0;
      continue;
    }
    if (!read_number(value, &numbers[k]) || !(numbers[k] >= h.low && numbers[k] <= h.high)) return false;
  }
  for (const Switch& s : group.switches) {
    PyObject* value = PyDict_GetItemWithError(dict, s.key.ptr());
    if (!value || truth(value) != s.on) return false;
  }
  PyObject* maximize = PyDict_GetItemWithError(dict, maximize_key);
  if (!maximize) return false;
  bool decoupled = group.decoupled.ptr() == Py_True;
  if (PyUnicode_Check(group.decoupled.ptr())) {
    PyObject* flag = PyDict_GetItemWithError(dict, group.decoupled.ptr());
    if (!flag) return false;
    decoupled = truth(flag);
  }
  const double lr = numbers[0], weight_decay = numbers[1];
  group.common.lr = lr;
  group.common.coupled_decay = decoupled ? 0 : weight_decay;
  group.common.keep = decoupled ? 1 - lr * weight_decay : 1;
  group.common.sign = truth(maximize) ? -1 : 1;
  group.is_decoupled = decoupled;
  return true;
}

// A one-element tensor on the device of the plan is read there, so that nothing waits for it.
bool Plan::find_source(PyObject* value, std::int64_t* source) const {
  DLTensor t;
  if (PyFloat_CheckExact(value) || !torch.is_plain(value)) return false;
  if (!torch.view(value, &t)) {
    PyErr_Clear();
    return false;
  }
  const bool here = t.device.device_type == device_.device_type && t.device.device_id == device_.device_id;
  const bool is_float = t.dtype.code == kDLFloat && (t.dtype.bits == 32 || t.dtype.bits == 64);
  if (!here || !is_float || std::any_of(t.shape, t.shape + t.ndim, [](std::int64_t n) { return n != 1; })) return false;
  *source = reinterpret_cast<std::int64_t>(address(t)) | (t.dtype.bits == 64);
  return true;
}

// The same state dicts as before, in the same order. No hashing, no look-ups.
bool Plan::states_stand() const {
  if (static_cast<std::size_t>(PyDict_GET_SIZE(state_.ptr())) != state_values_.size()) return false;
  Py_ssize_t position = 0;
  std::size_t i = 0;
  for (PyObject *key, *value; PyDict_Next(state_.ptr(), &position, &key, &value); ++i) {
    if (value != state_values_[i].ptr()) return false;
  }
  return true;
}

bool Plan::param_stands(const Entry& entry, const Row& row) const {
  if (!anatomy.has_dims(entry.param, entry.ndim, dims_.data() + entry.dims)) return false;
  return !row.numel || anatomy.address(entry.param, entry.param_item) == row.data[kParam];
}

// The state dict has the same values as before, in the same order.
bool Plan::values_stand(const StateWatch& state) const {
  if (!state.dict) return true;
  if (PyDict_GET_SIZE(state.dict) != static_cast<Py_ssize_t>(state.count)) return false;
  Py_ssize_t position = 0;
  const Watch* watch = watches_.data() + state.first;
  for (PyObject *key, *value; PyDict_Next(state.dict, &position, &key, &value); ++watch) {
    if (value != watch->object) return false;
  }
  return true;
}

bool Plan::state_stands(std::size_t i) const {
  const StateWatch& state = states_[i];
  if (!values_stand(state)) return false;
  for (std::uint32_t k = state.first; k < state.first + state.count; ++k) {
    const Watch& watch = watches_[k];
    if (watch.address && anatomy.address(watch.object, watch.item_size) != watch.address) return false;
  }
  return true;
}

// Nothing that the row's addresses rely on has changed; found by asking torch.
bool Plan::entry_stands_slowly(std::size_t i) const {
  const StateWatch& state = states_[i];
  DLTensor t;
  if (!values_stand(state) || !torch.view(entries_[i].param, &t)) return false;
  if (address(t) != rows_[i].data[kParam] || !has_dims(t, entries_[i])) return false;
  for (std::uint32_t k = state.first; k < state.first + state.count; ++k) {
    const Watch& watch = watches_[k];
    if (watch.address && !(torch.view(watch.object, &t) && address(t) == watch.address)) return false;
  }
  return true;
}

bool Plan::has_dims(const DLTensor& t, const Entry& entry) const {
  if (t.ndim != entry.ndim) return false;
  const std::int64_t* dims = dims_.data() + entry.dims;
  return std::equal(t.shape, t.shape + t.ndim, dims) && std::equal(t.strides, t.strides + t.ndim, dims + t.ndim);
}

// Takes a reference to the parameter's gradient, if it has one.
bool Plan::fetch_gradient(std::size_t i) {
  const Entry& entry = entries_[i];
  PyObject* g = torch.grad(entry.param);
  if (!g) return false;
  rows_[i].active = g != Py_None;
  if (!rows_[i].active) {
    Py_DECREF(g);
    return true;
  }
  gradients_[i] = g;
  return entry.ready;
}

// Looks whether the parameter stands, writes its gradient's address into the row, and finds the row's cohort.
// What the anatomy cannot vouch for is left to read_unusual.
bool Plan::read_entry(std::size_t i) {
  Row& row = rows_[i];
  const Entry& entry = entries_[i];
  if (!entry.quick) {
    if (entry.mine) unusual_.push_back(i);
    return true;
  }
  if (!param_stands(entry, row) || !fetch_gradient(i)) return false;
  PyObject* const g = gradients_[i];
  if (!g) return true;
  last_gradients_[i] = anatomy.places(g);
  if (anatomy.kind(g) != entry.gradient_kind || !anatomy.has_dims(g, entry.ndim, dims_.data() + entry.dims)) {
    unusual_.push_back(i);
    return true;
  }
  row.data[kGrad] = const_cast<char*>(anatomy.address(g, entry.gradient_item));
  if (misaligned(row, kGrad)) return false;
  row.layouts = entry.layouts;
  row.direct = entry.direct;
  return join_cohort(entry, row);
}

// The same by asking torch. The gradient may not fit at all, be lazily negated or conjugated, or laid out
// otherwise than its parameter.
bool Plan::read_unusual(std::size_t i) {
  Entry& entry = entries_[i];
  Row& row = rows_[i];
  if (!entry.quick && !(entry_stands_slowly(i) && fetch_gradient(i))) return false;
  PyObject* const given = gradients_[i];
  if (!given) return true;
  gradients_[i] = resolved(given);
  DLTensor g;
  if (!gradients_[i] || !torch.view(gradients_[i], &g)) return false;
  if (g.device.device_type != device_.device_type || g.device.device_id != device_.device_id) return false;
  if (!same_type(g.dtype, entry.gradient_type)) return false;
  const std::int64_t* shape = dims_.data() + entry.dims;
  if (g.ndim != entry.ndim || !std::equal(shape, shape + g.ndim, g.shape)) return false;
  if (entry.quick && gradients_[i] == given) entry.gradient_kind = anatomy.kind(given);
  row.data[kGrad] = address(g);
  if (misaligned(row, kGrad)) return false;
  if (counts_on_device_) return strides_planned(g, entry) && join_cohort(entry, row);
  row.layouts = entry.layouts;
  row.direct = entry.direct;
  const Layout layout = Geometry(g, shape + g.ndim).layout_of(g);
  const Layout* const usual = entry.layouts ? entry.layouts->operand[kGrad] : nullptr;
  if (layout.ndim || usual) {
    Layouts table = entry.layouts ? *entry.layouts : Layouts{};
    table.operand[kGrad] = layout.ndim ? &step_layouts_.emplace_back(layout) : nullptr;
    row.layouts = &step_tables_.emplace_back(table);
    row.direct = false;
  }
  return join_cohort(entry, row);
}

// Tables on a device have the strides of the gradient that was there when they were made.
bool Plan::strides_planned(const DLTensor& gradient, const Entry& entry) const {
  const std::int64_t* planned = dims_.data() + entry.dims + 2 * entry.ndim;
  std::int64_t* const end = gradient.shape + gradient.ndim;
  if (std::find(gradient.shape, end, std::int64_t{0}) != end) return true;
  for (int d = 0; d < gradient.ndim; ++d) {
    if (gradient.shape[d] != 1 && gradient.strides[d] != planned[d]) return false;
  }
  return true;
}

// Puts a row with a gradient into the cohort of its group with equal counters; false when a counter must be widened.
bool Plan::join_cohort(const Entry& entry, Row& row) {
  const Kernel& kernel = *row.kernel;
  if (counts_on_device_) return true;
  CohortKey key{entry.group, entry.first, {}, {}};
  for (int k = 0; k < kernel.n_scalars; ++k) {
    key.before[k] = read_scalar(entry.scalars[k]);
    if (!entry.scalars[k].wide && key.before[k] >= kLastFloatStep) return false;
  }
  const std::size_t oldest = cohort_keys_.size() > kCohortsSearched ? cohort_keys_.size() - kCohortsSearched : 0;
  for (std::size_t c = cohort_keys_.size(); c-- > oldest;) {
    const CohortKey& other = cohort_keys_[c];
    if (other.group == key.group && other.first == key.first &&
        std::equal(key.before, std::end(key.before), other.before)) {
      row.cohort = static_cast<std::int32_t>(c);
      return true;
    }
  }
  const Group& group = groups_[static_cast<std::size_t>(entry.group)];
  Cohort cohort = group.common;
  std::copy(std::begin(key.before), std::end(key.before), key.after);
  if (kernel.n_scalars) key.after[0] += 1;  // `step` comes first
  kernel.prepare(group.values + 2, key.after, key.first, cohort.coefficients);
  cohorts_.push_back(cohort);
  cohort_keys_.push_back(key);
  row.cohort = static_cast<std::int32_t>(cohorts_.size()) - 1;
  return true;
}

}  // namespace fusedopt::host
