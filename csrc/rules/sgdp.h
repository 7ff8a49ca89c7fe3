// SGDP:  b <- mu b + (1 - tau) g ;  d = g + mu b with Nesterov, else b, projected, without Nesterov b itself ;
//   p <- (1 - lr wd r / (1 - mu)) p - lr d with r = wd_ratio where it was projected, else 1
#pragma once

#include "families/projected.h"

namespace fusedopt {

struct SGDP : Projected {
  static constexpr auto name = "sgdp";
  static constexpr Names<1> states{"momentum"};
  FUSEDOPT_SCALARS(step, n_dims);
  FUSEDOPT_HYPER(momentum, dampening, nesterov, eps, weight_decay, delta, wd_ratio);
  FUSEDOPT_COEFFICIENTS(momentum, gain, ahead, g_scale, eps, delta, wd_ratio, along_buffer, pull);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool) {
    return {
        .momentum = h.momentum,
        .gain = 1 - h.dampening,
        .ahead = h.nesterov != 0 ? h.momentum : 1,
        .g_scale = h.nesterov != 0 ? 1.0 : 0.0,
        .eps = h.eps,
        .delta = h.delta,
        .wd_ratio = h.wd_ratio,
        .along_buffer = 0,
        .pull = h.weight_decay / (1 - h.momentum),
    };
  }

  template <class T>
  FUSEDOPT_HD static T step(T g, T* state, const Coefficients<T>& c) {
    state[0] = c.momentum * state[0] + c.gain * g;
    return c.g_scale * g + c.ahead * state[0];
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, T* state, const Coefficients<T>& c) {
    return sums(p, g, step(g, state, c));
  }

  FUSEDOPT_HD static double score(const Coefficients<double>& c, const Measures<double>& m) { return score_of(c, m); }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    c.along_buffer = project(c, s.n_dims, m) * (1 - c.g_scale);
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    const T d = step(g, state, c) + c.pull * p;
    state[0] -= c.along_buffer * p;
    return d;
  }
};

FUSEDOPT_REGISTER(SGDP)

}  // namespace fusedopt
