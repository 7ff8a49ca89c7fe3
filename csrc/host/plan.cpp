// Building a plan, running it, and what follows a step. Scanning is in scan.cpp.
#include "host/plan.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

#include "host/anatomy.h"

namespace fusedopt::host {
namespace {

constexpr std::int64_t kLargestTile = 262144;  // 1 MiB of fp32 per stream: 5% faster than 256 KiB on fast memory
constexpr std::int64_t kSmallestTile = 4096;
constexpr std::int64_t kTilesWanted = 256;
constexpr std::size_t kAhead = 16;  // tensors to prefetch ahead: by now the step has driven them out of cache
constexpr std::int64_t kWorthThreads = 32768;  // elements below which a second thread costs more than it brings

DLTensor view(PyObject* tensor) {
  DLTensor t;
  if (!torch.view(tensor, &t)) throw py::error_already_set();
  return t;
}

}  // namespace

Plan::Plan(py::list param_groups, py::list groups, py::dict state, const py::set& mine, const py::set& fresh)
    : param_groups_(std::move(param_groups)), state_(std::move(state)) {
  for (std::size_t i = 0; i < groups.size(); ++i) {
    add_group(py::reinterpret_borrow<py::dict>(param_groups_[i]), py::reinterpret_borrow<py::tuple>(groups[i]));
  }
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    for (const py::handle param : groups_[i].params) {
      const py::int_ id(reinterpret_cast<std::uintptr_t>(param.ptr()));
      add_row(i, param.ptr(), mine.contains(id), fresh.contains(id));
    }
  }
  for (const auto& item : state_) state_values_.push_back(py::reinterpret_borrow<py::object>(item.second));
  last_gradients_.resize(entries_.size());
  if (!counts_on_device_) split_into_items();
}

NamedKernel::NamedKernel(std::string rule, std::vector<std::string> states, std::vector<std::string> scalars,
                         std::vector<std::string> hyper)
    : rule(std::move(rule)), states(std::move(states)), scalars(std::move(scalars)), hyper(std::move(hyper)), kernel{} {
  if (this->states.size() > kMaxStates || this->scalars.size() > kMaxScalars || this->hyper.size() > kMaxHyper) {
    throw std::invalid_argument("rule " + this->rule + " has more names than csrc/core/rule.h allows");
  }
  for (const auto* names : {&this->states, &this->scalars, &this->hyper}) {
    for (const std::string& name : *names) pointers.push_back(name.c_str());
  }
  kernel.rule = this->rule.c_str();
  kernel.n_states = static_cast<int>(this->states.size());
  kernel.n_scalars = static_cast<int>(this->scalars.size());
  kernel.n_hyper = static_cast<int>(this->hyper.size());
  kernel.states = pointers.data();
  kernel.scalars = kernel.states + kernel.n_states;
  kernel.hyper = kernel.scalars + kernel.n_scalars;
}

void Plan::add_group(py::dict dict, const py::tuple& spec) {
  Group group;
  group.dict = std::move(dict);
  group.params = py::reinterpret_borrow<py::list>(group.dict["params"]);
  group.held = py::reinterpret_steal<py::list>(PyList_GetSlice(group.params.ptr(), 0, PY_SSIZE_T_MAX));
  group.kernel = py::reinterpret_borrow<py::capsule>(spec[0]).get_pointer<const Kernel>();
  group.kernel_owner = py::reinterpret_borrow<py::object>(spec[0]);
  counts_on_device_ |= !group.kernel->prepare;
  for (const py::handle hyper : spec[1]) {
    const auto h = py::reinterpret_borrow<py::tuple>(hyper);
    group.hyper.push_back({h[0], h[1].cast<Py_ssize_t>(), h[2].cast<double>(), h[3].cast<double>()});
  }
  if (group.hyper.size() != 2 + static_cast<std::size_t>(group.kernel->n_hyper)) {
    throw std::logic_error("hyperparameters do not match the kernel");
  }
  for (const py::handle item : spec[2]) {
    const auto s = py::reinterpret_borrow<py::tuple>(item);
    group.switches.push_back({s[0], s[1].cast<bool>()});
  }
  group.decoupled = spec[3];
  groups_.push_back(std::move(group));
}

