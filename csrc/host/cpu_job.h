// The job of the CPU engine: a roster's tensors as rows, cut into near-equal shares, and the step counters, which the
// host advances.
#pragma once

#include <deque>
#include <set>
#include <vector>

#include "cpu/job.h"
#include "host/roster.h"
#include "host/walk_order.h"

namespace fusedopt::host {

class CpuJob {
 public:
  // See Roster. in_channels: sums are taken over slices of dimension 0.
  CpuJob(py::object param_groups, const py::list& groups, py::object state, const std::vector<std::size_t>& members,
         const std::vector<std::size_t>& new_state, const std::vector<std::size_t>& new_average, bool in_channels);

  // What row i draws by: its number, the stream, and the logical index in the whole tensor of its first
  // element, and how much that grows along each dimension.
  void draw(std::size_t i, std::uint32_t tensor, std::uint32_t stream, std::int64_t first,
            const std::vector<std::int64_t>& strides);

  // Where what the rule adds up is kept, see fusedopt/sums.py.
  // first: segment of each row, and how many there are
  // scopes: of each row; n_scopes of them
  // addresses: of segments, wholes, largest and epilogue
  // shared: which scalars a scope has in common
  void keep_sums(bool has_scopes, const std::vector<std::int64_t>& first, const std::vector<std::int64_t>& scopes,
                 const std::vector<std::uintptr_t>& addresses, const std::vector<std::size_t>& shared);

  // True when all is as it was planned and a step can run; false when a job must be made anew.
  bool scan(int threads);
  // See Roster.
  void check(int threads) { roster_.check(threads); }

  // A scan, then the passes that are asked for, by bits of Pass, and the counters of what was stepped. From the end of
  // the scan on, this thread runs no Python, but what letting go of gradients runs, which are taken from their
  // parameters if `frees`. Returns (squared norm, skipped); None when a job must be made anew.
  py::object step(const py::capsule& engine, int threads, int passes, double inverse_scale, double max_norm,
                  bool skip_nonfinite, bool frees);
  // The same after a scan, in one or more parts. Raises if any tensor is not what it was in the scan.
  py::tuple run(const py::capsule& engine, int threads, int passes, double inverse_scale, double max_norm,
                bool skip_nonfinite, double squared_norm);

  // The parameters were stepped since the last scan.
  bool stepped() const { return stepped_; }
  void release();
  void rebind(py::object param_groups) { roster_.rebind(std::move(param_groups)); }

  std::size_t rows() const { return rows_.size(); }
  std::size_t cohorts() const { return cohorts_.size(); }
  const Roster& roster() const { return roster_; }

 private:
  // A 0-dim state such as `step`.
  struct Counter {
    void* address;
    bool wide;  // double, else float
    // A float stops counting at 2^24; the job is then made anew with a double one.
    bool has_room() const { return wide || read() < 16777216; }
    double read() const { return wide ? *static_cast<const double*>(address) : *static_cast<const float*>(address); }
    void write(double value) const;
  };
  enum class Room { kAny, kForStep };  // that a counter must have left
  struct CohortKey {
    std::int32_t group;
    bool new_state, new_average;
    double count;  // steps before, that the engine counts; 0 if it does not
    bool operator==(const CohortKey&) const = default;
  };
  using LayoutTable = std::vector<const Layout*>;  // of each operand of a row, then of each partner

  struct Operand {  // of a row
    Codec codec;
    void *address, *partner;
    const std::int64_t *strides, *partner_strides;  // the partner's are null where it is not of the row's shape
  };

  void add_row(const Entry& entry);
  std::vector<Operand> operands_of(const Entry& entry) const;
  WalkOrder order_of(const Entry& entry) const;
  void add_operands(const Entry& entry, Row& row);
  void cut_into_shares();
  const Counter* counters(std::size_t i) const { return counters_.data() + i * n_scalars_; }
  void prefetch_counters(std::size_t i) const;
  void lay_out(std::size_t i);
  bool make_cohorts(Room room);
  bool join_cohort(std::size_t i, Room room);
  CohortKey key_of(std::size_t i) const;
  bool is_in(std::size_t cohort, const CohortKey& key, std::size_t i) const;
  void add_cohort(const CohortKey& key, std::size_t i);
  py::tuple launch(const py::capsule& engine, int threads, int passes, double inverse_scale, double max_norm,
                   bool skip_nonfinite, double squared_norm);
  void advance_counters(const Job& job);
  void advance_shared(const Job& job, std::size_t i);
  void write_epilogue(const Job& job) const;
  bool is_live(const Job& job, std::size_t i) const;

  Roster roster_;
  bool in_channels_;
  std::vector<Row> rows_;
  std::vector<void*> addresses_;                       // of all rows' operands, and their partners
  std::set<std::vector<Codec>> signatures_;            // of all rows
  std::size_t n_scalars_ = 0;                          // of the rule
  std::vector<Counter> counters_;                      // of all rows
  std::vector<Counter> own_counters_;                  // the engine's, of each row; null where it counts nothing
  std::vector<const Layout* const*> planned_layouts_;  // of each row
  std::deque<Layout> layouts_;                         // of parameters, states and gradients as planned
  std::deque<LayoutTable> tables_;
  std::deque<Drawing> drawings_;
  std::deque<Layout> step_layouts_;  // of this step's other gradients
  std::deque<LayoutTable> step_tables_;
  SumTables sums_;
  std::vector<RowSums> row_sums_;
  std::vector<double> slots_, epilogue_slots_, none_;
  std::vector<std::size_t> shared_;  // scalars
  std::vector<Share> shares_;        // and where the last one ends
  std::vector<double> partials_;
  std::vector<Cohort> cohorts_;
  std::vector<CohortKey> cohort_keys_;
  std::vector<double> before_, after_;  // the step, the scalars of each cohort
  std::vector<double> coefficients_;    // of each cohort
  std::int64_t numel_ = 0;
  bool stepped_ = false;
};

}  // namespace fusedopt::host
