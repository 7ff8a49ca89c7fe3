#include "host/cpu_job.h"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace fusedopt::host {
namespace {

constexpr std::int64_t kLargestShare = 262144;  // 1 MiB of fp32 per stream: 5% faster than 256 KiB on fast memory
constexpr std::int64_t kSmallestShare = 4096;
constexpr std::int64_t kSharesWanted = 256;
constexpr std::int64_t kCut = 1024;            // shares begin at multiples of it in a row
constexpr std::size_t kCountersAhead = 16;     // to prefetch
constexpr std::int64_t kWorthThreads = 32768;  // elements below which a second thread costs more than it brings
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
               const std::vector<std::size_t>& members, const std::vector<std::size_t>& new_state,
               const std::vector<std::size_t>& new_average, bool in_channels)
    : roster_(std::move(param_groups), groups, std::move(state), members, new_state, new_average),
      in_channels_(in_channels) {
  if (roster_.groups()) n_scalars_ = roster_.group(0).kernel().names.scalars.size();  // all groups have one rule
  std::size_t n_operands = 0;
  for (std::size_t i = 0; i < roster_.size(); ++i) {
    n_operands += 2 * (kFirstState + roster_.kernel(roster_.entry(i)).names.states.size() + 1);
  }
  addresses_.reserve(n_operands);  // rows point into it
  for (std::size_t i = 0; i < roster_.size(); ++i) add_row(roster_.entry(i));
  cut_into_shares();
}

void CpuJob::add_row(const Entry& entry) {
  Row row{};
  counters_.resize(counters_.size() + n_scalars_);
  own_counters_.push_back({});
  if (entry.is_member && entry.is_steppable) {
    row.kernel = &roster_.kernel(entry);
    add_operands(entry, row);
    if (const Member* const counter = roster_.counter(entry)) {
      own_counters_.back() = {counter->address, counter->dtype == DType::f64};
    }
    Counter* counter = counters_.data() + counters_.size() - n_scalars_;
    for (const Member& scalar : roster_.scalars(entry)) *counter++ = {scalar.address, scalar.dtype == DType::f64};
  }
  numel_ += row.numel;
  rows_.push_back(row);
  planned_layouts_.push_back(row.layouts);
}

WalkOrder CpuJob::order_of(const Entry& entry) const {
  const std::int64_t* const shape = roster_.dims(entry.param.dims);
  bool has_blocks = false;
  for (const Member& state : roster_.states(entry)) has_blocks |= state.dtype == DType::u8;
  const By by = has_blocks ? By::kLogicalOrder : in_channels_ ? By::kSlices : By::kStrides;
  return WalkOrder(entry.ndim, shape, shape + entry.ndim, entry.param.is_complex, by);
}

// In the order of their roles, then the average.
std::vector<CpuJob::Operand> CpuJob::operands_of(const Entry& entry) const {
  const Group& group = roster_.group(static_cast<std::size_t>(entry.group));
  const auto strides = [&](const Member& m) { return roster_.dims(m.dims) + entry.ndim; };
  const auto plain_operand = [&](const Member& m) {
    return Operand{plain(m.dtype), m.address, nullptr, strides(m), nullptr};
  };
  std::vector<Operand> all{plain_operand(entry.param),
                           {plain(entry.gradient_dtype), nullptr, nullptr, roster_.dims(entry.gradient_strides), {}}};
  if (const Member* const master = roster_.master(entry)) {
    const Codec whole = entry.param.dtype == DType::bf16 ? Codec::master_bf16 : Codec::master_f16;
    all[kParam].codec = group.master() == Master::kSplit ? Codec::split : whole;
    all[kParam].partner = master->address;
    all[kParam].partner_strides = strides(*master);
  }
  const auto rounds = [&](Operand& operand) {
    if (group.master() == Master::kStochastic && operand.codec == Codec::bf16) operand.codec = Codec::stochastic;
  };
  rounds(all[kParam]);
  for (std::size_t k = 0; k < roster_.states(entry).size(); ++k) {
    all.push_back(plain_operand(roster_.states(entry)[k]));
    rounds(all.back());
    if (const Member* const scales = roster_.scales(entry, k)) {
      all.back().codec = group.is_signed(k) ? Codec::q8_signed : Codec::q8_unsigned;
      all.back().partner = scales->address;
    }
  }
  if (const Member* const average = roster_.average(entry)) all.push_back(plain_operand(*average));
  return all;
}

