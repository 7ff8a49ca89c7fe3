// Adamax:  m <- b1 m + (1 - b1) g ;  u <- max(b2 u, |g| + eps) ;  d = m / (1 - b1^t) / u
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Adamax {
  static constexpr auto name = "adamax";
  static constexpr Names<2> states{"exp_avg", "exp_inf"};
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(beta1, beta2, eps);
  FUSEDOPT_COEFFICIENTS(one_minus_beta1, beta2, eps, scale);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .eps = h.eps,
        .scale = 1 / bias_correction(h.beta1, s.step),
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    state[0] = lerp(state[0], g, c.one_minus_beta1);
    state[1] = maximum(c.beta2 * state[1], std::abs(g) + c.eps);
    return c.scale * state[0] / state[1];
  }
};

FUSEDOPT_REGISTER(Adamax)

}  // namespace fusedopt
