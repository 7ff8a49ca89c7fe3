// Adagrad:  S <- S + g^2 ;  d = g / (sqrt(S) + eps) / (1 + (t - 1) lr_decay)
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Adagrad {
  static constexpr auto name = "adagrad";
  static constexpr Names<1> states{"sum"};
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(lr_decay, eps);
  FUSEDOPT_COEFFICIENTS(scale, eps);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {.scale = 1 / (1 + (s.step - 1) * h.lr_decay), .eps = h.eps};
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    state[0] += g * g;
    return c.scale * g / (std::sqrt(state[0]) + c.eps);
  }
};

FUSEDOPT_REGISTER(Adagrad)

}  // namespace fusedopt
