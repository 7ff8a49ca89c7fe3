// AdaBound, AMSBound. The bounds divided by lr do not depend on lr, so the clamp is a direction:
//   d = clamp(sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(w) + eps), lo, hi) m
//   lo = f (1 - 1 / (gamma t + 1)),  hi = f (1 + 1 / (gamma t)),  f = final_lr / base_lr
#pragma once

#include "families/adam.h"

namespace fusedopt {

template <bool Amsbound>
struct AdaBound : AdamMoments<Amsbound> {
  static constexpr auto name = "adabound";
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(beta1, beta2, eps, final_lr, gamma, base_lr);
  FUSEDOPT_COEFFICIENTS(one_minus_beta1, beta2, one_minus_beta2, scale, low, high, eps);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const double final = h.final_lr / h.base_lr, growth = h.gamma * s.step;
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .scale = std::sqrt(bias_correction(h.beta2, s.step)) / bias_correction(h.beta1, s.step),
        .low = final * (1 - 1 / (growth + 1)),
        .high = final * (1 + 1 / growth),
        .eps = h.eps,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    const T w = update_moments<Amsbound>(g, state, c.one_minus_beta1, c.beta2, c.one_minus_beta2);
    return clamp(c.scale / (std::sqrt(w) + c.eps), c.low, c.high) * state[0];
  }
};

FUSEDOPT_REGISTER(AdaBound<false>, AdaBound<true>)

}  // namespace fusedopt
