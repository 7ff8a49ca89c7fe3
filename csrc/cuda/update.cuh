// The pass that steps: cohort by cohort, tile by tile.
#pragma once

#include "core/step.h"
#include "cuda/walk.cuh"

namespace fusedopt::cuda {

// -------------------------------------------------------------------------------------------------------- cohorts

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

// Where a group's record begins in the step table.
template <class Rule, int Words>
__device__ __forceinline__ int record_of(const Arguments<Words>& a, int row) {
  const int group = static_cast<int>(row_words(a.tables, row)[kGroup]);
  return kGrads + a.tables.n_rows + group * record_words(kHyper<Rule>);
}

// A number of a record: a value, or where the device finds it.
template <int Words>
__device__ __forceinline__ double record_number(const Arguments<Words>& a, int record, int number) {
  const std::int64_t source = step_word(a, record + 2 * number + 1);
  return source ? load_number(source) : __longlong_as_double(step_word(a, record + 2 * number));
}

// The addresses of a row's scalars.
__device__ __forceinline__ const std::int64_t* scalars_of(const Tables& t, int row) {
  return row_words(t, row) + kOperandAddresses + kAddresses * (1 + t.n_states);
}

template <class Rule>
struct Numbers {
  double hyper[kHyper<Rule> + 1], scalars[kScalars<Rule> + 1];

