// Cohorts: rows in a run that one `prepare` serves, for they have a group and the counters in common.
#pragma once

#include "core/step.h"
#include "cuda/options.cuh"

namespace fusedopt::cuda {

// What a rule prepares for the rows of a cohort, and the engine for them.
template <class Rule, class T>
struct CohortCoefficients {
  EngineScalars<T> engine;
  typename Rule::template Coefficients<T> rule;

  template <class U>
  __device__ __forceinline__ CohortCoefficients<Rule, U> as() const {
    return {engine.template as<U>(), cast_coefficients<Rule, U>(reinterpret_cast<const double*>(&rule))};
  }
};

// The addresses of a row's scalars.
__device__ __forceinline__ const std::int64_t* scalars_of(const Tables& t, int row) {
  return row_words(t, row) + kOperandAddresses + kAddresses * (1 + t.n_states);
}

// The steps of a row that the engine counts; 0 if it does not.
__device__ __forceinline__ double counted_of(const Tables& t, int row) {
  const std::int64_t counter = row_words(t, row)[kCounter];
  return counter ? load_number(counter) : 0;
}

// What tells cohorts apart: four times the group, plus one if states are new and two if averages are; and the N scalars
// before the step, and the steps that the engine counts. Rows without a gradient have -1. With a key one can compare
// when the step of its row has been counted, with the row one cannot.
template <int N>
struct CohortKey {
  int number;
  double scalars[N + 1];
  double counted;

  CohortKey() = default;

  template <int Words>
  __device__ __forceinline__ CohortKey(const Arguments<Words>& a, int row) {
    const std::int64_t grad = grad_word(a, row);
    const int group = static_cast<int>(row_words(a.tables, row)[kGroup]);
    const std::int64_t* addresses = scalars_of(a.tables, row);
    number = grad ? 4 * group + (grad & kNewAverage ? 2 : 0) + static_cast<int>(grad & kNewState) : -1;
    counted = a.tables.n_options && grad ? counted_of(a.tables, row) : 0;
#pragma unroll
    for (int k = 0; k < N; ++k) scalars[k] = grad ? load_number(addresses[k]) : 0;
  }

