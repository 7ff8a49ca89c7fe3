// AdEMAMix:  d = (m / (1 - b1^t) + a n) / (sqrt(v) / sqrt(1 - b2^t) + eps), with a slow average n beside Adam's m:
//   n <- b n + (1 - b) g ;  until they are warm, a is alpha t / T, and b has a half-life that grows linearly in t.
#pragma once

#include "core/math.h"

namespace fusedopt {

struct AdEMAMix {
  static constexpr auto name = "ademamix";
  static constexpr Names<3> states{"exp_avg", "exp_avg_slow", "exp_avg_sq"};
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(beta1, beta2, beta3, eps, alpha, alpha_warmup, beta3_warmup);
  FUSEDOPT_COEFFICIENTS(one_minus_beta1, one_minus_beta3, beta2, one_minus_beta2, m_scale, alpha, root_scale, eps);

  // Half-lives are in proportion to -1 / log(beta).
  FUSEDOPT_HD static double inverse_log(double beta) { return beta > 0 ? 1 / std::log(beta) : 0; }

  FUSEDOPT_HD static double warm_beta(double from, double to, double share) {
    const double inverse = (1 - share) * inverse_log(from) + share * inverse_log(to);
    return inverse != 0 ? std::exp(1 / inverse) : 0;
  }

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool) {
    const bool is_warm = s.step >= h.beta3_warmup;
    const double beta3 = is_warm ? h.beta3 : warm_beta(h.beta1, h.beta3, s.step / h.beta3_warmup);
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .one_minus_beta3 = 1 - beta3,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .m_scale = 1 / bias_correction(h.beta1, s.step),
        .alpha = s.step >= h.alpha_warmup ? h.alpha : h.alpha * (s.step / h.alpha_warmup),
        .root_scale = 1 / std::sqrt(bias_correction(h.beta2, s.step)),
        .eps = h.eps,
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T, T g, T* state, const Coefficients<T>& c) {
    state[0] = lerp(state[0], g, c.one_minus_beta1);
    state[1] = lerp(state[1], g, c.one_minus_beta3);
    state[2] = c.beta2 * state[2] + c.one_minus_beta2 * (g * g);
    return (c.m_scale * state[0] + c.alpha * state[1]) / (c.root_scale * std::sqrt(state[2]) + c.eps);
  }
};

FUSEDOPT_REGISTER(AdEMAMix)

}  // namespace fusedopt
