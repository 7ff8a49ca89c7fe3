// What the engines, not the rules, do in a step: what becomes of it, and the order of one element's step.
#pragma once

#include <limits>

#include "core/rule.h"

namespace fusedopt {

// The passes of a step, see fusedopt/passes.py; in the order of their bits.
constexpr auto pass_names = FUSEDOPT_NAMES(NORM, SUMS, SCOPES, UPDATE, EPILOGUE);
enum Pass : int { kNormPass = 1, kSumsPass = 2, kScopesPass = 4, kUpdatePass = 8, kEpiloguePass = 16 };

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What becomes of a step, once the sum of the gradients' squares is known.
struct Decision {
  double factor;  // of the gradients: 1 / loss scale * clip coefficient
  double norm;    // after unscaling
  bool skipped;
};

// Clips as torch.nn.utils.clip_grad_norm_ does: min(1, max_norm / (norm + 1e-6)), and NaN stays NaN.
FUSEDOPT_HD Decision decide(double squared_norm, double inverse_scale, bool found_inf, double max_norm,
                            bool skip_nonfinite) {
  Decision d{inverse_scale, std::sqrt(squared_norm) * inverse_scale, found_inf};
  d.skipped |= skip_nonfinite && !(d.norm < kInfinity);
  if (max_norm == kInfinity) return d;
  const double clip = max_norm / (d.norm + 1e-6);
  if (!(clip > 1)) d.factor *= clip;
  return d;
}

// What the elements of a cohort have in common besides the rule's coefficients. T is the compute type.
template <class T>
struct EngineScalars {
  T gradient_factor;  // unscales, clips and, where it is negative, maximizes
  T coupled_decay;    // weight_decay where it is L2 regularisation, else 0
  T decay_factor;     // 1 - lr * weight_decay where decay is decoupled, else 1
  T opposed_factor;   // the same where the direction and the parameter have opposite signs: 1 if decay is cautious
  T step_scale;       // of the direction: lr or 1

  template <class U>
  FUSEDOPT_HD EngineScalars<U> as() const {
    return {static_cast<U>(gradient_factor), static_cast<U>(coupled_decay), static_cast<U>(decay_factor),
            static_cast<U>(opposed_factor), static_cast<U>(step_scale)};
  }
};

template <class Rule>
FUSEDOPT_HD EngineScalars<double> engine_scalars(double gradient_factor, double lr, double weight_decay,
                                                 bool is_decoupled, bool is_cautious) {
  const double factor = is_decoupled ? 1 - lr * weight_decay : 1;
  return {gradient_factor, is_decoupled ? 0 : weight_decay, factor, is_cautious ? 1 : factor,
          kStepScale<Rule> == StepScale::kLr ? lr : 1};
}

// What a rule measures of an element, as its step would see it.
template <class Rule, class T>
FUSEDOPT_HD typename Rule::template Measures<T> measure_element(T p, T g, [[maybe_unused]] T* state,
                                                                const EngineScalars<T>& e,
                                                                const typename Rule::template Coefficients<T>& c) {
  g *= e.gradient_factor;
  if (e.coupled_decay != T(0)) g += e.coupled_decay * p;
  if constexpr (kMeasuresStates<Rule>) {
    return Rule::template measure<T>(p, g, state, c);
  } else {
    return Rule::template measure<T>(p, g, c);
  }
}

// One element's step, in the order of every engine: unscale, clip and maximize (one factor); noise; coupled decay;
// direction; decoupled decay; average; write. Where there is noise, the engine has applied the factor and added it
// before this; the average is its business, too. Values come from operands, and go back to be rounded into them. Calls
// conclude(g, d) at the end.
template <class Rule, class T, class Conclude>
FUSEDOPT_HD void step_element(T& p, T g, T* state, const EngineScalars<T>& e,
                              const typename Rule::template Coefficients<T>& c, Conclude conclude) {
  g *= e.gradient_factor;
  if constexpr (!kReplaces<Rule>) {
    if (e.coupled_decay != T(0)) g += e.coupled_decay * p;
  }
  const T d = Rule::template direction<T>(p, g, state, c);
  if constexpr (kReplaces<Rule>) {
    p = d;
  } else {
    p = (d * p < T(0) ? e.opposed_factor : e.decay_factor) * p - e.step_scale * d;
  }
  conclude(g, d);
}

template <class Rule, class T>
FUSEDOPT_HD void step_element(T& p, T g, T* state, const EngineScalars<T>& e,
                              const typename Rule::template Coefficients<T>& c) {
  step_element<Rule, T>(p, g, state, e, c, [](T, T) {});
}

}  // namespace fusedopt
