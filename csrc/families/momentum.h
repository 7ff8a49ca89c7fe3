// What SGD and its like share: a buffer, where there is momentum, and the step along it.
#pragma once

#include "core/math.h"

namespace fusedopt {

template <bool Momentum>
struct MomentumBuffer {
  static constexpr auto states = [] {
    if constexpr (Momentum) {
      return Names<1>{"momentum_buffer"};
    } else {
      return Names<0>{};
    }
  }();

  //   b <- kept b + gain g ;  d = g + momentum b with Nesterov, else b ; without momentum d = g
  template <class T, class Coefficients>
  FUSEDOPT_HD static T along(T g, T* state, const Coefficients& c) {
    if constexpr (!Momentum) return g;
    state[0] = c.kept * state[0] + c.gain * g;
    return c.nesterov != T(0) ? g + c.momentum * state[0] : state[0];
  }
};

}  // namespace fusedopt
