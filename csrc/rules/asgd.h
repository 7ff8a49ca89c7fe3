// ASGD:  d = lambd eta p + eta g ;  ax <- ax + mu (p - d - ax) ;  p <- p - d ;  and for the next step
//   eta <- lr / (1 + lambd lr t)^alpha ;  mu <- 1 / max(1, t - t0)
#pragma once

#include "core/math.h"

namespace fusedopt {

struct ASGD {
  static constexpr auto name = "asgd";
  static constexpr Names<1> states{"ax"};
  static constexpr auto step_scale = StepScale::kOne;
  FUSEDOPT_SCALARS(step, eta, mu);
  FUSEDOPT_HYPER(lr, lambd, alpha, t0);
  FUSEDOPT_COEFFICIENTS(shrinkage, eta, mu);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const Coefficients<double> c{.shrinkage = h.lambd * s.eta, .eta = s.eta, .mu = s.mu};
    s.eta = h.lr / std::pow(1 + h.lambd * h.lr * s.step, h.alpha);
    s.mu = 1 / maximum(1.0, s.step - h.t0);
    return c;
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    const T d = c.shrinkage * p + c.eta * g, stepped = p - d;
    const T moved = state[0] + c.mu * (stepped - state[0]);
    state[0] = c.mu == T(1) ? stepped : moved;
    return d;
  }
};

FUSEDOPT_REGISTER(ASGD)

}  // namespace fusedopt
