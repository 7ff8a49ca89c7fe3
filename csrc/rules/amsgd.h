// AMSGD:  b = clip(sum(g^2 + lam d (2 g - d)) / sum((d - g)^2), 0, b_max) over the scope, 0 where the second is 0 ;
//   d <- ((b + lam) d + (1 - b) g) / (1 + lam).  Before a tensor's first step, d is its gradient.
#pragma once

#include "families/adaptive_memory.h"

namespace fusedopt {

struct AMSGD {
  static constexpr auto name = "amsgd";
  static constexpr Names<1> states{"momentum_buffer"};
  FUSEDOPT_SCALARS(step, beta);
  FUSEDOPT_HYPER(lam, beta_max);
  FUSEDOPT_COEFFICIENTS(lam, beta_max, is_new, kept, taken);
  FUSEDOPT_MEASURES(gain, difference);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool new_state) {
    return {.lam = h.lam, .beta_max = h.beta_max, .is_new = new_state ? 1.0 : 0.0, .kept = 0, .taken = 0};
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T, T g, T* state, const Coefficients<T>& c) {
    const T d = c.is_new != 0 ? g : state[0];
    return {.gain = g * g + c.lam * d * (2 * g - d), .difference = (d - g) * (d - g)};
  }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    s.beta = memory_of(m.whole.gain, m.whole.difference, c.beta_max);
    c.kept = (s.beta + c.lam) / (1 + c.lam);
    c.taken = (1 - s.beta) / (1 + c.lam);
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    return state[0] = c.is_new != 0 ? g : c.kept * state[0] + c.taken * g;
  }
};

FUSEDOPT_REGISTER(AMSGD)

}  // namespace fusedopt
