// Adadelta:  v <- rho v + (1 - rho) g^2 ;  d = sqrt(a + eps) / sqrt(v + eps) g ;  a <- rho a + (1 - rho) d^2
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Adadelta {
  static constexpr auto name = "adadelta";
  static constexpr Names<2> states{"square_avg", "acc_delta"};
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(rho, eps);
  FUSEDOPT_COEFFICIENTS(rho, one_minus_rho, eps);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool) {
    return {.rho = h.rho, .one_minus_rho = 1 - h.rho, .eps = h.eps};
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    state[0] = c.rho * state[0] + c.one_minus_rho * (g * g);
    const T d = std::sqrt(state[1] + c.eps) / std::sqrt(state[0] + c.eps) * g;
    state[1] = c.rho * state[1] + c.one_minus_rho * (d * d);
    return d;
  }
};

FUSEDOPT_REGISTER(Adadelta)

}  // namespace fusedopt
