// Kernels of the rules that are compiled into this engine build, found by name and states.
#pragma once

#include <vector>

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

template <class Rule, class T>
void update_as(const Segment& segment, const EngineScalars<double>& engine, const double* coefficients) {
  const EngineScalars<T> e = engine.as<T>();
  const auto c = cast_coefficients<Rule, T>(coefficients);
  Tile<T, kParam, kOperands<Rule>> tile(segment.row);
  each_tile(segment, tile.size(), [&](std::int64_t begin, std::int64_t count) {
    step_elements<Rule, T>(count, tile.fetch(begin, count), e, c);
    tile.put(begin, count);
  });
}

// The body of the pass that steps.
template <class Rule>
void update(const Segment& segment, double factor, const Cohort& cohort, const double* coefficients) {
  const EngineScalars<double> engine =
      engine_scalars<Rule>(factor * cohort.sign, cohort.lr, cohort.weight_decay, cohort.is_decoupled);
  const bool is_wide = segment.row.codecs[kParam] == Codec::f64;
  (is_wide ? update_as<Rule, double> : update_as<Rule, float>)(segment, engine, coefficients);
}

template <class... Rules>
bool add_kernels() {
  (kernels().push_back({names_of<Rules>, prepare<Rules>, update<Rules>}), ...);
  return true;
}

}  // namespace fusedopt::cpu
