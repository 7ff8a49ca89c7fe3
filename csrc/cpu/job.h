// What the host hands to the CPU engine: plain tables, no Python, no torch.
#pragma once

#include <cstdint>

#include "core/operands.h"
#include "core/step.h"

namespace fusedopt {

constexpr int kMaxDims = 64;  // as many as torch has

// Strides of an operand in the order in which its row is walked (outermost first), in elements.
struct Layout {
  int ndim = 0;
  std::int64_t shape[kMaxDims];
  std::int64_t stride[kMaxDims];
};

// Logical indices of a row's elements in the whole tensor, see fusedopt/noise.py. A null layout means dense.
struct Indices {
  std::int64_t first = 0;
  const Layout* layout = nullptr;
};

// What a row draws its noise by, and what rounds it, but for the seed and the step.
struct Drawing {
  std::uint32_t tensor, stream;
  Indices indices;
};

// What the engine does in a step besides the rule.
struct StepOptions {
  double noise = 0;  // its standard deviation; drawn where the row has a Drawing
  std::uint32_t seed = 0;
  std::uint32_t step = 0;  // from 0 on
  bool averages = false;   // average <- lerp(average, parameter, weight) after the step
  bool puts_back = false;  // and then the parameter is the average
  double weight = 0;
};

struct Cohort;
struct Segment;

struct Kernel {
  RuleNames names;
  void (*prepare)(const double* hyper, double* scalars, bool new_state, double* coefficients);
  // Steps a segment, and adds what the rule concludes to its sums.
  void (*update)(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients,
                 double* epilogue);
  // Null where the rule has none. `measure` adds to a segment's sums.
  void (*measure)(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients,
                  double* measures);
  double (*score)(const double* coefficients, const double* own);
  void (*finish)(double* coefficients, double* scalars, const double* own, const double* whole, double largest);
};

// Rows whose steps advance together under the same hyperparameters.
struct Cohort {
  double lr, weight_decay, sign;
  bool is_decoupled, is_cautious;
  StepOptions options;
  std::size_t coefficients;  // where they begin in Job::coefficients
  std::size_t scalars;       // where they begin in Job::scalars
};

struct Row {
  std::int64_t numel;
  const Kernel* kernel;
  void** addresses;              // of each operand, in the order of their roles, then of the average
  void* const* partners;         // what stands beside them, where codecs have two; null when none has
  const Codec* codecs;           // of each operand: the row's signature, which rows share
  const Layout* const* layouts;  // of each operand, then of each partner, null where it is dense; null when all are
  const Drawing* drawing;        // null: nothing is drawn
  std::int64_t slice;            // how many elements blocks lie inside of; 0 where no codec has blocks
  std::int32_t n_operands;
  std::int32_t cohort;
  bool active;  // has a gradient in this step
};

// Elements of a row: those that are in one share, or fewer. What comes next is others, up to `last`.
struct Segment {
  const Row& row;
  std::int64_t begin, end, last;
};

// The last end of blocks that is not after an element.
inline std::int64_t whole_blocks(const Row& row, std::int64_t element) {
  return row.slice ? element - element % row.slice % kBlockElements : element;
}

// In which block an element lies; those of a slice follow one another.
inline std::int64_t block_of(const Row& row, std::int64_t element) {
  const std::int64_t of_slice = (row.slice + kBlockElements - 1) / kBlockElements;
  return element / row.slice * of_slice + element % row.slice / kBlockElements;
}

// Where a share begins; it ends where the next one does.
struct Share {
  std::int32_t row;
  std::int64_t begin;
};

// What a row's elements are added up to. Its segments are neighbours of equal length, the whole row at most.
struct RowSums {
  std::int64_t first_segment, n_segments, segment_length;
  std::int64_t first_share;
  std::int64_t scope;
};

// Sums of rows, see fusedopt/sums.py for the last four. A share and a segment that meet have a slot of their own, the
// sum of their numbers: from one to the next, either is another.
struct SumTables {
  const RowSums* rows = nullptr;  // null where the rule adds nothing up
  bool has_scopes = false;        // of more than a segment
  std::size_t n_measures = 0, n_epilogue = 0;
  double* slots = nullptr;           // of n_measures each
  double* epilogue_slots = nullptr;  // of n_epilogue each; of a share and a row
  const double* none = nullptr;      // n_measures zeros
  double *segments = nullptr, *wholes = nullptr, *largest = nullptr, *epilogue = nullptr;
};

struct Job {
  const Row* rows;
  std::int64_t n_rows;
  const Share* shares;  // n_shares + 1
  std::int64_t n_shares;
  const Cohort* cohorts;
  const double* coefficients;
  const double* scalars;
  double* partials;  // n_shares, sums of the gradients' squares
  SumTables sums;

  int threads;
  int passes;  // bits of Pass; those after the norm are left out where the step is skipped
  bool skip_nonfinite;
  double inverse_scale;  // 1 / loss scale
  double max_norm;       // clip to it; infinity: don't
  double squared_norm;   // an input where it is not measured
  bool skipped;          // out
};

// Finishes a segment's coefficients and scalars; of a row that has no segment, what its scope tells.
inline void finish_segment(const Job& job, std::int64_t row, std::int64_t segment, double* coefficients,
                           double* scalars) {
  const SumTables& sums = job.sums;
  const bool exists = sums.rows[row].n_segments > 0;
  const double* const own = exists ? sums.segments + static_cast<std::size_t>(segment) * sums.n_measures : sums.none;
  const auto scope = static_cast<std::size_t>(sums.rows[row].scope);
  const double* const whole = sums.has_scopes ? sums.wholes + scope * (sums.n_measures + 1) : own;
  job.rows[row].kernel->finish(coefficients, scalars, own, whole, sums.has_scopes ? sums.largest[scope] : -kInfinity);
}

}  // namespace fusedopt
