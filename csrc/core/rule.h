// What a rule is: the mathematics of one optimizer on values, shared by the CPU and CUDA engines.
//
// A rule is a struct with
//   name, states                            as in Python and in `state_dict`
//   FUSEDOPT_HYPER, FUSEDOPT_SCALARS        its hyperparameters and scalars, doubles; `step`, if there, is first
//   FUSEDOPT_COEFFICIENTS                   what an element needs besides its values
//   prepare(hyper, scalars, new_state)      once per step and cohort, in double, to the coefficients; may advance
//                                           scalars (`step` already counts this step; `new_state` is true when the
//                                           state was created for this step)
//   direction(p, g, state, c) -> d          once per element; updates state[], returns d of p -= lr * d
//   step_scale                              if there, StepScale::kOne: p -= d
// Rules that differ in the number of states are template variants with one name.
#pragma once

#include <cmath>
#include <span>

#include "core/fields.h"

#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_HD inline
#endif

// An engine's translation unit defines this before it includes a rule header, to instantiate it.
#if !defined(FUSEDOPT_REGISTER)
#define FUSEDOPT_REGISTER(...)
#endif

namespace fusedopt {

template <class Rule>
constexpr int kStates = static_cast<int>(Rule::states.size());
template <class Rule>
constexpr int kScalars = static_cast<int>(Rule::scalars.size());
template <class Rule>
constexpr int kHyper = static_cast<int>(Rule::hyper.size());
template <class Rule>
constexpr int kCoefficients = static_cast<int>(Rule::coefficients.size());

// What the engine multiplies a direction by.
enum class StepScale { kLr, kOne };

template <class Rule>
constexpr StepScale kStepScale = [] {
  if constexpr (requires { Rule::step_scale; }) {
    return Rule::step_scale;
  } else {
    return StepScale::kLr;
  }
}();

// What the languages agree on, in this order.
struct RuleNames {
  std::string_view rule;
  std::span<const std::string_view> states, scalars, hyper, coefficients;
  std::string_view step_scale;
};

template <class Rule>
constexpr RuleNames names_of{Rule::name,  Rule::states,       Rule::scalars,
                             Rule::hyper, Rule::coefficients, kStepScale<Rule> == StepScale::kOne ? "one" : "lr"};

// Coefficients<double>, as a plain run, to Coefficients<T>.
template <class Rule, class T>
FUSEDOPT_HD typename Rule::template Coefficients<T> cast_coefficients(const double* source) {
  using Target = typename Rule::template Coefficients<T>;
  static_assert(sizeof(Target) == kCoefficients<Rule> * sizeof(T));
  union {
    T values[kCoefficients<Rule>];
    Target target;
  } u;
  for (int i = 0; i < kCoefficients<Rule>; ++i) u.values[i] = static_cast<T>(source[i]);
  return u.target;
}

// Rule::prepare on plain runs of double, in the order of the names; advances scalars.
template <class Rule>
FUSEDOPT_HD void prepare(const double* hyper, double* scalars, bool new_state, double* coefficients) {
  typename Rule::Hyper h;
  typename Rule::Scalars s;
  __builtin_memcpy(&h, hyper, sizeof(double) * kHyper<Rule>);
  __builtin_memcpy(&s, scalars, sizeof(double) * kScalars<Rule>);
  const typename Rule::template Coefficients<double> c = Rule::prepare(h, s, new_state);
  __builtin_memcpy(scalars, &s, sizeof(double) * kScalars<Rule>);
  __builtin_memcpy(coefficients, &c, sizeof(c));
}

}  // namespace fusedopt
