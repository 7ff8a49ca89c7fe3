// SGD:  b <- mu b + (1 - tau) g  (first step: b <- g) ;  d = g + mu b with Nesterov, else b ; mu = 0: d = g
#pragma once

#include "core/math.h"

namespace fusedopt {

template <bool Momentum>
struct SGD {
  static constexpr auto name = "sgd";
  static constexpr auto states = [] {
    if constexpr (Momentum) {
      return Names<1>{"momentum_buffer"};
    } else {
      return Names<0>{};
    }
  }();
  static constexpr Names<0> scalars{};
  static constexpr Names<3> hyper{"momentum", "dampening", "nesterov"};
  struct Hyper {
    double momentum, dampening, nesterov;
  };
  struct Scalars {};
  template <class T>
  struct Coefficients {
    T momentum, kept, gain, nesterov;
  };

  // The first step puts the gradient into the buffer, whatever is there: a parameter given twice has two first steps.
  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool first) {
    return {h.momentum, first ? 0 : h.momentum, first ? 1 : 1 - h.dampening, h.nesterov};
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    if constexpr (!Momentum) return g;
    state[0] = c.kept * state[0] + c.gain * g;
    return c.nesterov != T(0) ? g + c.momentum * state[0] : state[0];
  }
};

FUSEDOPT_REGISTER(SGD<false>, SGD<true>)

}  // namespace fusedopt
