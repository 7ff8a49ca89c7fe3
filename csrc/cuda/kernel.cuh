// The whole step of all tensors of a device: measure the gradients, meet, decide, update, count.
#pragma once

#include <cooperative_groups.h>

#include "cuda/norm.cuh"
#include "cuda/update.cuh"

namespace fusedopt::cuda {

// One thread decides for its block.
template <int Words>
__device__ __forceinline__ Decision decide(const Arguments<Words>& a, double squared_norm) {
  FUSEDOPT_SHARED(Decision, decision);
  if (threadIdx.x == 0) {
    decision = fusedopt::decide(step_word(a, kMeasured) ? squared_norm : 0,
                                1 / static_cast<double>(*a.tables.grad_scale), *a.tables.found_inf != 0,
                                __longlong_as_double(step_word(a, kMaxNorm)), step_word(a, kSkipNonfinite) != 0);
  }
  __syncthreads();
  return decision;
}

// Whether all other blocks of this launch are done; every block asks once. Resets what counts their progress.
__device__ __forceinline__ bool is_last(int* counts) {
  FUSEDOPT_SHARED(bool, last);
  __syncthreads();  // all threads of this block have read what the last block is going to change
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counts + kDone, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) counts[kDone] = counts[kSharesMeasured] = counts[kSharesUpdated] = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Counts the step in all rows that have a gradient.
template <class Rule, int Words>
__device__ __forceinline__ void count_step(const Arguments<Words>& a) {
  const Tables& t = a.tables;
  if constexpr (kScalars<Rule> > 0) {
    for (int row = static_cast<int>(threadIdx.x); row < t.n_rows; row += kThreads) {
      const std::int64_t grad = grad_word(a, row);
      if (!grad) continue;
      Numbers<Rule> numbers(a, row, record_of<Rule>(a, row));
      if constexpr (kScalars<Rule> > 1) {  // more than `step`: the rule advances them
        double coefficients[kCoefficients<Rule>];
        prepare<Rule>(numbers.hyper, numbers.scalars, grad & kNewState, coefficients);
      }
      const std::int64_t* addresses = scalars_of(t, row);
      for (int k = 0; k < kScalars<Rule>; ++k) store_number(addresses[k], numbers.scalars[k]);
    }
  }
}

// One launch for measuring and updating is cooperative; either alone need not be.
template <int Words, class Rule, class... More>
__global__ void __launch_bounds__(kThreads, resident_blocks(1 + sizeof...(More), kStates<Rule>))
    step(const __grid_constant__ Arguments<Words> a) {
  const Tables& t = a.tables;
  double squared_norm = t.measure ? 0 : t.numbers[kSquaredNorm];
  if (t.measure) {
    measure(a);
    if (t.update) {
      cooperative_groups::this_grid().sync();
    } else if (!is_last(t.counts)) {
      return;
    }
    for (int k = static_cast<int>(threadIdx.x); k < t.n_shares; k += kThreads) squared_norm += __ldcg(t.partials + k);
    squared_norm = block_sum(squared_norm);
    if (threadIdx.x == 0 && (blockIdx.x == 0 || !t.update)) t.numbers[kSquaredNorm] = squared_norm;
    if (!t.update) return;
  }
  const Decision d = decide(a, squared_norm);
  if (!d.skipped) update<Words, Rule, More...>(a, d.factor);
  if (!is_last(t.counts)) return;
  if (threadIdx.x == 0) {
    t.numbers[kNorm] = d.norm;
    t.counts[kSkippedSteps] += d.skipped;
    t.counts[kSkipped] = d.skipped;
  }
  if (!d.skipped) count_step<Rule>(a);
}

}  // namespace fusedopt::cuda
