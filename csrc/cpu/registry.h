// Kernels of the rules that are compiled into this engine build, found by name and states.
#pragma once

#include <vector>

#include "core/job.h"

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

template <class Rule, class T>
void step_tile(std::int64_t n, T* p, const T* g, T* const* states, const Common<T>& common_in,
               const double* coefficients_in) {
  constexpr int n_states = static_cast<int>(Rule::states.size());
  const Common<T> common = common_in;
  const auto coefficients = cast_coefficients<Rule, T>(coefficients_in);
  T* s[n_states + 1];
  for (int k = 0; k < n_states; ++k) s[k] = states[k];
  FUSEDOPT_INDEPENDENT
  for (std::int64_t i = 0; i < n; ++i) {
    T values[n_states + 1];
    for (int k = 0; k < n_states; ++k) values[k] = s[k][i];
    step_element<Rule, T>(p[i], g[i], values, common, coefficients);
    for (int k = 0; k < n_states; ++k) s[k][i] = values[k];
  }
}

template <class... Rules>
bool add_kernels() {
  static_assert(((Rules::states.size() <= kMaxStates) && ...));
  (kernels().push_back(Kernel{Rules::name, static_cast<int>(Rules::states.size()),
                              static_cast<int>(Rules::scalars.size()), static_cast<int>(Rules::hyper.size()),
                              Rules::states.data(), Rules::scalars.data(), Rules::hyper.data(), prepare<Rules>,
                              step_tile<Rules, float>, step_tile<Rules, double>}),
   ...);
  return true;
}

}  // namespace fusedopt::cpu