void Plan::add_row(std::size_t group, PyObject* param, bool mine, bool fresh) {
  Entry entry{};
  Row row{};
  entry.param = param;
  entry.mine = mine;
  states_.push_back({});
  if (!mine) {
    entries_.push_back(entry);
    rows_.push_back(row);
    return;
  }
  entry.group = static_cast<std::int32_t>(group);
  entry.first = fresh;
  groups_[group].mine = true;

  const DLTensor p = view(param);
  const Geometry geometry(p);
  entry.ndim = p.ndim;
  entry.dims = static_cast<std::uint32_t>(dims_.size());
  dims_.insert(dims_.end(), p.shape, p.shape + p.ndim);
  dims_.insert(dims_.end(), p.strides, p.strides + p.ndim);
  dims_.insert(dims_.end(), p.strides, p.strides + p.ndim);
  device_ = p.device;
  row.kernel = groups_[group].kernel;
  row.numel = geometry.numel();
  row.data[kParam] = address(p);
  row.dtype[kParam] = element_type(p);
  entry.param_item = static_cast<std::uint8_t>(p.dtype.bits / 8);

  Layouts layouts;
  const Layout layout = geometry.layout_of(p);
  if (layout.ndim) layouts.operand[kParam] = layouts.operand[kGrad] = &layouts_.emplace_back(layout);

  entry.gradient_type = p.dtype;
  auto grad = py::reinterpret_steal<py::object>(torch.grad(param));
  if (counts_on_device_ && grad && !grad.is_none()) {
    grad = py::reinterpret_steal<py::object>(resolved(grad.release().ptr()));
  }
  if (!grad) throw py::error_already_set();
  if (!grad.is_none()) {
    const DLTensor g = view(grad.ptr());
    entry.gradient_type = g.dtype;
    if (g.ndim == p.ndim) std::copy_n(g.strides, g.ndim, dims_.end() - g.ndim);
  }
  DLTensor typed = p;
  typed.dtype = entry.gradient_type;
  row.dtype[kGrad] = element_type(typed);
  entry.gradient_item = static_cast<std::uint8_t>(entry.gradient_type.bits / 8);

  entry.ready = add_states(entry, row, layouts, geometry);

  const DType compute = row.dtype[kParam] == DType::f64 ? DType::f64 : DType::f32;
  const int operands = kFirstState + (entry.ready ? row.kernel->n_states : 0);
  entry.direct = true;
  bool dense = true;
  for (int k = 0; k < operands; ++k) {
    entry.direct &= row.dtype[k] == compute && !layouts.operand[k];
    dense &= !layouts.operand[k];
  }
  entry.layouts = dense ? nullptr : &tables_.emplace_back(layouts);
  numel_ += row.numel;
  entries_.push_back(entry);
  rows_.push_back(row);
  const std::int64_t* const strides = dims_.data() + entry.dims + p.ndim;
  const bool usual = !counts_on_device_ || std::equal(strides, strides + p.ndim, strides + p.ndim);
  const bool plain = usual && anatomy.known() && torch.is_plain(param) && p.ndim <= Anatomy::kInlineDims;
  entries_.back().quick = plain && param_stands(entry, row) && state_stands(entries_.size() - 1);
}

// Takes up the parameter's states; false when it has none yet, or not all.
bool Plan::add_states(Entry& entry, Row& row, Layouts& layouts, const Geometry& geometry) {
  const Kernel& kernel = *row.kernel;
  PyObject* dict = PyDict_GetItemWithError(state_.ptr(), entry.param);
  if (!dict && PyErr_Occurred()) throw py::error_already_set();
  if (!dict) return kernel.n_states + kernel.n_scalars == 0;
  StateWatch& state = states_.back();
  state.dict = dict;
  state.first = static_cast<std::uint32_t>(watches_.size());
  Py_ssize_t position = 0;
  for (PyObject *key, *value; PyDict_Next(dict, &position, &key, &value); ++state.count) {
    values_.push_back(py::reinterpret_borrow<py::object>(value));
    watches_.push_back({value, nullptr, 0});
  }
  const auto take = [&](const char* name, DLTensor* out) {
    PyObject* tensor = PyDict_GetItemString(dict, name);
    if (!tensor) return false;
    *out = view(tensor);
    if (row.numel) {
      Watch& watch = *std::find_if(watches_.begin() + state.first, watches_.end(),
                                   [&](const Watch& w) { return w.object == tensor; });
      watch.address = address(*out);
      watch.item_size = out->dtype.bits / 8;
    }
    return true;
  };
  DLTensor s;
  for (int k = 0; k < kernel.n_states; ++k) {
    if (!take(kernel.states[k], &s)) return false;
    row.data[kFirstState + k] = address(s);
    row.dtype[kFirstState + k] = element_type(s);
    const Layout layout = geometry.layout_of(s);
    if (layout.ndim) layouts.operand[kFirstState + k] = &layouts_.emplace_back(layout);
  }
  for (int k = 0; k < kernel.n_scalars; ++k) {
    if (!take(kernel.scalars[k], &s)) return false;
    entry.scalars[k] = {address(s), element_type(s) == DType::f64};
  }
  return true;
}

