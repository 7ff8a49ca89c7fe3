#include "host/cpu_job.h"

#include <algorithm>
#include <iterator>

#include "host/walk_order.h"

namespace fusedopt::host {
namespace {

constexpr std::int64_t kLargestTile = 262144;  // 1 MiB of fp32 per stream: 5% faster than 256 KiB on fast memory
constexpr std::int64_t kSmallestTile = 4096;
constexpr std::int64_t kTilesWanted = 256;
constexpr std::size_t kCountersAhead = 16;     // to prefetch
constexpr std::int64_t kWorthThreads = 32768;  // elements below which a second thread costs more than it brings
// A float counter stops at 2^24; the job is then made anew with a double one.
constexpr double kLastFloatStep = 16777216;
// Cohorts are looked for among the newest only; a missed match costs one more prepare.
constexpr std::size_t kCohortsSearched = 16;

}  // namespace

void CpuJob::Counter::write(double value) const {
  if (wide) {
    *static_cast<double*>(address) = value;
  } else {
    *static_cast<float*>(address) = static_cast<float>(value);
  }
}

CpuJob::CpuJob(py::object param_groups, const py::list& groups, py::object state,
               const std::vector<std::size_t>& members, const std::vector<std::size_t>& new_state)
    : roster_(std::move(param_groups), groups, std::move(state), members, new_state) {
  for (std::size_t i = 0; i < roster_.size(); ++i) add_row(roster_.entry(i));
  split_into_items();
}

void CpuJob::add_row(const Entry& entry) {
  Row row{};
  Counters counters{};
  Layouts layouts;
  bool is_dense = true;
  if (entry.is_member && entry.is_steppable) {
    row.kernel = &roster_.group(static_cast<std::size_t>(entry.group)).kernel();
    const std::int64_t* const shape = roster_.dims(entry.param.dims);
    const WalkOrder order(entry.ndim, shape, shape + entry.ndim, entry.param.is_complex);
    const auto take = [&](int operand, DType dtype, void* address, const std::int64_t* strides) {
      row.data[operand] = address;
      row.dtype[operand] = dtype;
      const Layout layout = order.layout_of(strides);
      if (layout.ndim) layouts.operand[operand] = &layouts_.emplace_back(layout);
      is_dense &= !layout.ndim;
    };
    row.numel = order.numel();
    take(kParam, entry.param.dtype, entry.param.address, shape + entry.ndim);
    take(kGrad, entry.gradient_dtype, nullptr, roster_.dims(entry.gradient_strides));
    for (int k = 0; k < row.kernel->n_states; ++k) {
      const Member& state = entry.states[k];
      take(kFirstState + k, state.dtype, state.address, roster_.dims(state.dims) + entry.ndim);
    }
    const DType compute = row.dtype[kParam] == DType::f64 ? DType::f64 : DType::f32;
    row.in_place = is_dense && std::all_of(row.dtype, row.dtype + kFirstState + row.kernel->n_states,
                                           [&](DType dtype) { return dtype == compute; });
    for (int k = 0; k < row.kernel->n_scalars; ++k) {
      counters.of[k] = {entry.scalars[k].address, entry.scalars[k].dtype == DType::f64};
    }
  }
  if (!is_dense) row.layouts = &tables_.emplace_back(layouts);
  numel_ += row.numel;
  rows_.push_back(row);
  counters_.push_back(counters);
  planned_layouts_.push_back(row.layouts);
  planned_in_place_.push_back(row.in_place);
}

// Near-equal pieces whatever the tensors' sizes: large tensors are split, small ones share a bundle.
void CpuJob::split_into_items() {
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

bool CpuJob::scan(int threads) {
  stepped_ = false;
  if (!roster_.scan(threads, nullptr, nullptr)) return false;
  if (make_cohorts(Room::kForStep)) return true;
  release();
  return false;
}

// Brings this step's gradients into the rows, and rows that advance together under the same hyperparameters into
// cohorts, which share what their kernel prepares. False if a counter has not the room that is asked for.
bool CpuJob::make_cohorts(Room room) {
  cohorts_.clear();
  cohort_keys_.clear();
  if (!step_tables_.empty()) {
    step_layouts_.clear();
    step_tables_.clear();
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      rows_[i].layouts = planned_layouts_[i];
      rows_[i].in_place = planned_in_place_[i];
    }
  }
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (i + kCountersAhead < rows_.size()) __builtin_prefetch(counters_[i + kCountersAhead].of[0].address, 1);
    Row& row = rows_[i];
    row.active = roster_.has_gradient(i);
    row.data[kGrad] = const_cast<void*>(roster_.gradient_address(i));
    if (!row.active) continue;
    if (roster_.gradient_strides(i)) lay_out(i);
    if (!join_cohort(i, room)) return false;
  }
  return true;
}

