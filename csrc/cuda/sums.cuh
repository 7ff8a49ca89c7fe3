// The passes of rules that add up: what is measured, what comes of it for scopes, and what is concluded.
#pragma once

#include <utility>

#include "cuda/update.cuh"

namespace fusedopt::cuda {

// The blocks that do what is left of a launch: all, or the one that came last.
struct Team {
  int number, count;
};

// ---------------------------------------------------------------------------------------------------------- measure

// Puts what this warp's tiles of [begin, end) measure, which one cohort's rows have, into the slots of its run.
template <class Rule, int Words>
__device__ __forceinline__ void measure_tiles(const Arguments<Words>& a, int begin, int end, int last_row, int run,
                                              const CohortStep<Rule>& of_cohort) {
  constexpr int n = kMeasures<Rule>;
  using RowType = RowOf<Rule>;
  const Tables& t = a.tables;
  each_row<kBackwardsInRun>(t, begin, end, last_row, [&](int index, int first, int count) {
    const RowType row(a, index);
    if (!row.active) return;
    each_segment<kBackwardsInRun>(
        t, row, index, first, count, [&](const RowType& r, int segment, int tile, int n_tiles) {
          double sums[n] = {};
          with_type<Rule>(r, of_cohort.coefficients, [&]<class T>(const CohortCoefficients<Rule, T>& c) {
            constexpr bool writes = false;
            each_fetch<Rule, T, kBackwardsInRun, writes>(r, tile, n_tiles, [&]<class Fetch>(const Fetch& at, auto&) {
              StoredOf<Rule, Fetch, T> stored;
              auto& values = stored.values;
              const EngineScalars<T> e = fetch_values<Rule, Fetch, T>(stored, r, at, c.engine, of_cohort.options);
              Added<T, n> added;
#pragma unroll
              for (int i = 0; i < Fetch::kCount; ++i) {
                T state[kStates<Rule> + 1];
#pragma unroll
                for (int k = 0; k < kStates<Rule>; ++k) state[k] = values[kFirstState + k][i];
                added.add(measure_element<Rule, T>(values[kParam][i], values[kGrad][i], state, e, c.rule),
                          at.is_active(i));
              }
              added.put(sums);
            });
          });
          put_slot<n>(t.sums.slots, run + segment, sums);
        });
  });
}

// Measures the shares that this block claims, the first first.
template <int Words, class... Rules>
__device__ __forceinline__ void measure_sums(const Arguments<Words>& a, double factor) {
  const Tables& t = a.tables;
  Cohorts<Rules...> cohorts;
  each_claim(t.n_shares, t.counts + kSharesSummed, [&](int number) {
    const Share own = share(t, number);
    const Run run(own, number);
    int near = own.last_row;
    for (int end = own.end; end > own.begin; end = cohorts.begin) {
      cohorts.go(a, own, end, near, factor);
      __syncthreads();
      near = max(cohorts.first - 1, 0);
      if (!cohorts.is_active) continue;
      cohorts.with_variant(t, [&]<class Rule>() {
        measure_tiles<Rule>(a, max(cohorts.begin, run.begin), min(end, run.end), cohorts.row, run.number,
                            prepared<Rule>());
      });
    }
  });
}

// ----------------------------------------------------------------------------------------------------------- add up

// The row of a segment: rows without any begin where the next one does.
__device__ __forceinline__ int row_of_segment(const Tables& t, int segment) {
  int first = 0, last = t.n_rows - 1;
#pragma unroll 1
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (sums_of(t, middle)[kFirstSegment] <= segment) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return first;
}

// Adds up the slots of all segments; those without a gradient are 0.
template <class Rule, int Words>
__device__ __forceinline__ void add_segments(const Arguments<Words>& a, const Team& team) {
  constexpr int n = kMeasures<Rule>;
  const Tables& t = a.tables;
  const int workers = team.count * kWarps;
#pragma unroll 1
  for (int chunk = team.number * kWarps + warp_id(); chunk * 32 < t.sums.n_segments; chunk += workers) {
    const int segment = chunk * 32 + lane_id();
    Unit unit;
    if (segment < t.sums.n_segments) {
      const int row = row_of_segment(t, segment);
      if (grad_word(a, row)) {
        const int first = static_cast<int>(t.tiles[row]), of_row = static_cast<int>(t.tiles[row + 1]) - first;
        const int tiles = of_row / max(segments_of(t, row), 1);
        const int begin = first + (segment - static_cast<int>(sums_of(t, row)[kFirstSegment])) * tiles;
        unit = Unit(t, row, begin, begin + tiles, segment);
      }
    }
    add_units<n>(t, t.sums.slots, unit, [&](const double* sums) {
      if (segment >= t.sums.n_segments) return;
#pragma unroll
      for (int k = 0; k < n; ++k) t.sums.segments[static_cast<std::int64_t>(segment) * n + k] = sums[k];
    });
  }
}

// The score of a segment, by what its row's cohort prepares.
template <class Rule>
__device__ __forceinline__ double score_of(const double* coefficients, const double* own) {
  if constexpr (kHasScore<Rule>) return score<Rule>(coefficients, own);
  return -kInfinity;
}

// Adds up all scopes, a block each at a time, and finds the largest scores there.
template <int Words, class Rule, class... More>
__device__ __forceinline__ void add_scopes(const Arguments<Words>& a, const Team& team) {
  constexpr int n = kMeasures<Rule>;
  const Tables& t = a.tables;
#pragma unroll 1
  for (int scope = team.number; scope < t.sums.n_scopes; scope += team.count) {
    double sums[n + 1] = {}, largest = -kInfinity;
    int rows = 0;
    const auto add = [&](int row, int first, int step) {
      double coefficients[kCoefficients<Rule>];
      if constexpr (kHasScore<Rule>) {
        with_variant<Rule, More...>(sizeof...(More) ? static_cast<int>(signature_of(t, row)[0] / kVariant) : 0,
                                    [&]<class Variant>() {
                                      double scalars[kScalars<Variant> + 1];
                                      advance<Variant>(a, KeyOf<Variant>(a, row), scalars, coefficients);
                                    });
      }
      const int begin = static_cast<int>(sums_of(t, row)[kFirstSegment]), count = segments_of(t, row);
#pragma unroll 1
      for (int k = first; k < count; k += step) {
        double own[n + 1];
#pragma unroll
        for (int m = 0; m < n; ++m) {
          own[m] = __ldcg(t.sums.segments + static_cast<std::int64_t>(begin + k) * n + m);
          sums[m] += own[m];
        }
        const double here = score_of<Rule>(coefficients, own);
        largest = here > largest ? here : largest;
      }
    };
    const int me = static_cast<int>(threadIdx.x);
    if (t.sums.in_channels) {
      if (grad_word(a, scope)) {
        add(scope, me, kThreads);
        rows = me == 0;
      }
    } else {
#pragma unroll 1
      for (int row = me; row < t.n_rows; row += kThreads) {
        if (sums_of(t, row)[kScope] != scope || !grad_word(a, row)) continue;
        add(row, 0, 1);
        ++rows;
      }
    }
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const double sum = block_sum(sums[k]);
      if (me == 0) t.sums.wholes[static_cast<std::int64_t>(scope) * (n + 1) + k] = sum;
    }
    const double live = block_sum(rows), most = block_max(largest);
    if (me == 0) {
      t.sums.wholes[static_cast<std::int64_t>(scope) * (n + 1) + n] = live;
      t.sums.largest[scope] = most;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- conclude

// Whether anything of a row's scope is stepped, and its scalars are here.
template <class Rule, int Words>
__device__ __forceinline__ bool is_live(const Arguments<Words>& a, int row) {
  constexpr int n = kMeasures<Rule>;
  const Tables& t = a.tables;
  if (!scalars_of(t, row)[0]) return false;
  if (!t.sums.has_scopes) return grad_word(a, row) != 0;
  return __ldcg(t.sums.wholes + sums_of(t, row)[kScope] * (n + 1) + n) != 0;
}

// Scalars that a scope shares advance where there is no gradient, too. One block does it, when all are done.
template <class Rule, int Words>
__device__ __forceinline__ void advance_shared(const Arguments<Words>& a) {
  const Tables& t = a.tables;
  if (!t.sums.shared) return;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x); row < t.n_rows; row += kThreads) {
    if (grad_word(a, row) || !is_live<Rule>(a, row)) continue;
    double scalars[kScalars<Rule> + 1], coefficients[kCoefficients<Rule>];
    advance<Rule>(a, key_without_gradient<Rule>(t, row), scalars, coefficients, /*counts=*/false);
    finish_segment<Rule>(t, row, static_cast<int>(sums_of(t, row)[kFirstSegment]), coefficients, scalars);
#pragma unroll
    for (int k = 0; k < kScalars<Rule>; ++k) {
      if (t.sums.shared >> k & 1) store_number(scalars_of(t, row)[k], scalars[k]);
    }
  }
}

// Adds up what was concluded in the shares, over rows and then over scopes. One block does it, when all are done.
template <class Rule, int Words>
__device__ __forceinline__ void add_epilogue(const Arguments<Words>& a) {
  constexpr int n = kEpilogue<Rule>;
  const Tables& t = a.tables;
  double* const of_rows = t.sums.epilogue_slots + static_cast<std::int64_t>(t.n_shares * kRunsPerShare + t.n_rows) * n;
#pragma unroll 1
  for (int chunk = warp_id(); chunk * 32 < t.n_rows; chunk += kWarps) {
    const int row = chunk * 32 + lane_id();
    Unit unit;
    if (row < t.n_rows && grad_word(a, row)) {
      unit = Unit(t, row, static_cast<int>(t.tiles[row]), static_cast<int>(t.tiles[row + 1]), row);
    }
    add_units<n>(t, t.sums.epilogue_slots, unit, [&](const double* sums) {
#pragma unroll
      for (int k = 0; k < n; ++k) {
        if (row < t.n_rows) of_rows[static_cast<std::int64_t>(row) * n + k] = sums[k];
      }
    });
  }
  __threadfence();
  __syncthreads();
  const int me = static_cast<int>(threadIdx.x);
  if (!t.sums.has_scopes || t.sums.in_channels) {  // scopes are rows
    for (int k = me; k < t.n_rows * n; k += kThreads) t.sums.epilogue[k] = __ldcg(of_rows + k);
  } else {
#pragma unroll 1
    for (int scope = 0; scope < t.sums.n_scopes; ++scope) {
      double sums[n] = {};
#pragma unroll 1
      for (int row = me; row < t.n_rows; row += kThreads) {
        if (sums_of(t, row)[kScope] != scope) continue;
#pragma unroll
        for (int k = 0; k < n; ++k) sums[k] += __ldcg(of_rows + static_cast<std::int64_t>(row) * n + k);
      }
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const double sum = block_sum(sums[k]);
        if (me == 0) t.sums.epilogue[static_cast<std::int64_t>(scope) * n + k] = sum;
      }
    }
  }
  __threadfence();
  __syncthreads();
}

// Where the name of a sum stands among the rule's scalars.
template <class Rule>
constexpr int scalar_of(std::string_view name) {
  int k = 0;
  while (Rule::scalars[static_cast<std::size_t>(k)] != name) ++k;
  return k;
}

template <class Rule, std::size_t K>  // found by the compiler, not searched for on the device
constexpr int kPlaceOfConcluded = scalar_of<Rule>(Rule::epilogue[K]);

// What was concluded of a scope is a scalar of each of its rows.
template <class Rule, int Words>
__device__ __forceinline__ void write_epilogue(const Arguments<Words>& a) {
  constexpr int n = kEpilogue<Rule>;
  const Tables& t = a.tables;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x); row < t.n_rows; row += kThreads) {
    if (!is_live<Rule>(a, row)) continue;
    const double* found = t.sums.epilogue + sums_of(t, row)[kScope] * n;
    [&]<std::size_t... K>(std::index_sequence<K...>) {
      (store_number(scalars_of(t, row)[kPlaceOfConcluded<Rule, K>], __ldcg(found + K)), ...);
    }(std::make_index_sequence<static_cast<std::size_t>(n)>());
  }
}

}  // namespace fusedopt::cuda
