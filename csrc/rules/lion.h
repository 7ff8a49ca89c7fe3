// Lion:  d = sign(b1 m + (1 - b1) g) ;  m <- b2 m + (1 - b2) g
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Lion {
  static constexpr auto name = "lion";
  static constexpr Names<1> states{"exp_avg"};
  FUSEDOPT_SCALARS();
  FUSEDOPT_HYPER(beta1, beta2);
  FUSEDOPT_COEFFICIENTS(beta1, one_minus_beta1, beta2, one_minus_beta2);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool) {
    return {.beta1 = h.beta1, .one_minus_beta1 = 1 - h.beta1, .beta2 = h.beta2, .one_minus_beta2 = 1 - h.beta2};
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    const T update = c.beta1 * state[0] + c.one_minus_beta1 * g;
    state[0] = c.beta2 * state[0] + c.one_minus_beta2 * g;
    return sign(update);
  }
};

FUSEDOPT_REGISTER(Lion)

}  // namespace fusedopt
