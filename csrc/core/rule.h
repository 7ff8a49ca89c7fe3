// What a rule is: the mathematics of one optimizer on values, shared by the CPU and CUDA engines.
//
// A rule is a struct with
//   name, states                            as in Python and in `state_dict`
//   FUSEDOPT_HYPER, FUSEDOPT_SCALARS        its hyperparameters and scalars, doubles; `step` is the first
//   FUSEDOPT_COEFFICIENTS                   what an element needs besides its values
//   prepare(hyper, scalars, new_state)      once per step and cohort, in double, to the coefficients; may advance
//                                           scalars (`step` already counts this step; `new_state` is true when the
//                                           state was created for this step)
//   direction(p, g, state, c) -> d          once per element; updates state[], returns d of p -= lr * d
//   step_scale                              if there, StepScale::kOne: p -= d
//   replaces                                if there and true: p = d, in variants with a certain state
// One that must know sums before it can step has more, see fusedopt/rule.py for what they are taken over:
//   FUSEDOPT_MEASURES                       names of the sums
//   measure(p, g, state, c) -> Measures<T>  once per element, what is added up; what it does to state[] is forgotten.
//                                           Without `state`, none is read
//   measures_param(c) -> bool               if there: whether measure() looks at p; engines may give it anything else
//   score(c, m) -> double                   if there: of a segment's Measures<double>; finish() is told the largest
//   finish(c, s, m)                         in double, once per segment: what follows from the sums, to coefficients
//                                           and scalars
// And one that adds up while it steps:
//   FUSEDOPT_EPILOGUE                       names of the sums, which are scalars
//   conclude(p, g, d, state, c) -> Epilogue<T>   once per element, of what there is after its step
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

using NameSpan = std::span<const std::string_view>;

template <class Rule>
constexpr NameSpan measures_of = [] {
  if constexpr (requires { Rule::measures; }) {
    return NameSpan(Rule::measures);
  } else {
    return NameSpan();
  }
}();
template <class Rule>
constexpr NameSpan epilogue_of = [] {
  if constexpr (requires { Rule::epilogue; }) {
    return NameSpan(Rule::epilogue);
  } else {
    return NameSpan();
  }
}();
template <class Rule>
constexpr int kMeasures = static_cast<int>(measures_of<Rule>.size());
template <class Rule>
constexpr int kEpilogue = static_cast<int>(epilogue_of<Rule>.size());
template <class Rule>
constexpr bool kAddsUp = kMeasures<Rule> > 0 || kEpilogue<Rule> > 0;
template <class Rule>
constexpr bool kHasScore = requires { &Rule::score; };

// Whether the rule counts steps.
template <class Rule>
constexpr bool kHasStep = [] {
  if constexpr (kScalars<Rule> > 0) return Rule::scalars[0] == "step";
  return false;
}();

// Whether `measure` asks for states.
template <class Rule, class T = float>
constexpr bool kMeasuresStates = requires(T x, T* state, const typename Rule::template Coefficients<T>& c) {
  Rule::template measure<T>(x, x, state, c);
};

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

// Whether a direction takes the parameter's place.
template <class Rule>
constexpr bool kReplaces = [] {
  if constexpr (requires { Rule::replaces; }) return Rule::replaces;
  return false;
}();

// What the languages agree on, in this order.
struct RuleNames {
  std::string_view rule;
  NameSpan states, scalars, hyper, coefficients, measures, epilogue;
  std::string_view step_scale;
  bool has_score;
  bool replaces;
};

template <class Rule>
constexpr RuleNames names_of{
    Rule::name,         Rule::states,      Rule::scalars,     Rule::hyper,
    Rule::coefficients, measures_of<Rule>, epilogue_of<Rule>, kStepScale<Rule> == StepScale::kOne ? "one" : "lr",
    kHasScore<Rule>,    kReplaces<Rule>};

// What `finish` is told: the segment's sums, those of its scope, and the largest score there.
template <class Measures>
struct Sums : Measures {
  Measures whole;
  double largest;
};

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

// Whether `measure` looks at the parameter with these coefficients.
template <class Rule>
FUSEDOPT_HD bool measures_param([[maybe_unused]] const double* coefficients) {
  if constexpr (requires(const typename Rule::template Coefficients<double>& c) { Rule::measures_param(c); }) {
    return Rule::measures_param(cast_coefficients<Rule, double>(coefficients));
  } else {
    return true;
  }
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

// Rule::score and Rule::finish, likewise.
template <class Rule>
FUSEDOPT_HD double score(const double* coefficients, const double* own) {
  typename Rule::template Measures<double> m;
  __builtin_memcpy(&m, own, sizeof(m));
  return Rule::score(cast_coefficients<Rule, double>(coefficients), m);
}

template <class Rule>
FUSEDOPT_HD void finish(double* coefficients, double* scalars, const double* own, const double* whole, double largest) {
  using Measures = typename Rule::template Measures<double>;
  Sums<Measures> m;
  __builtin_memcpy(static_cast<Measures*>(&m), own, sizeof(Measures));
  __builtin_memcpy(&m.whole, whole, sizeof(Measures));
  m.largest = largest;
  typename Rule::Scalars s;
  __builtin_memcpy(&s, scalars, sizeof(double) * kScalars<Rule>);
  typename Rule::template Coefficients<double> c = cast_coefficients<Rule, double>(coefficients);
  Rule::finish(c, s, m);
  __builtin_memcpy(scalars, &s, sizeof(double) * kScalars<Rule>);
  __builtin_memcpy(coefficients, &c, sizeof(c));
}

}  // namespace fusedopt
