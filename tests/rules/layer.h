// See LayerRule of tests/sum_rules.py.
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Layer {
  static constexpr auto name = "layer";
  static constexpr Names<1> states{"momentum_buffer"};
  FUSEDOPT_SCALARS(step, norm_sq);
  FUSEDOPT_HYPER(momentum, beta, eps, weight_decay);
  FUSEDOPT_COEFFICIENTS(momentum, beta, eps, decay, scale);
  FUSEDOPT_MEASURES(grad);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars&, bool new_state) {
    return {
        .momentum = h.momentum,
        .beta = new_state ? 1 : 1 - h.beta,
        .eps = h.eps,
        .decay = h.weight_decay,
        .scale = 0,
    };
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T, T g, const Coefficients<T>&) {
    return {.grad = g * g};
  }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    s.norm_sq += c.beta * (m.grad - s.norm_sq);
    c.scale = 1 / (std::sqrt(s.norm_sq) + c.eps);
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    state[0] = c.momentum * state[0] + c.scale * g + c.decay * p;
    return state[0];
  }
};

FUSEDOPT_REGISTER(Layer)

}  // namespace fusedopt
