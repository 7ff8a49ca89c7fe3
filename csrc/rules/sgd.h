// SGD:  b <- mu b + (1 - tau) g  (first step: b <- g) ;  d = g + mu b with Nesterov, else b ; mu = 0: d = g
#pragma once

#include "families/momentum.h"

namespace fusedopt {

template <bool Momentum>
struct SGD : MomentumBuffer<Momentum> {
  static constexpr auto name = "sgd";
  FUSEDOPT_SCALARS();
  FUSEDOPT_HYPER(momentum, dampening, nesterov);
  FUSEDOPT_COEFFICIENTS(momentum, kept, gain, nesterov);

  // The first step puts the gradient into the buffer, whatever is there: a parameter given twice has two first steps.
  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool new_state) {
    return {
        .momentum = h.momentum,
        .kept = new_state ? 0 : h.momentum,
        .gain = new_state ? 1 : 1 - h.dampening,
        .nesterov = h.nesterov,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    return MomentumBuffer<Momentum>::along(g, state, c);
  }
};

FUSEDOPT_REGISTER(SGD<false>, SGD<true>)

}  // namespace fusedopt