// A gradient that is laid out otherwise than planned has a layout for this step.
void CpuJob::lay_out(std::size_t i) {
  const Entry& entry = roster_.entry(i);
  const std::int64_t* const shape = roster_.dims(entry.param.dims);
  const WalkOrder order(entry.ndim, shape, shape + entry.ndim, entry.param.is_complex);
  const Layout layout = order.layout_of(roster_.gradient_strides(i));
  Row& row = rows_[i];
  const Layout* const planned = row.layouts ? row.layouts->operand[kGrad] : nullptr;
  if (!layout.ndim && !planned) return;  // strides that do not matter
  Layouts table = row.layouts ? *row.layouts : Layouts{};
  table.operand[kGrad] = layout.ndim ? &step_layouts_.emplace_back(layout) : nullptr;
  row.layouts = &step_tables_.emplace_back(table);
  row.in_place = false;
}

bool CpuJob::join_cohort(std::size_t i, Room room) {
  Row& row = rows_[i];
  const Kernel& kernel = *row.kernel;
  CohortKey key{static_cast<std::int32_t>(roster_.group_of(i)), roster_.has_new_state(i), {}, {}};
  for (int k = 0; k < kernel.n_scalars; ++k) {
    const Counter& counter = counters_[i].of[k];
    key.before[k] = counter.read();
    if (room == Room::kForStep && !counter.wide && key.before[k] >= kLastFloatStep) return false;
  }
  const std::size_t oldest = cohort_keys_.size() > kCohortsSearched ? cohort_keys_.size() - kCohortsSearched : 0;
  for (std::size_t c = cohort_keys_.size(); c-- > oldest;) {
    const CohortKey& other = cohort_keys_[c];
    if (other.group == key.group && other.new_state == key.new_state &&
        std::equal(key.before, std::end(key.before), other.before)) {
      row.cohort = static_cast<std::int32_t>(c);
      return true;
    }
  }
  const Group& group = roster_.group(roster_.group_of(i));
  Cohort cohort = group.common;
  std::copy(std::begin(key.before), std::end(key.before), key.after);
  if (kernel.n_scalars) key.after[0] += 1;  // `step` comes first
  kernel.prepare(group.values + 2, key.after, key.new_state, cohort.coefficients);
  cohorts_.push_back(cohort);
  cohort_keys_.push_back(key);
  row.cohort = static_cast<std::int32_t>(cohorts_.size()) - 1;
  return true;
}

py::object CpuJob::step(const py::capsule& engine, int threads, double inverse_scale, double max_norm, bool measure,
                        bool skip_nonfinite) {
  if (!scan(threads)) return py::none();
  return launch(engine, threads, inverse_scale, max_norm, measure, /*update=*/true, skip_nonfinite, /*squared_norm=*/0);
}

py::tuple CpuJob::run(const py::capsule& engine, int threads, double inverse_scale, double max_norm, bool measure,
                      bool update, bool skip_nonfinite, double squared_norm) {
  roster_.check(threads);
  if (update) make_cohorts(Room::kAny);  // again: another part of the step may have advanced the same counters
  return launch(engine, threads, inverse_scale, max_norm, measure, update, skip_nonfinite, squared_norm);
}

py::tuple CpuJob::launch(const py::capsule& engine, int threads, double inverse_scale, double max_norm, bool measure,
                         bool update, bool skip_nonfinite, double squared_norm) {
  auto* const entry = reinterpret_cast<void (*)(Job&)>(engine.get_pointer<void>());
  Job job{};
  job.threads = numel_ < kWorthThreads ? 1 : threads;
  job.inverse_scale = inverse_scale;
  job.max_norm = max_norm;
  job.measure = measure;
  job.update = update;
  job.skip_nonfinite = skip_nonfinite;
  job.squared_norm = squared_norm;
  job.rows = rows_.data();
  job.items = items_.data();
  job.bundles = bundles_.data();
  job.n_bundles = static_cast<std::int64_t>(bundles_.size()) - 1;
  job.cohorts = cohorts_.data();
  job.partials = partials_.data();
  {
    py::gil_scoped_release release;
    entry(job);
  }
  if (job.update && !job.skipped) advance_counters();
  return py::make_tuple(job.squared_norm, job.skipped);
}

void CpuJob::advance_counters() {
  stepped_ = true;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (i + kCountersAhead < rows_.size()) __builtin_prefetch(counters_[i + kCountersAhead].of[0].address, 1);
    if (!rows_[i].active) continue;
    const CohortKey& key = cohort_keys_[static_cast<std::size_t>(rows_[i].cohort)];
    for (int k = 0; k < rows_[i].kernel->n_scalars; ++k) counters_[i].of[k].write(key.after[k]);
    roster_.set_stepped(i);
  }
}

void CpuJob::release() { roster_.release(); }

}  // namespace fusedopt::host