// Near-equal pieces whatever the tensors' sizes: large tensors are split, small ones share a bundle.
void Plan::split_into_items() {
  const std::int64_t wanted = (numel_ / kTilesWanted + 1023) / 1024 * 1024;
  const std::int64_t tile = std::clamp(wanted, kSmallestTile, kLargestTile);
  std::int64_t room = 0;
  for (std::size_t r = 0; r < rows_.size(); ++r) {
    for (std::int64_t begin = 0; begin < rows_[r].numel; begin += tile) {
      const std::int64_t count = std::min(tile, rows_[r].numel - begin);
      if (count > room) {
        bundles_.push_back(static_cast<std::int64_t>(items_.size()));
        room = tile;
      }
      items_.push_back({static_cast<std::int32_t>(r), static_cast<std::int32_t>(count), begin});
      room -= count;
    }
  }
  bundles_.push_back(static_cast<std::int64_t>(items_.size()));
  partials_.resize(bundles_.size());
}

py::tuple Plan::run(const py::capsule& engine, int threads, double inverse_scale, double max_norm, bool measure,
                    bool update, bool skip_nonfinite, double squared_norm) {
  auto* const entry = reinterpret_cast<void (*)(Job&)>(engine.get_pointer<void>());
  Job job{};
  job.rows = rows_.data();
  job.items = items_.data();
  job.bundles = bundles_.data();
  job.n_bundles = static_cast<std::int64_t>(bundles_.size()) - 1;
  job.cohorts = cohorts_.data();
  job.partials = partials_.data();
  job.threads = numel_ < kWorthThreads ? 1 : threads;
  job.measure = measure;
  job.update = update;
  job.skip_nonfinite = skip_nonfinite;
  job.inverse_scale = inverse_scale;
  job.max_norm = max_norm;
  job.squared_norm = squared_norm;
  {
    py::gil_scoped_release release;
    entry(job);
  }
  return py::make_tuple(job.squared_norm, job.skipped);
}

bool Plan::write(const py::handle& live) const {
  const DLTensor table = view(live.ptr());
  auto* out = reinterpret_cast<std::int64_t*>(address(table));
  const std::size_t words = rows_.size() + std::accumulate(groups_.begin(), groups_.end(), std::size_t{0},
                                                           [](std::size_t sum, const Group& group) {
                                                             return sum + 2 * group.hyper.size() + 2;
                                                           });
  if (table.dtype.code != kDLInt || table.dtype.bits != 64 || table.ndim != 1 || table.device.device_type != kDLCPU ||
      table.shape[0] != static_cast<std::int64_t>(words)) {
    throw std::invalid_argument("the table must be a CPU int64 tensor of " + std::to_string(words) + " elements");
  }
  std::int64_t changed = 0;
  const auto put = [&](std::int64_t word) {
    changed |= *out ^ word;
    *out++ = word;
  };
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const auto given = reinterpret_cast<std::int64_t>(rows_[i].data[kGrad]);
    put(rows_[i].active ? (rows_[i].numel ? given : 2) + entries_[i].first : 0);
  }
  for (const Group& group : groups_) {
    for (std::size_t k = 0; k < group.hyper.size(); ++k) {
      put(std::bit_cast<std::int64_t>(group.values[k]));
      put(group.sources[k]);
    }
    put(group.is_decoupled);
    put(group.common.sign < 0 ? -1 : 1);
  }
  return changed != 0;
}

void Plan::commit() {
  if (counts_on_device_) {
    for (std::size_t i = 0; i < rows_.size(); ++i) entries_[i].first &= !rows_[i].active;
    return;
  }
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (i + kAhead < rows_.size()) __builtin_prefetch(entries_[i + kAhead].scalars[0].address, 1);
    if (!rows_[i].active) continue;
    const CohortKey& key = cohort_keys_[static_cast<std::size_t>(rows_[i].cohort)];
    for (int k = 0; k < rows_[i].kernel->n_scalars; ++k) {
      const Scalar& scalar = entries_[i].scalars[k];
      if (scalar.wide) {
        *static_cast<double*>(scalar.address) = key.after[k];
      } else {
        *static_cast<float*>(scalar.address) = static_cast<float>(key.after[k]);
      }
    }
    entries_[i].first = false;
  }
}

void Plan::release_gradients() {
  for (std::size_t i = 0; i < gradients_.size(); ++i) {
    if (i + kAhead < gradients_.size()) __builtin_prefetch(gradients_[i + kAhead], 1);
    Py_XDECREF(gradients_[i]);
  }
  gradients_.clear();
}

int Plan::traverse(visitproc visit, void* arg) const {
  Py_VISIT(param_groups_.ptr());
  Py_VISIT(state_.ptr());
  for (const Group& group : groups_) {
    Py_VISIT(group.dict.ptr());
    Py_VISIT(group.params.ptr());
    Py_VISIT(group.held.ptr());
  }
  for (const py::object& value : values_) Py_VISIT(value.ptr());
  for (const py::object& value : state_values_) Py_VISIT(value.ptr());
  for (PyObject* gradient : gradients_) Py_VISIT(gradient);
  return 0;
}

}  // namespace fusedopt::host