void CpuJob::add_operands(const Entry& entry, Row& row) {
  const WalkOrder order = order_of(entry);
  const std::vector<Operand> operands = operands_of(entry);
  const std::size_t n = operands.size(), first = addresses_.size();
  LayoutTable layouts(2 * n);
  const auto lay_out = [&](std::size_t at, const std::int64_t* strides) {
    const Layout layout = strides ? order.layout_of(strides) : Layout();
    if (layout.ndim) layouts[at] = &layouts_.emplace_back(layout);
  };
  std::vector<Codec> signature;
  bool has_partners = false;
  for (std::size_t k = 0; k < n; ++k) {
    signature.push_back(operands[k].codec);
    addresses_.push_back(operands[k].address);
    lay_out(k, operands[k].strides);
    lay_out(n + k, operands[k].partner_strides);
    has_partners |= operands[k].partner != nullptr;
    if (has_blocks(operands[k].codec)) row.slice = order.numel();
  }
  for (std::size_t k = 0; k < n; ++k) addresses_.push_back(operands[k].partner);
  row.numel = order.numel();
  row.n_operands = static_cast<std::int32_t>(n);
  row.addresses = addresses_.data() + first;
  row.partners = has_partners ? row.addresses + n : nullptr;
  row.codecs = signatures_.insert(std::move(signature)).first->data();
  if (row.slice && entry.ndim > 1) row.slice /= std::max<std::int64_t>(roster_.dims(entry.param.dims)[0], 1);
  if (std::any_of(layouts.begin(), layouts.end(), [](const Layout* layout) { return layout; })) {
    row.layouts = tables_.emplace_back(std::move(layouts)).data();
  }
}

// Of near-equal numbers of elements, whatever the tensors' sizes and however many threads there are.
void CpuJob::cut_into_shares() {
  const std::int64_t wanted = (numel_ / kSharesWanted + kCut - 1) / kCut * kCut;
  const std::int64_t size = std::clamp(wanted, kSmallestShare, kLargestShare);
  std::int64_t room = 0;
  for (std::size_t r = 0; r < rows_.size(); ++r) {
    for (std::int64_t begin = 0, end; begin < rows_[r].numel; begin = end) {
      const std::int64_t rest = rows_[r].numel - begin;
      if (rest > room && room < kCut) {
        shares_.push_back({static_cast<std::int32_t>(r), begin});
        room = size;
      }
      end = begin + (rest <= room ? rest : room / kCut * kCut);
      if (rest > room) end = whole_blocks(rows_[r], end);
      room -= end - begin;
    }
  }
  if (!rows_.empty()) shares_.push_back({static_cast<std::int32_t>(rows_.size()) - 1, rows_.back().numel});
  partials_.resize(shares_.size());
}

void CpuJob::keep_sums(bool has_scopes, const std::vector<std::int64_t>& first, const std::vector<std::int64_t>& scopes,
                       const std::vector<std::uintptr_t>& addresses, const std::vector<std::size_t>& shared) {
  if (first.size() != rows_.size() + 1 || scopes.size() != rows_.size() || addresses.size() != 4) {
    throw std::invalid_argument("sums are of another optimizer");
  }
  const RuleNames& names = roster_.group(0).kernel().names;  // all groups have one rule
  sums_.has_scopes = has_scopes;
  sums_.n_measures = names.measures.size();
  sums_.n_epilogue = names.epilogue.size();
  const auto table = [&](std::size_t k) { return reinterpret_cast<double*>(addresses[k]); };
  sums_.segments = table(0);
  sums_.wholes = table(1);
  sums_.largest = table(2);
  sums_.epilogue = table(3);
  for (std::size_t r = 0, share = 0; r < rows_.size(); ++r) {
    const std::int64_t n = first[r + 1] - first[r];
    while (share + 2 < shares_.size() && shares_[share + 1].row < static_cast<std::int32_t>(r)) ++share;
    const std::int64_t length = in_channels_ && n ? rows_[r].numel / n : rows_[r].numel;
    row_sums_.push_back({first[r], n, std::max<std::int64_t>(length, 1), static_cast<std::int64_t>(share), scopes[r]});
  }
  slots_.resize((shares_.size() + static_cast<std::size_t>(first.back())) * sums_.n_measures);
  epilogue_slots_.resize((shares_.size() + rows_.size()) * sums_.n_epilogue);
  sums_.rows = row_sums_.data();
  none_.resize(sums_.n_measures);
  sums_.none = none_.data();
  sums_.slots = slots_.data();
  sums_.epilogue_slots = epilogue_slots_.data();
  shared_ = shared;
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
  before_.clear();
  after_.clear();
  coefficients_.clear();
  if (!step_tables_.empty()) {
    step_layouts_.clear();
    step_tables_.clear();
    for (std::size_t i = 0; i < rows_.size(); ++i) rows_[i].layouts = planned_layouts_[i];
  }
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    prefetch_counters(i + kCountersAhead);
    Row& row = rows_[i];
    row.active = roster_.has_gradient(i);
    if (!row.active) continue;
    row.addresses[kGrad] = const_cast<void*>(roster_.gradient_address(i));
    if (roster_.gradient_strides(i)) lay_out(i);
    if (!join_cohort(i, room)) return false;
  }
  return true;
}

