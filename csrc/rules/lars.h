// LARS:  g <- trust (g + wd p) ;  b <- mu b + (1 - tau) g  (first step: b <- g) ;  d = g + mu b with Nesterov, else b
//   trust = eta |p| / (|g| + wd |p| + eps) over the tensor; 1 where a norm is 0, or nothing decays and not
//   `always_adapt`
#pragma once

#include "families/momentum.h"

namespace fusedopt {

template <bool Momentum>
struct LARS : MomentumBuffer<Momentum> {
  static constexpr auto name = "lars";
  FUSEDOPT_SCALARS();
  FUSEDOPT_HYPER(momentum, dampening, nesterov, weight_decay, trust_coefficient, eps, always_adapt);
  FUSEDOPT_COEFFICIENTS(momentum, kept, gain, nesterov, weight_decay, trust_coefficient, eps, adapts, trust);
  FUSEDOPT_MEASURES(param, grad);

  // The first step puts the gradient into the buffer, whatever is there: a parameter given twice has two first steps.
  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool new_state) {
    return {
        .momentum = h.momentum,
        .kept = new_state ? 0 : h.momentum,
        .gain = new_state ? 1 : 1 - h.dampening,
        .nesterov = h.nesterov,
        .weight_decay = h.weight_decay,
        .trust_coefficient = h.trust_coefficient,
        .eps = h.eps,
        .adapts = h.weight_decay != 0 || h.always_adapt != 0 ? 1.0 : 0.0,
        .trust = 1,
    };
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, const Coefficients<T>&) {
    return {.param = p * p, .grad = g * g};
  }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars&, const Sums<Measures<double>>& m) {
    const double p = std::sqrt(m.param), g = std::sqrt(m.grad);
    if (c.adapts != 0 && p > 0 && g > 0) c.trust = c.trust_coefficient * p / (g + c.weight_decay * p + c.eps);
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    return MomentumBuffer<Momentum>::along(c.trust * (g + c.weight_decay * p), state, c);
  }
};

FUSEDOPT_REGISTER(LARS<false>, LARS<true>)

}  // namespace fusedopt
