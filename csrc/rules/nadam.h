// NAdam (torch form), with mu_t = b1 (1 - 0.96^(t psi) / 2) and the running product P_t of the mu:
//   d = [(1 - mu_t) / (1 - P_t) g + mu_{t+1} / (1 - P_t mu_{t+1}) m] / (sqrt(v / (1 - b2^t)) + eps)
#pragma once

#include "families/adam.h"

namespace fusedopt {

struct NAdam : AdamRatio<false> {
  static constexpr auto name = "nadam";
  FUSEDOPT_SCALARS(step, mu_product);
  FUSEDOPT_HYPER(beta1, beta2, eps, momentum_decay);

  FUSEDOPT_HD static double mu(const Hyper& h, double t) {
    return h.beta1 * (1 - 0.5 * std::pow(0.96, t * h.momentum_decay));
  }

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const double now = mu(h, s.step), next = mu(h, s.step + 1);
    s.mu_product *= now;
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .m_scale = next / (1 - s.mu_product * next),
        .g_scale = (1 - now) / (1 - s.mu_product),
        .root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step)),
        .eps = h.eps,
    };
  }
};

FUSEDOPT_REGISTER(NAdam)

}  // namespace fusedopt