  __device__ __forceinline__ bool operator==(const CohortKey& other) const {
    bool same = number == other.number && counted == other.counted;
#pragma unroll
    for (int k = 0; k < N; ++k) same &= scalars[k] == other.scalars[k];
    return same;
  }
};

// The first of the rows before `row`, and not before `first`, that are all of its cohort; a row without a gradient fits
// to any. All lanes look at once, and every warp by itself.
template <int N, int Words>
__device__ __forceinline__ int first_of_cohort(const Arguments<Words>& a, const CohortKey<N>& key, int row, int first) {
  for (int found = 32; found == 32; row -= found) {
    const int candidate = row - 1 - lane_id();
    bool fits = candidate >= first;
    if (fits) {
      const CohortKey<N> other(a, candidate);
      fits = other.number < 0 || other == key;
    }
    const unsigned all = __ballot_sync(kAll, fits);
    found = __popc(all & ~(all + 1));  // those before the first that does not fit
  }
  return row;
}

template <class Rule>
using KeyOf = CohortKey<kScalars<Rule>>;

// Of a row without a gradient, whose scalars advance with those of its scope.
template <class Rule>
__device__ __forceinline__ KeyOf<Rule> key_without_gradient(const Tables& t, int row) {
  KeyOf<Rule> key;
  key.number = 4 * static_cast<int>(row_words(t, row)[kGroup]);
  key.counted = 0;
#pragma unroll
  for (int k = 0; k < kScalars<Rule>; ++k) key.scalars[k] = load_number(scalars_of(t, row)[k]);
  return key;
}

// Of the cohort of a key: its scalars after the step, and its coefficients.
template <class Rule>
struct CohortStep {
  double scalars[kScalars<Rule> + 1];
  double counted;  // by the engine, after the step
  CohortCoefficients<Rule, double> coefficients;
  CohortOptions options;
};

// Where a group's record begins in the step table.
template <class Rule>
__device__ __forceinline__ int record_of(const Tables& t, const KeyOf<Rule>& key) {
  return kGrads + t.n_rows + (key.number >> 2) * record_words(kHyper<Rule> + t.n_options);
}

// A number of a record: a value, or where the device finds it.
template <int Words>
__device__ __forceinline__ double record_number(const Arguments<Words>& a, int record, int number) {
  const std::int64_t source = step_word(a, record + 2 * number + 1);
  return source ? load_number(source) : __longlong_as_double(step_word(a, record + 2 * number));
}

// Advances the scalars, of which the first is `step`, and calls the rule.
template <class Rule, int Words>
__device__ __forceinline__ void advance(const Arguments<Words>& a, const KeyOf<Rule>& key, double* scalars,
                                        double* coefficients, bool counts = true) {
  const int record = record_of<Rule>(a.tables, key);
  double hyper[kHyper<Rule> + 1];
#pragma unroll
  for (int k = 0; k < kHyper<Rule>; ++k) hyper[k] = record_number(a, record, 2 + k);
#pragma unroll
  for (int k = 0; k < kScalars<Rule>; ++k) scalars[k] = key.scalars[k] + (k == 0 && counts ? 1 : 0);
  fusedopt::prepare<Rule>(hyper, scalars, key.number & 1, coefficients);
}

template <class Rule, int Words>
__device__ __forceinline__ CohortStep<Rule> prepare_cohort(const Arguments<Words>& a, const KeyOf<Rule>& key,
                                                           double factor) {
  const int record = record_of<Rule>(a.tables, key), flags = record + 2 * (2 + kHyper<Rule> + a.tables.n_options);
  CohortStep<Rule> p;
  p.coefficients.engine = engine_scalars<Rule>(
      factor * static_cast<double>(step_word(a, flags + kSign)), record_number(a, record, 0),
      record_number(a, record, 1), step_word(a, flags + kDecoupled) != 0, step_word(a, flags + kCautious) != 0);
  advance<Rule>(a, key, p.scalars, reinterpret_cast<double*>(&p.coefficients.rule));
  p.counted = key.counted + 1;
  if constexpr (kHasOptions<Rule>) {
    double numbers[option_numbers.size()];
#pragma unroll
    for (int k = 0; k < static_cast<int>(option_numbers.size()); ++k) {
      numbers[k] = record_number(a, record, 2 + kHyper<Rule> + k);
    }
    double step = p.counted;
    if constexpr (kHasStep<Rule>) step = p.scalars[0];
    p.options = options_of(numbers, step, key.number & 2);
  }
  return p;
}

// What follows from the sums of a row's segment, and those of its scope, for its coefficients and scalars.
template <class Rule>
__device__ __forceinline__ void finish_segment(const Tables& t, int row, int segment, double* coefficients,
                                               double* scalars) {
  constexpr int n = kMeasures<Rule>;
  if constexpr (n > 0) {
    const SumTables& sums = t.sums;
    const std::int64_t scope = sums_of(t, row)[kScope];
    double own[n], whole[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      own[k] = segments_of(t, row) ? __ldcg(sums.segments + static_cast<std::int64_t>(segment) * n + k) : 0;
      whole[k] = sums.has_scopes ? __ldcg(sums.wholes + scope * (n + 1) + k) : own[k];
    }
    const double largest = sums.has_scopes ? __ldcg(sums.largest + scope) : -kInfinity;
    finish<Rule>(coefficients, scalars, own, whole, largest);
  }
}

// The same of a cohort's coefficients, for a segment alone.
template <class Rule>
__device__ __forceinline__ CohortCoefficients<Rule, double> finished(const Tables& t, int row, int segment,
                                                                     const CohortStep<Rule>& prepared) {
  CohortStep<Rule> p = prepared;
  finish_segment<Rule>(t, row, segment, reinterpret_cast<double*>(&p.coefficients.rule), p.scalars);
  return p.coefficients;
}

// --------------------------------------------------------------------------------------------------------- counting

template <class Rule>
__device__ __forceinline__ void store_scalars(const Tables& t, int row, const double* scalars) {
  const std::int64_t* addresses = scalars_of(t, row);
#pragma unroll
  for (int k = 0; k < kScalars<Rule>; ++k) store_number(addresses[k], scalars[k]);
}

// Counts the step in a row of a cohort.
template <class Rule>
__device__ __forceinline__ void count_row(const Tables& t, int row, const CohortStep<Rule>& prepared) {
  if constexpr (kMeasures<Rule> > 0) {
    CohortStep<Rule> p = prepared;
    const int segment = static_cast<int>(sums_of(t, row)[kFirstSegment]);
    finish_segment<Rule>(t, row, segment, reinterpret_cast<double*>(&p.coefficients.rule), p.scalars);
    store_scalars<Rule>(t, row, p.scalars);
  } else {
    store_scalars<Rule>(t, row, prepared.scalars);
  }
  if constexpr (kHasOptions<Rule>) {
    const std::int64_t counter = row_words(t, row)[kCounter];
    if (counter) store_number(counter, prepared.counted);
  }
}

// Counts the step in those of a cohort's rows [first, last] that are whole in a share: nobody else reads their scalars.
template <class Rule, int Words>
__device__ __forceinline__ void count_cohort(const Arguments<Words>& a, const Share& own, int first, int last,
                                             const CohortStep<Rule>& prepared) {
  const Tables& t = a.tables;
  if constexpr (kScalars<Rule> > 0 || kHasOptions<Rule>) {
#pragma unroll 1
    for (int row = first + static_cast<int>(threadIdx.x); row <= last; row += kThreads) {
      const int begin = static_cast<int>(t.tiles[row]), end = static_cast<int>(t.tiles[row + 1]);
      const bool is_whole = own.begin <= begin && begin < end && end <= own.end;
      if (is_whole && grad_word(a, row)) count_row<Rule>(t, row, prepared);
    }
  }
}

// Counts the step in the other rows; all blocks are done with them.
template <class Rule, int Words>
__device__ __forceinline__ void count_borders(const Arguments<Words>& a) {
  const Tables& t = a.tables;
  if constexpr (kScalars<Rule> > 0 || kHasOptions<Rule>) {
#pragma unroll 1
    for (int k = static_cast<int>(threadIdx.x); k < t.n_borders; k += kThreads) {
      const int row = static_cast<int>(t.borders[k]);
      const KeyOf<Rule> key(a, row);
      if (key.number < 0) continue;
      CohortStep<Rule> prepared;  // without a use unless the rule advances
      advance<Rule>(a, key, prepared.scalars, reinterpret_cast<double*>(&prepared.coefficients.rule));
      prepared.counted = key.counted + 1;
      count_row<Rule>(t, row, prepared);
    }
  }
}

}  // namespace fusedopt::cuda