  // `step` already counts the step to come.
  template <int Words>
  __device__ __forceinline__ Numbers(const Arguments<Words>& a, int row, int record) {
#pragma unroll
    for (int k = 0; k < kHyper<Rule>; ++k) hyper[k] = record_number(a, record, 2 + k);
    const std::int64_t* addresses = scalars_of(a.tables, row);
#pragma unroll
    for (int k = 0; k < kScalars<Rule>; ++k) scalars[k] = load_number(addresses[k]) + (k == 0 ? 1 : 0);
  }
};

template <class Rule, int Words>
__device__ __forceinline__ CohortCoefficients<Rule, double> prepare_cohort(const Arguments<Words>& a, int row,
                                                                           double factor) {
  const int record = record_of<Rule>(a, row), flags = record + 2 * (2 + kHyper<Rule>);
  Numbers<Rule> numbers(a, row, record);
  CohortCoefficients<Rule, double> c;
  c.engine = engine_scalars(factor * static_cast<double>(step_word(a, flags + kSign)), record_number(a, record, 0),
                            record_number(a, record, 1), step_word(a, flags + kDecoupled) != 0);
  prepare<Rule>(numbers.hyper, numbers.scalars, grad_word(a, row) & kNewState, reinterpret_cast<double*>(&c.rule));
  return c;
}

// Whether a row has the hyperparameters and counters of another; one without a gradient fits to any.
template <class Rule, int Words>
__device__ __forceinline__ bool is_same_cohort(const Arguments<Words>& a, int row, int other) {
  const Tables& t = a.tables;
  const std::int64_t grad = grad_word(a, row), of_other = grad_word(a, other);
  if (!grad) return true;
  if (!of_other || (grad & kNewState) != (of_other & kNewState)) return false;
  if (row_words(t, row)[kGroup] != row_words(t, other)[kGroup]) return false;
  bool same = true;
#pragma unroll
  for (int k = 0; k < kScalars<Rule>; ++k) {
    same &= load_number(scalars_of(t, row)[k]) == load_number(scalars_of(t, other)[k]);
  }
  return same;
}

// The first of the rows before `row`, and not before `first`, that are all of its cohort. The block looks together.
template <class Rule, int Words>
__device__ __forceinline__ int first_of_cohort(const Arguments<Words>& a, int row, int first) {
  FUSEDOPT_SHARED(int, others);
  int found = row;
  for (bool all = true; all && found > first;) {
    if (threadIdx.x == 0) others = 0;
    __syncthreads();
    const int candidate = found - 1 - static_cast<int>(threadIdx.x);
    const bool fits = candidate >= first && is_same_cohort<Rule>(a, candidate, row);
    if (!fits) atomicMax(&others, kThreads - static_cast<int>(threadIdx.x));
    __syncthreads();
    all = others == 0;
    found -= kThreads - others;
    __syncthreads();
  }
  return found;
}

// ---------------------------------------------------------------------------------------------------------- tiles

// The body of the pass, whichever way a lane's elements are fetched.
template <class Rule, class T, class Fetch>
__device__ __forceinline__ void step(const Row<kParam, kOperands<Rule>>& row, const Fetch& at,
                                     const CohortCoefficients<Rule, T>& c) {
  constexpr int n = kOperands<Rule>;
  typename Fetch::Raw raw[n];
  T values[n][Fetch::kCount];
#pragma unroll
  for (int k = 0; k < n; ++k) at.fetch(raw[k], row.address[k][0], row.signature.codec(k), k);
#pragma unroll
  for (int k = 0; k < n; ++k) decode<Fetch>(values[k], raw[k], row.signature.codec(k));
#pragma unroll
  for (int i = 0; i < Fetch::kCount; ++i) {
    T state[kStates<Rule> + 1];
#pragma unroll
    for (int k = 0; k < kStates<Rule>; ++k) state[k] = values[kFirstState + k][i];
    step_element<Rule, T>(values[kParam][i], values[kGrad][i], state, c.engine, c.rule);
#pragma unroll
    for (int k = 0; k < kStates<Rule>; ++k) values[kFirstState + k][i] = state[k];
  }
#pragma unroll
  for (int k = 0; k < n; ++k) {
    if (k == kGrad) continue;
    encode<Fetch>(raw[k], values[k], row.signature.codec(k));
    at.put(raw[k], row.address[k][0], row.signature.codec(k), k);
  }
}

template <class Rule, class T, bool Any>
__device__ __forceinline__ void step_range(const Row<kParam, kOperands<Rule>>& row, std::int64_t begin,
                                           std::int64_t end, const CohortCoefficients<Rule, T>& c) {
  using Fetch = Masked<kParam, kOperands<Rule>, Any>;
#pragma unroll 1
  for (; begin < end; begin += Fetch::kAll) step<Rule, T>(row, Fetch(begin, end, row.layout), c);
}

// A warp's tiles of a row, see Row::split, in the compute type T.
template <class Rule, class T>
__device__ __forceinline__ void update_row(const Row<kParam, kOperands<Rule>>& row, int first, int count,
                                           const CohortCoefficients<Rule, T>& c) {
  constexpr bool is_double = sizeof(T) == 8;
  row.template split<kBackwards>(
      first, count,
      [&](std::int64_t begin, std::int64_t end) {
        if (is_double || row.layout || row.signature.has(kWide)) {
          step_range<Rule, T, true>(row, begin, end, c);
        } else if constexpr (!is_double) {
          step_range<Rule, T, false>(row, begin, end, c);
        }
      },
      [&](int tile, int left) {
        if constexpr (!is_double) {  // of which no tile is whole
          const bool halves = row.signature.has(kHalves);
#pragma unroll 1
          for (; left > 0; --left, tile += kBackwards) step<Rule, T>(row, Whole(row.start(tile), halves), c);
        }
      });
}

// This warp's tiles of [begin, end), which one cohort's rows have, the last first: the norm has just read the last.
template <class Rule, int Words>
__device__ __forceinline__ void update_tiles(const Arguments<Words>& a, int begin, int end, int last_row,
                                             const CohortCoefficients<Rule, double>& c) {
  each_row<kBackwards>(a.tables, begin, end, last_row, [&](int index, int first, int count) {
    const Row<kParam, kOperands<Rule>> row(a, index);
    if (!row.active) return;
    if (row.signature.codec(kParam) == Codec::f64) {
      update_row<Rule, double>(row, first, count, c);
    } else {
      update_row<Rule, float>(row, first, count, c.template as<float>());
    }
  });
}

// ------------------------------------------------------------------------------------------------------------ pass

// Calls with the rule's variant of a number.
template <class Rule, class... More, class Call>
__device__ __forceinline__ void with_variant(int number, Call call) {
  if constexpr (sizeof...(More) == 0) {
    call.template operator()<Rule>();
  } else {
    if (number == 0) {
      call.template operator()<Rule>();
    } else {
      with_variant<More...>(number - 1, call);
    }
  }
}

// Steps the shares that this block claims, the last first, cohort by cohort; one thread prepares.
template <int Words, class... Rules>
__device__ __forceinline__ void update(const Arguments<Words>& a, double factor) {
  const Tables& t = a.tables;
  int prepared_for = -1;  // the row, as the thread that prepares knows
  each_claim(t.n_shares, t.counts + kSharesUpdated, [&](int claim) {
    const Share mine = share(t, t.n_shares - 1 - claim);
    int left = mine.end;
    int row = mine.last_row;
    while (left > mine.begin) {
      row = seek(t, row, left - 1);
      const std::uint32_t* signature =
          t.signatures + row_words(t, row)[kSignature] * (1 + codec_words(kFirstState + t.n_states));
      with_variant<Rules...>(static_cast<int>(signature[0] / kVariant), [&]<class Rule>() {
        using Prepared = CohortCoefficients<Rule, double>;
        FUSEDOPT_SHARED(Prepared, prepared);
        __syncthreads();
        if (threadIdx.x == 0 && grad_word(a, row)) {
          if (prepared_for < 0 || !is_same_cohort<Rule>(a, row, prepared_for)) {
            prepared = prepare_cohort<Rule>(a, row, factor);
          }
          prepared_for = row;
        }
        const int first = first_of_cohort<Rule>(a, row, mine.first_row);
        __syncthreads();
        const int begin = max(mine.begin, static_cast<int>(t.tiles[first]));
        update_tiles<Rule>(a, begin, left, row, prepared);
        left = begin;
        row = max(first - 1, 0);
      });
    }
  });
}

}  // namespace fusedopt::cuda
