#include "cpu/engine.h"

#include <atomic>

#include "cpu/sum.h"
#include "cpu/sums.h"
#include "cpu/tile.h"

namespace fusedopt::cpu {
namespace {

template <class T>
double norm_as(const Segment& segment) {
  Tile<T, kGrad, 1> tile(segment.row);
  double sum = 0;
  each_tile(segment, kTile,
            [&](std::int64_t begin, std::int64_t count) { sum += sum_squares(tile.fetch(begin, count)[0], count); });
  return sum;
}

// Shares of a pass that are claimed. All threads write it, so nothing that they read is in its cache line.
struct alignas(64) Claims {
  std::atomic<std::int64_t> n = 0;
};

// Calls body(share) for every share, by whichever thread claims it next.
template <class Body>
void each_share(const Job& job, Claims& claims, bool backward, Body body) {
  for (std::int64_t claim; (claim = claims.n.fetch_add(1, std::memory_order_relaxed)) < job.n_shares;) {
    body(backward ? job.n_shares - 1 - claim : claim);
  }
}

// The pass that measures the gradients: a share's sum of squares.
double norm(const Job& job, std::int64_t share) {
  double sum = 0;
  each_segment(job, share, [&](const Segment& segment, std::int64_t) {
    const bool is_wide = segment.row.codecs[kGrad] == Codec::f64;
    sum += (is_wide ? norm_as<double> : norm_as<float>)(segment);
  });
  return sum;
}

// The pass that steps.
void update(const Job& job, std::int64_t share, double factor) {
  each_segment(job, share, [&](const Segment& segment, std::int64_t row) {
    const Cohort& cohort = job.cohorts[segment.row.cohort];
    if (job.sums.rows) return update_with_sums(job, segment, row, share, factor);
    segment.row.kernel->update(segment, factor, cohort, job.coefficients + cohort.coefficients, nullptr);
  });
}

double total(const Job& job) {
  double sum = 0;
  for (std::int64_t share = 0; share < job.n_shares; ++share) sum += job.partials[share];
  return sum;
}

}  // namespace

void run(Job& job) {
  Claims norms, measures, updates;
  Decision decision;
  const auto asked = [&](Pass pass) { return (job.passes & pass) != 0; };
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
  {
    if (asked(kNormPass)) {
      each_share(job, norms, /*backward=*/false, [&](std::int64_t share) { job.partials[share] = norm(job, share); });
#pragma omp barrier
    }
#pragma omp single
    {
      if (asked(kNormPass)) job.squared_norm = total(job);
      decision = decide(job.squared_norm, job.inverse_scale, /*found_inf=*/false, job.max_norm, job.skip_nonfinite);
    }
    const double factor = decision.factor;
    if (asked(kSumsPass) && !decision.skipped) {
      each_share(job, measures, /*backward=*/false, [&](std::int64_t share) { measure(job, share, factor); });
#pragma omp barrier
      add_segments(job);
    }
    if (asked(kScopesPass) && !decision.skipped) add_scopes(job);
    if (asked(kUpdatePass) && !decision.skipped) {
      // Backwards, so that the gradients that the pass before touched last are still in cache.
      each_share(job, updates, /*backward=*/true, [&](std::int64_t share) { update(job, share, factor); });
      if (job.sums.n_epilogue) {
#pragma omp barrier
        add_epilogue(job);
      }
    }
  }
  job.skipped = decision.skipped;
}

}  // namespace fusedopt::cpu
