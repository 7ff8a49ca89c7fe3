// What AdamP and SGDP share: a step d is projected, d <- d - p <d, p> / (|p| + eps)^2, where the gradient is nearly
// orthogonal to the parameter: in each channel, or else in the whole tensor.
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Projected {
  FUSEDOPT_MEASURES(grad, param, grad_param, step_param, count);

  // Of a step along d.
  template <class T>
  FUSEDOPT_HD static Measures<T> sums(T p, T g, T d) {
    return {.grad = g * g, .param = p * p, .grad_param = g * p, .step_param = d * p, .count = 1};
  }

  // The cosine of gradient and parameter, times the root of how many elements they have.
  template <class Coefficients>
  FUSEDOPT_HD static double score_of(const Coefficients& c, const Measures<double>& m) {
    const double g = maximum(std::sqrt(m.grad), c.eps), p = maximum(std::sqrt(m.param), c.eps);
    return g * p > 0 ? std::abs(m.grad_param) / (g * p) * std::sqrt(m.count) : 0;
  }

  // How much of the parameter is taken out of the step; it and the decay are what the step adds of it, `pull`.
  template <class Coefficients>
  FUSEDOPT_HD static double project(Coefficients& c, double n_dims, const Sums<Measures<double>>& m) {
    const bool in_channels = m.largest < c.delta;
    if (n_dims < 2 || (!in_channels && !(score_of(c, m.whole) < c.delta))) return 0;
    const double length = std::sqrt(in_channels ? m.param : m.whole.param) + c.eps;
    const double along = length > 0 ? (in_channels ? m.step_param : m.whole.step_param) / (length * length) : 0;
    c.pull = c.pull * c.wd_ratio - along;
    return along;
  }
};

}  // namespace fusedopt