void CpuJob::prefetch_counters(std::size_t i) const {
  if (n_scalars_ && i < rows_.size()) __builtin_prefetch(counters(i)->address, 1);
}

// A gradient that is laid out otherwise than planned has a layout for this step.
void CpuJob::lay_out(std::size_t i) {
  const Layout layout = order_of(roster_.entry(i)).layout_of(roster_.gradient_strides(i));
  Row& row = rows_[i];
  if (!layout.ndim && !(row.layouts && row.layouts[kGrad])) return;  // strides that do not matter
  const auto n_operands = 2 * static_cast<std::size_t>(row.n_operands);
  LayoutTable table(n_operands);
  if (row.layouts) table.assign(row.layouts, row.layouts + n_operands);
  table[kGrad] = layout.ndim ? &step_layouts_.emplace_back(layout) : nullptr;
  row.layouts = step_tables_.emplace_back(std::move(table)).data();
}

bool CpuJob::join_cohort(std::size_t i, Room room) {
  for (std::size_t k = 0; k < n_scalars_; ++k) {
    const Counter& counter = counters(i)[k];
    if (room == Room::kForStep && !counter.has_room()) return false;
  }
  if (room == Room::kForStep && own_counters_[i].address && !own_counters_[i].has_room()) return false;
  const CohortKey key = key_of(i);
  const std::size_t n = cohorts_.size(), oldest = n > kCohortsSearched ? n - kCohortsSearched : 0;
  std::size_t c = n;
  while (c > oldest && !is_in(c - 1, key, i)) --c;
  if (c == oldest) add_cohort(key, i);
  rows_[i].cohort = static_cast<std::int32_t>(c == oldest ? n : c - 1);
  return true;
}

CpuJob::CohortKey CpuJob::key_of(std::size_t i) const {
  const double count = own_counters_[i].address ? own_counters_[i].read() : 0;
  return {static_cast<std::int32_t>(roster_.group_of(i)), roster_.has_new_state(i), roster_.has_new_average(i), count};
}

bool CpuJob::is_in(std::size_t cohort, const CohortKey& key, std::size_t i) const {
  bool same = cohort_keys_[cohort] == key;
  for (std::size_t k = 0; k < n_scalars_; ++k) same &= before_[cohort * n_scalars_ + k] == counters(i)[k].read();
  return same;
}

// A cohort of row i, and of those after it that advance with it.
void CpuJob::add_cohort(const CohortKey& key, std::size_t i) {
  const Group& group = roster_.group(roster_.group_of(i));
  for (std::size_t k = 0; k < n_scalars_; ++k) before_.push_back(counters(i)[k].read());
  const std::size_t scalars = after_.size(), first = coefficients_.size();
  after_.insert(after_.end(), before_.end() - static_cast<std::ptrdiff_t>(n_scalars_), before_.end());
  if (n_scalars_) after_[scalars] += 1;  // `step` comes first
  coefficients_.resize(first + rows_[i].kernel->names.coefficients.size());
  const double step = own_counters_[i].address ? key.count + 1 : n_scalars_ ? after_[scalars] : 0;
  rows_[i].kernel->prepare(group.values.data() + 2, after_.data() + scalars, key.new_state,
                           coefficients_.data() + first);
  cohorts_.push_back({group.values[0], group.values[1], group.sign, group.is_decoupled, group.is_cautious,
                      group.step_options(step, key.new_average), first, scalars});
  cohort_keys_.push_back(key);
}

py::object CpuJob::step(const py::capsule& engine, int threads, int passes, double inverse_scale, double max_norm,
                        bool skip_nonfinite, bool frees) {
  if (!scan(threads)) return py::none();
  py::object outcome = launch(engine, threads, passes, inverse_scale, max_norm, skip_nonfinite, /*squared_norm=*/0);
  if (frees) roster_.free_gradients();
  return outcome;
}

py::tuple CpuJob::run(const py::capsule& engine, int threads, int passes, double inverse_scale, double max_norm,
                      bool skip_nonfinite, double squared_norm) {
  roster_.check(threads);
  if (passes & ~kNormPass) make_cohorts(Room::kAny);  // again: another plan may have advanced the same counters
  return launch(engine, threads, passes, inverse_scale, max_norm, skip_nonfinite, squared_norm);
}

