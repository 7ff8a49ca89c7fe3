// The order of one element's step, the same for every rule and engine:
// unscale, clip and maximize (one factor) -> coupled L2 -> rule -> decoupled decay -> write.
#pragma once

#include "core/rule.h"

namespace fusedopt {

// What the engine, not the rule, needs to step one cohort. T is the compute type.
template <class T>
struct Common {
  T gradient_factor;  // +-1 / loss scale * clip coefficient; negative to maximize
  T coupled_decay;    // weight_decay when it is L2 regularisation, else 0
  T keep;             // 1 - lr * weight_decay when decay is decoupled, else 1
  T lr;
};

template <class Rule, class T>
FUSEDOPT_HD void step_element(T& p, T g, T* state, const Common<T>& common,
                              const typename Rule::template Coefficients<T>& coefficients) {
  g *= common.gradient_factor;
  if (common.coupled_decay != T(0)) g += common.coupled_decay * p;
  const T d = Rule::template direction<T>(p, g, state, coefficients);
  p = common.keep * p - common.lr * d;
}

}  // namespace fusedopt
