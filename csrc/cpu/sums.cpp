#include "cpu/sums.h"

#include <algorithm>
#include <vector>

namespace fusedopt::cpu {
namespace {

// Calls body(piece, number) for the parts of a segment's elements that are in one of the row's segments of sums each.
template <class Body>
void each_piece(const Segment& segment, const RowSums& sums, Body body) {
  for (std::int64_t begin = segment.begin; begin < segment.end;) {
    const std::int64_t k = begin / sums.segment_length;
    const std::int64_t end = std::min(segment.end, (k + 1) * sums.segment_length);
    body(Segment{segment.row, begin, end, segment.last}, sums.first_segment + k);
    begin = end;
  }
}

double* slot(double* slots, std::int64_t number, std::size_t width) {
  return slots + static_cast<std::size_t>(number) * width;
}

void add(double* to, const double* from, std::size_t n) {
  for (std::size_t k = 0; k < n; ++k) to[k] += from[k];
}

// Calls body(share, begin, end) for the shares that have elements of a row.
template <class Body>
void each_share_of(const Job& job, std::int64_t row, Body body) {
  const std::int64_t numel = job.rows[row].numel;
  for (std::int64_t share = job.sums.rows[row].first_share; share < job.n_shares; ++share) {
    const Share from = job.shares[share], to = job.shares[share + 1];
    if (from.row > row) return;
    const std::int64_t begin = from.row == row ? from.begin : 0, end = to.row == row ? to.begin : numel;
    if (begin < end) body(share, begin, end);
    if (to.row > row) return;
  }
}

}  // namespace

void measure(const Job& job, std::int64_t share, double factor) {
  const std::size_t n = job.sums.n_measures;
  each_segment(job, share, [&](const Segment& segment, std::int64_t row) {
    const Cohort& cohort = job.cohorts[segment.row.cohort];
    each_piece(segment, job.sums.rows[row], [&](const Segment& piece, std::int64_t number) {
      double* const sums = slot(job.sums.slots, share + number, n);
      std::fill_n(sums, n, 0.0);
      segment.row.kernel->measure(piece, factor, cohort, job.coefficients + cohort.coefficients, sums);
    });
  });
}

void update_with_sums(const Job& job, const Segment& segment, std::int64_t row, std::int64_t share, double factor) {
  const Kernel& kernel = *segment.row.kernel;
  const Cohort& cohort = job.cohorts[segment.row.cohort];
  const double* const prepared = job.coefficients + cohort.coefficients;
  const double* const scalars = job.scalars + cohort.scalars;
  double* const concluded = slot(job.sums.epilogue_slots, share + row, job.sums.n_epilogue);
  std::fill_n(concluded, job.sums.n_epilogue, 0.0);
  if (!kernel.finish) return kernel.update(segment, factor, cohort, prepared, concluded);
  thread_local std::vector<double> coefficients, changed;
  each_piece(segment, job.sums.rows[row], [&](const Segment& piece, std::int64_t number) {
    coefficients.assign(prepared, prepared + kernel.names.coefficients.size());
    changed.assign(scalars, scalars + kernel.names.scalars.size());
    finish_segment(job, row, number, coefficients.data(), changed.data());
    kernel.update(piece, factor, cohort, coefficients.data(), concluded);
  });
}

void add_segments(const Job& job) {
  const std::size_t n = job.sums.n_measures;
#pragma omp for schedule(dynamic, 16)
  for (std::int64_t row = 0; row < job.n_rows; ++row) {
    const RowSums& sums = job.sums.rows[row];
    std::fill_n(slot(job.sums.segments, sums.first_segment, n), static_cast<std::size_t>(sums.n_segments) * n, 0.0);
    if (!job.rows[row].active) continue;
    each_share_of(job, row, [&](std::int64_t share, std::int64_t begin, std::int64_t end) {
      each_piece({job.rows[row], begin, end, end}, sums, [&](const Segment&, std::int64_t number) {
        add(slot(job.sums.segments, number, n), slot(job.sums.slots, share + number, n), n);
      });
    });
  }
}

void add_scopes(const Job& job) {
  const SumTables& sums = job.sums;
  const std::size_t n = sums.n_measures;
#pragma omp single
  {
    for (std::int64_t row = 0; row < job.n_rows; ++row) {
      const auto scope = static_cast<std::size_t>(sums.rows[row].scope);
      std::fill_n(sums.wholes + scope * (n + 1), n + 1, 0.0);
      sums.largest[scope] = -kInfinity;
    }
    for (std::int64_t r = 0; r < job.n_rows; ++r) {
      const Row& row = job.rows[r];
      if (!row.active) continue;
      const RowSums& at = sums.rows[r];
      double* const whole = sums.wholes + static_cast<std::size_t>(at.scope) * (n + 1);
      double& largest = sums.largest[at.scope];
      const double* const c = job.coefficients + job.cohorts[row.cohort].coefficients;
      for (std::int64_t k = 0; k < at.n_segments; ++k) {
        const double* const own = slot(sums.segments, at.first_segment + k, n);
        add(whole, own, n);
        if (row.kernel->score) largest = std::max(largest, row.kernel->score(c, own));
      }
      whole[n] += 1;
    }
  }
}

void add_epilogue(const Job& job) {
  const std::size_t n = job.sums.n_epilogue;
#pragma omp single
  {
    for (std::int64_t row = 0; row < job.n_rows; ++row) {
      std::fill_n(slot(job.sums.epilogue, job.sums.rows[row].scope, n), n, 0.0);
    }
    for (std::int64_t row = 0; row < job.n_rows; ++row) {
      if (!job.rows[row].active) continue;
      double* const sums = slot(job.sums.epilogue, job.sums.rows[row].scope, n);
      each_share_of(job, row, [&](std::int64_t share, std::int64_t, std::int64_t) {
        add(sums, slot(job.sums.epilogue_slots, share + row, n), n);
      });
    }
  }
}

}  // namespace fusedopt::cpu