py::tuple CpuJob::launch(const py::capsule& engine, int threads, int passes, double inverse_scale, double max_norm,
                         bool skip_nonfinite, double squared_norm) {
  auto* const entry = reinterpret_cast<void (*)(Job&)>(engine.get_pointer<void>());
  Job job{};
  job.threads = numel_ < kWorthThreads ? 1 : threads;
  job.passes = passes;
  job.inverse_scale = inverse_scale;
  job.max_norm = max_norm;
  job.skip_nonfinite = skip_nonfinite;
  job.squared_norm = squared_norm;
  job.rows = rows_.data();
  job.n_rows = static_cast<std::int64_t>(rows_.size());
  job.shares = shares_.data();
  job.n_shares = shares_.empty() ? 0 : static_cast<std::int64_t>(shares_.size()) - 1;
  job.cohorts = cohorts_.data();
  job.coefficients = coefficients_.data();
  job.scalars = after_.data();
  job.partials = partials_.data();
  job.sums = sums_;
  {
    py::gil_scoped_release release;
    entry(job);
  }
  if (passes & kUpdatePass && !job.skipped) advance_counters(job);
  if (passes & kEpiloguePass && !job.skipped) write_epilogue(job);
  return py::make_tuple(job.squared_norm, job.skipped);
}

void CpuJob::advance_counters(const Job& job) {
  stepped_ = true;
  std::vector<double> coefficients, scalars;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    prefetch_counters(i + kCountersAhead);
    if (!rows_[i].active) {
      if (!shared_.empty()) advance_shared(job, i);
      continue;
    }
    const double* after = after_.data() + static_cast<std::size_t>(rows_[i].cohort) * n_scalars_;
    if (rows_[i].kernel->finish && n_scalars_) {
      const double* const prepared =
          coefficients_.data() + cohorts_[static_cast<std::size_t>(rows_[i].cohort)].coefficients;
      coefficients.assign(prepared, prepared + rows_[i].kernel->names.coefficients.size());
      scalars.assign(after, after + n_scalars_);
      finish_segment(job, static_cast<std::int64_t>(i), row_sums_[i].first_segment, coefficients.data(),
                     scalars.data());
      after = scalars.data();
    }
    for (std::size_t k = 0; k < n_scalars_; ++k) counters(i)[k].write(after[k]);
    if (own_counters_[i].address) own_counters_[i].write(own_counters_[i].read() + 1);
    roster_.set_stepped(i);
  }
}

// Whether anything of a row's scope is stepped, and its scalars are here.
bool CpuJob::is_live(const Job& job, std::size_t i) const {
  if (!rows_[i].kernel || !n_scalars_) return false;
  if (!sums_.has_scopes) return rows_[i].active;
  return job.sums.wholes[(static_cast<std::size_t>(row_sums_[i].scope) + 1) * (sums_.n_measures + 1) - 1] != 0;
}

// Scalars that a scope shares advance where there is no gradient, too.
void CpuJob::advance_shared(const Job& job, std::size_t i) {
  if (!is_live(job, i)) return;
  const Kernel& kernel = *rows_[i].kernel;
  const Group& group = roster_.group(roster_.group_of(i));
  std::vector<double> scalars(n_scalars_), coefficients(kernel.names.coefficients.size());
  for (std::size_t k = 0; k < n_scalars_; ++k) scalars[k] = counters(i)[k].read();
  kernel.prepare(group.values.data() + 2, scalars.data(), /*new_state=*/false, coefficients.data());
  if (kernel.finish) {
    finish_segment(job, static_cast<std::int64_t>(i), row_sums_[i].first_segment, coefficients.data(), scalars.data());
  }
  for (const std::size_t k : shared_) counters(i)[k].write(scalars[k]);
}

// What was concluded of a scope is a scalar of each of its rows.
void CpuJob::write_epilogue(const Job& job) const {
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (!is_live(job, i)) continue;
    const RuleNames& names = rows_[i].kernel->names;
    const double* const found = job.sums.epilogue + static_cast<std::size_t>(row_sums_[i].scope) * sums_.n_epilogue;
    for (std::size_t k = 0; k < sums_.n_epilogue; ++k) {
      const auto at = std::find(names.scalars.begin(), names.scalars.end(), names.epilogue[k]) - names.scalars.begin();
      counters(i)[at].write(found[k]);
    }
  }
}

void CpuJob::draw(std::size_t i, std::uint32_t tensor, std::uint32_t stream, std::int64_t first,
                  const std::vector<std::int64_t>& strides) {
  const Entry& entry = roster_.entry(i);
  if (!rows_[i].kernel || static_cast<int>(strides.size()) != entry.ndim) return;
  const Layout layout = order_of(entry).layout_of(strides.data());
  drawings_.push_back({tensor, stream, {first, layout.ndim ? &layouts_.emplace_back(layout) : nullptr}});
  rows_[i].drawing = &drawings_.back();
}

void CpuJob::release() { roster_.release(); }

}  // namespace fusedopt::host
