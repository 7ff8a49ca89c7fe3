// The whole step of all tensors of a device: measure the gradients, meet, decide, add up, meet, update, count.
#pragma once

#include <cooperative_groups.h>

#include <utility>

#include "cuda/norm.cuh"
#include "cuda/sums.cuh"

namespace fusedopt::cuda {

// The sum over the shares, which all blocks have written.
__device__ __forceinline__ double sum_partials(const Tables& t) {
  double sum = 0;
  for (int k = static_cast<int>(threadIdx.x); k < t.n_shares; k += kThreads) sum += __ldcg(t.partials + k);
  return block_sum(sum);
}

// What a block knows of what becomes of the step.
__device__ __forceinline__ Decision& decision() {
  FUSEDOPT_SHARED(Decision, of_block);
  return of_block;
}

// One thread decides for its block; not the one that may be preparing.
template <int Words>
__device__ __forceinline__ const Decision& decide(const Arguments<Words>& a, double squared_norm) {
  if (threadIdx.x == kThreads - 1) {
    decision() = fusedopt::decide(step_word(a, kMeasured) ? squared_norm : 0,
                                  1 / static_cast<double>(*a.tables.grad_scale), *a.tables.found_inf != 0,
                                  __longlong_as_double(step_word(a, kMaxNorm)), step_word(a, kSkipNonfinite) != 0);
  }
  __syncthreads();
  return decision();
}

// Whether all other blocks of this launch are done; every block asks once. Resets what counts their progress.
__device__ __forceinline__ bool is_last(int* counts) {
  FUSEDOPT_SHARED(bool, last);
  __syncthreads();  // all threads of this block have read what the last block is going to change
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counts + kDone, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) counts[kDone] = counts[kSharesMeasured] = counts[kSharesUpdated] = counts[kSharesSummed] = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// What a step ends with, in the block that comes last.
template <class Rule, int Words>
__device__ __forceinline__ void tell_step(const Arguments<Words>& a, const Decision& d) {
  const Tables& t = a.tables;
  if (threadIdx.x == 0) {
    if (step_word(a, kMeasured)) {
      t.numbers[kNorm] = d.norm;
      *reinterpret_cast<float*>(t.numbers + kNarrowNorm) = static_cast<float>(d.norm);
    }
    t.counts[kSkippedSteps] += d.skipped;
    t.counts[kSkipped] = d.skipped;
  }
  if (!d.skipped) count_borders<Rule>(a);
}

// The step of rules without sums.
template <int Words, class Rule, class... More>
__device__ __forceinline__ void step_plainly(const Arguments<Words>& a) {
  const Tables& t = a.tables;
  const bool measures = t.asks(kNormPass);
  if (measures) {
    measure<false>(a);
    if (!t.asks(kUpdatePass)) {
      if (!is_last(t.counts)) return;
      const double squared_norm = sum_partials(t);
      if (threadIdx.x == 0) t.numbers[kSquaredNorm] = squared_norm;
      return;
    }
  }
  const auto grid = cooperative_groups::this_grid();
  auto arrival = measures ? grid.barrier_arrive() : 0;
  const Decision& d = update<Words, Rule, More...>(a, [&]() -> const Decision& {
    if (!measures) return decide(a, t.numbers[kSquaredNorm]);
    grid.barrier_wait(std::move(arrival));
    const double squared_norm = sum_partials(t);
    if (threadIdx.x == 0 && blockIdx.x == 0) t.numbers[kSquaredNorm] = squared_norm;
    return decide(a, squared_norm);
  });
  if (is_last(t.counts)) tell_step<Rule>(a, d);
}

__device__ __forceinline__ void meet_grid() {
  const auto grid = cooperative_groups::this_grid();
  auto arrival = grid.barrier_arrive();
  grid.barrier_wait(std::move(arrival));
}

// The step of rules that add up: all passes, with meetings of all blocks between them; or some, where the last block
// adds up what was measured.
template <int Words, class Rule, class... More>
__device__ __forceinline__ void step_with_sums(const Arguments<Words>& a) {
  const Tables& t = a.tables;
  const bool meets = goes_on(t.passes);
  if (t.asks(kNormPass)) {
    measure<true>(a);
    if (meets) {
      meet_grid();
    } else if (!is_last(t.counts)) {
      return;
    }
    const double squared_norm = sum_partials(t);
    if (threadIdx.x == 0 && (blockIdx.x == 0 || !meets)) t.numbers[kSquaredNorm] = squared_norm;
    if (!meets) return;
    decide(a, squared_norm);
  } else {
    decide(a, t.numbers[kSquaredNorm]);
  }
  const Decision& d = decision();
  if (!d.skipped && (t.asks(kSumsPass) || t.asks(kScopesPass))) {
    Team team{static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
    if constexpr (kMeasures<Rule> > 0) {
      if (t.asks(kSumsPass)) {
        measure_sums<Words, Rule, More...>(a, d.factor);
        if (meets) {
          meet_grid();
        } else if (is_last(t.counts)) {
          team = {0, 1};
        } else {
          return;
        }
        add_segments<Rule>(a, team);
        if (t.asks(kScopesPass)) {
          if (meets) meet_grid();
          __threadfence();
          __syncthreads();
        }
      }
    }
    if (t.asks(kScopesPass)) add_scopes<Words, Rule, More...>(a, team);
    if (meets) meet_grid();
  }
  if (t.asks(kUpdatePass)) update<Words, Rule, More...>(a, []() -> const Decision& { return decision(); });
  if (!t.asks(kUpdatePass) && !t.asks(kEpiloguePass)) return;
  if (!is_last(t.counts)) return;
  if (t.asks(kUpdatePass)) {
    tell_step<Rule>(a, d);
    if (!d.skipped) advance_shared<Rule>(a);
  }
  if constexpr (kEpilogue<Rule> > 0) {
    if (d.skipped) return;
    if (t.asks(kUpdatePass)) add_epilogue<Rule>(a);
    if (t.asks(kEpiloguePass)) write_epilogue<Rule>(a);
  }
}

// A launch that goes on from pass to pass is cooperative; others need not be.
template <int Words, class Rule, class... More>
__global__ void __launch_bounds__(kThreads,
                                  resident_blocks(1 + sizeof...(More), kStates<Rule>, kAddsUp<Rule>, kHasOptions<Rule>))
    step(const __grid_constant__ Arguments<Words> a) {
  if constexpr (kAddsUp<Rule>) {
    step_with_sums<Words, Rule, More...>(a);
  } else {
    step_plainly<Words, Rule, More...>(a);
  }
}

}  // namespace fusedopt::cuda
