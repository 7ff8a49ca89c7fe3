// ReplicatedSGD:  SGD's step along h = g + gamma (p - center); center is the mean of replicas, found before the step.
#pragma once

#include "families/momentum.h"

namespace fusedopt {

template <bool Momentum>
struct ReplicatedSGD {
  static constexpr auto name = "replicatedsgd";
  static constexpr auto states = [] {
    if constexpr (Momentum) {
      return Names<2>{"momentum_buffer", "center"};
    } else {
      return Names<1>{"center"};
    }
  }();
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(momentum, dampening, nesterov, gamma);
  FUSEDOPT_COEFFICIENTS(momentum, kept, gain, nesterov, gamma);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool new_state) {
    return {
        .momentum = h.momentum,
        .kept = new_state ? 0 : h.momentum,
        .gain = new_state ? 1 : 1 - h.dampening,
        .nesterov = h.nesterov,
        .gamma = h.gamma,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    return MomentumBuffer<Momentum>::along(g + c.gamma * (p - state[Momentum]), state, c);
  }
};

FUSEDOPT_REGISTER(ReplicatedSGD<false>, ReplicatedSGD<true>)

}  // namespace fusedopt
