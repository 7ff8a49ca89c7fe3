// NAdam (torch form), with mu_t = b1 (1 - 0.96^(t psi) / 2) and the running product P_t of the mu:
//   d = [(1 - mu_t) / (1 - P_t) g + mu_{t+1} / (1 - P_t mu_{t+1}) m] / (sqrt(v / (1 - b2^t)) + eps)
#pragma once

#include "families/adam.h"

namespace fusedopt {

struct NAdam : AdamRatio<false> {
  static constexpr auto name = "nadam";
  static constexpr Names<2> scalars{"step", "mu_product"};
  static constexpr Names<4> hyper{"beta1", "beta2", "eps", "momentum_decay"};
  struct Hyper {
    double beta1, beta2, eps, momentum_decay;
  };
  struct Scalars {
    double step, mu_product;
  };

  FUSEDOPT_HD static double mu(const Hyper& h, double t) {
    return h.beta1 * (1 - 0.5 * std::pow(0.96, t * h.momentum_decay));
  }

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const double now = mu(h, s.step), next = mu(h, s.step + 1);
    s.mu_product *= now;
    const double root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step));
    return {1 - h.beta1, h.beta2, 1 - h.beta2, next / (1 - s.mu_product * next), (1 - now) / (1 - s.mu_product),
            root_scale,  h.eps};
  }
};

FUSEDOPT_REGISTER(NAdam)

}  // namespace fusedopt
