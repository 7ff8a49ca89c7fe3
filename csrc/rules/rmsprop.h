// RMSprop:  v <- a v + (1 - a) g^2 ;  u = g / (sqrt(v) + eps) ;  d = u
//   centered:  m <- a m + (1 - a) g, and max(v - m^2, 0) in place of v (the difference can round below 0)
//   momentum:  b <- mu b + u ;  d = b
#pragma once

#include "core/math.h"

namespace fusedopt {

template <bool Momentum, bool Centered>
struct RMSprop {
  static constexpr auto name = "rmsprop";
  static constexpr auto states = [] {
    if constexpr (Momentum && Centered) {
      return Names<3>{"square_avg", "momentum_buffer", "grad_avg"};
    } else if constexpr (Momentum) {
      return Names<2>{"square_avg", "momentum_buffer"};
    } else if constexpr (Centered) {
      return Names<2>{"square_avg", "grad_avg"};
    } else {
      return Names<1>{"square_avg"};
    }
  }();
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(alpha, eps, momentum);
  FUSEDOPT_COEFFICIENTS(alpha, one_minus_alpha, eps, momentum);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool) {
    return {.alpha = h.alpha, .one_minus_alpha = 1 - h.alpha, .eps = h.eps, .momentum = h.momentum};
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    T variance = state[0] = c.alpha * state[0] + c.one_minus_alpha * (g * g);
    if constexpr (Centered) {
      T& mean = state[1 + Momentum];
      mean = lerp(mean, g, c.one_minus_alpha);
      variance -= mean * mean;
      variance = variance < T(0) ? T(0) : variance;
    }
    const T update = g / (std::sqrt(variance) + c.eps);
    if constexpr (!Momentum) return update;
    return state[1] = c.momentum * state[1] + update;
  }
};

FUSEDOPT_REGISTER(RMSprop<false, false>, RMSprop<true, false>, RMSprop<false, true>, RMSprop<true, true>)

}  // namespace fusedopt
