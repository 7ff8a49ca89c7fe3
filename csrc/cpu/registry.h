// Kernels of the rules that are compiled into this engine build, found by name and states.
#pragma once

#include <array>
#include <bit>
#include <vector>

#include "cpu/sum.h"
#include "cpu/tile.h"

// Iterations of the next loop do not depend on one another: no operand overlaps another.
#if defined(__clang__)
#define FUSEDOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSEDOPT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace fusedopt::cpu {

inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

template <class T, std::size_t N, class Fields>
std::array<T, N> as_array(const Fields& fields) {
  return std::bit_cast<std::array<T, N>>(fields);
}

constexpr std::int64_t kRun = 256;  // elements of which is found what is added up before it is

// What the rule measures of n elements, added to its sums.
template <class Rule, class T>
void measure_elements(std::int64_t n, T* const* values, const EngineScalars<T>& engine,
                      const typename Rule::template Coefficients<T>& coefficients, double* sums) {
  const EngineScalars<T> e = engine;
  const auto c = coefficients;
  for (std::int64_t begin = 0; begin < n; begin += kRun) {
    const std::int64_t count = n - begin < kRun ? n - begin : kRun;
    const T* const p = values[kParam] + begin;
    const T* const g = values[kGrad] + begin;
    const T* states[kStates<Rule> + 1];
    for (int k = 0; k < kStates<Rule>; ++k) states[k] = values[kFirstState + k] + begin;
    T found[kMeasures<Rule>][kRun];
    FUSEDOPT_INDEPENDENT
    for (std::int64_t i = 0; i < count; ++i) {
      T state[kStates<Rule> + 1];
      for (int k = 0; k < kStates<Rule>; ++k) state[k] = states[k][i];
      const auto m = as_array<T, kMeasures<Rule>>(measure_element<Rule, T>(p[i], g[i], state, e, c));
      for (int k = 0; k < kMeasures<Rule>; ++k) found[k][i] = m[k];
    }
    for (int k = 0; k < kMeasures<Rule>; ++k) sums[k] += sum(found[k], count);
  }
}

// The step of n elements, and what the rule concludes added to its sums.
template <class Rule, class T>
void conclude_elements(std::int64_t n, T* const* values, const EngineScalars<T>& engine,
                       const typename Rule::template Coefficients<T>& coefficients, double* sums) {
  const EngineScalars<T> e = engine;
  const auto c = coefficients;
  for (std::int64_t begin = 0; begin < n; begin += kRun) {
    const std::int64_t count = n - begin < kRun ? n - begin : kRun;
    T* const p = values[kParam] + begin;
    const T* const g = values[kGrad] + begin;
    T* states[kStates<Rule> + 1];
    for (int k = 0; k < kStates<Rule>; ++k) states[k] = values[kFirstState + k] + begin;
    T found[kEpilogue<Rule>][kRun];
    FUSEDOPT_INDEPENDENT
    for (std::int64_t i = 0; i < count; ++i) {
      T state[kStates<Rule> + 1];
      for (int k = 0; k < kStates<Rule>; ++k) state[k] = states[k][i];
      step_element<Rule, T>(p[i], g[i], state, e, c, [&](T seen, T d) {
        const auto m = as_array<T, kEpilogue<Rule>>(Rule::template conclude<T>(p[i], seen, d, state, c));
        for (int k = 0; k < kEpilogue<Rule>; ++k) found[k][i] = m[k];
      });
      for (int k = 0; k < kStates<Rule>; ++k) states[k][i] = state[k];
    }
    for (int k = 0; k < kEpilogue<Rule>; ++k) sums[k] += sum(found[k], count);
  }
}

// The step of n elements.
template <class Rule, class T>
void step_elements(std::int64_t n, T* const* values, const EngineScalars<T>& engine,
                   const typename Rule::template Coefficients<T>& coefficients) {
  const EngineScalars<T> e = engine;
  const auto c = coefficients;
  T* const p = values[kParam];
  const T* const g = values[kGrad];
  T* states[kStates<Rule> + 1];
  for (int k = 0; k < kStates<Rule>; ++k) states[k] = values[kFirstState + k];
  FUSEDOPT_INDEPENDENT
  for (std::int64_t i = 0; i < n; ++i) {
    T state[kStates<Rule> + 1];
    for (int k = 0; k < kStates<Rule>; ++k) state[k] = states[k][i];
    step_element<Rule, T>(p[i], g[i], state, e, c);
    for (int k = 0; k < kStates<Rule>; ++k) states[k][i] = state[k];
  }
}

// Calls body(count, values, engine scalars, coefficients) for each tile of a segment, all in the compute type T.
template <class Rule, class T, class Body>
void each_tile_as(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients, bool writes,
                  Body body) {
  const EngineScalars<T> e =
      engine_scalars<Rule>(factor * cohort.sign, cohort.lr, cohort.weight_decay, cohort.is_decoupled).template as<T>();
  const auto c = cast_coefficients<Rule, T>(coefficients);
  Tile<T, kParam, kOperands<Rule>> tile(segment.row);
  each_tile(segment, tile.size(), [&](std::int64_t begin, std::int64_t count) {
    body(count, tile.fetch(begin, count), e, c);
    if (writes) tile.put(begin, count);
  });
}

template <class Rule, class Body>
void each_tile_of(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients, bool writes,
                  Body body) {
  const bool is_wide = segment.row.codecs[kParam] == Codec::f64;
  const auto call = is_wide ? each_tile_as<Rule, double, Body> : each_tile_as<Rule, float, Body>;
  call(segment, factor, cohort, coefficients, writes, body);
}

// The body of the pass that steps.
template <class Rule>
void update(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients,
            [[maybe_unused]] double* epilogue) {
  each_tile_of<Rule>(segment, factor, cohort, coefficients, /*writes=*/true,
                     [&]<class T>(std::int64_t n, T* const* values, const EngineScalars<T>& e, const auto& c) {
                       if constexpr (kEpilogue<Rule> > 0) {
                         conclude_elements<Rule, T>(n, values, e, c, epilogue);
                       } else {
                         step_elements<Rule, T>(n, values, e, c);
                       }
                     });
}

// That of the pass that measures.
template <class Rule>
void measure(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients,
             double* measures) {
  each_tile_of<Rule>(segment, factor, cohort, coefficients, /*writes=*/false,
                     [&]<class T>(std::int64_t n, T* const* values, const EngineScalars<T>& e, const auto& c) {
                       measure_elements<Rule, T>(n, values, e, c, measures);
                     });
}

template <class Rule>
constexpr Kernel kernel_of() {
  Kernel kernel{names_of<Rule>, prepare<Rule>, update<Rule>, nullptr, nullptr, nullptr};
  if constexpr (kMeasures<Rule> > 0) {
    kernel.measure = measure<Rule>;
    kernel.finish = finish<Rule>;
    if constexpr (kHasScore<Rule>) kernel.score = score<Rule>;
  }
  return kernel;
}

template <class... Rules>
bool add_kernels() {
  (kernels().push_back(kernel_of<Rules>()), ...);
  return true;
}

}  // namespace fusedopt::cpu
