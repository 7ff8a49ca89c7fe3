// The whole step of all tensors of a device: measure the gradients, meet, decide, update, count.
#pragma once

#include <cooperative_groups.h>

#include <utility>

#include "cuda/norm.cuh"
#include "cuda/update.cuh"

namespace fusedopt::cuda {

// The sum over the shares, which all blocks have written.
__device__ __forceinline__ double sum_partials(const Tables& t) {
  double sum = 0;
  for (int k = static_cast<int>(threadIdx.x); k < t.n_shares; k += kThreads) sum += __ldcg(t.partials + k);
  return block_sum(sum);
}

// One thread decides for its block; not the one that may be preparing.
template <int Words>
__device__ __forceinline__ const Decision& decide(const Arguments<Words>& a, double squared_norm) {
  FUSEDOPT_SHARED(Decision, decision);
  if (threadIdx.x == kThreads - 1) {
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

// One launch for measuring and updating is cooperative; either alone need not be.
template <int Words, class Rule, class... More>
__global__ void __launch_bounds__(kThreads, resident_blocks(1 + sizeof...(More), kStates<Rule>))
    step(const __grid_constant__ Arguments<Words> a) {
  const Tables& t = a.tables;
  if (t.measure) {
    measure(a);
    if (!t.update) {
      if (!is_last(t.counts)) return;
      const double squared_norm = sum_partials(t);
      if (threadIdx.x == 0) t.numbers[kSquaredNorm] = squared_norm;
      return;
    }
  }
  const auto grid = cooperative_groups::this_grid();
  auto arrival = t.measure ? grid.barrier_arrive() : 0;
  const Decision& d = update<Words, Rule, More...>(a, [&]() -> const Decision& {
    if (!t.measure) return decide(a, t.numbers[kSquaredNorm]);
    grid.barrier_wait(std::move(arrival));
    const double squared_norm = sum_partials(t);
    if (threadIdx.x == 0 && blockIdx.x == 0) t.numbers[kSquaredNorm] = squared_norm;
    return decide(a, squared_norm);
  });
  if (!is_last(t.counts)) return;
  if (threadIdx.x == 0) {
    t.numbers[kNorm] = d.norm;
    t.counts[kSkippedSteps] += d.skipped;
    t.counts[kSkipped] = d.skipped;
  }
  if (!d.skipped) count_borders<Rule>(a);
}

}  // namespace fusedopt::cuda
