// See SharingRule of tests/sum_rules.py.
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Sharing {
  static constexpr auto name = "sharing";
  static constexpr Names<0> states{};
  FUSEDOPT_SCALARS(step, level);
  FUSEDOPT_HYPER(momentum);
  FUSEDOPT_COEFFICIENTS(momentum, scale);
  FUSEDOPT_MEASURES(grad);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    return {.momentum = h.momentum, .scale = 1 / s.step};
  }

  template <class T>
  FUSEDOPT_HD static Measures<T> measure(T, T g, const Coefficients<T>&) {
    return {.grad = g * g};
  }

  FUSEDOPT_HD static double score(const Coefficients<double>& c, const Measures<double>& m) { return m.grad * c.scale; }

  FUSEDOPT_HD static void finish(Coefficients<double>& c, Scalars& s, const Sums<Measures<double>>& m) {
    s.level = c.momentum * s.level + (1 - c.momentum) * std::sqrt(m.whole.grad);
    c.scale = (1 + m.grad * c.scale) / (1 + m.largest) / (1 + s.level);
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T*, const Coefficients<T>& c) {
    return c.scale * g;
  }
};

FUSEDOPT_REGISTER(Sharing)

}  // namespace fusedopt
