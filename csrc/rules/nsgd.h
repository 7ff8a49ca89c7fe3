// NSGD:  SGD, whose step is divided by the power of the input of the layer that a parameter is of, or of each channel.
//   Its inverse is kept in `scale`, and in `channel_scale` for each element; 1 where there is none.
#pragma once

#include "families/momentum.h"

namespace fusedopt {

template <bool Momentum, bool Channels>
struct NSGD : MomentumBuffer<Momentum> {
  static constexpr auto name = "nsgd";
  static constexpr auto states = [] {
    if constexpr (Momentum && Channels) {
      return Names<2>{"momentum_buffer", "channel_scale"};
    } else if constexpr (Channels) {
      return Names<1>{"channel_scale"};
    } else {
      return MomentumBuffer<Momentum>::states;
    }
  }();
  FUSEDOPT_SCALARS(step, scale);
  FUSEDOPT_HYPER(momentum, dampening, nesterov);
  FUSEDOPT_COEFFICIENTS(momentum, kept, gain, nesterov, scale);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool new_state) {
    return {
        .momentum = h.momentum,
        .kept = new_state ? 0 : h.momentum,
        .gain = new_state ? 1 : 1 - h.dampening,
        .nesterov = h.nesterov,
        .scale = s.scale,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    const T d = c.scale * MomentumBuffer<Momentum>::along(g, state, c);
    if constexpr (Channels) return d * state[Momentum];
    return d;
  }
};

FUSEDOPT_REGISTER(NSGD<false, false>, NSGD<true, false>, NSGD<false, true>, NSGD<true, true>)

}  // namespace fusedopt
