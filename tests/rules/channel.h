// See ChannelRule of tests/sum_rules.py.
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Channel {
  static constexpr auto name = "channel";
  static constexpr Names<1> states{"momentum_buffer"};
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(momentum, eps);
  FUSEDOPT_COEFFICIENTS(momentum, eps, weight, scale);
  FUSEDOPT_MEASURES(param, grad);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {.momentum = h.momentum, .eps = h.eps, .weight = 1 / s.step, .scale = 0};
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T p, T g, const Coefficients<T>&) {
    return {.param = p * p + T(1), .grad = g * g};
  }

  FUSEDOPT_HD static double score(const Coefficients<double>& c, const Measures<double>& m) {
    return c.weight * m.param / (1 + m.grad);
  }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars&, const Sums<Measures<double>>& m) {
    c.scale = (2 + m.largest / (1 + m.whole.param)) / (std::sqrt(m.grad) + c.eps) / (1 + std::sqrt(m.whole.grad));
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    state[0] = c.momentum * state[0] + c.scale * g;
    return state[0];
  }
};

FUSEDOPT_REGISTER(Channel)

}  // namespace fusedopt
