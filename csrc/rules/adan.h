// Adan, with the difference e of two gradients:  m <- b1 m + (1 - b1) g ;  y <- b2 y + (1 - b2) e ;
//   v <- b3 v + (1 - b3) (g + b2 e)^2 ;  d = (m / (1 - b1^t) + b2 y / (1 - b2^t)) / (sqrt(v) / sqrt(1 - b3^t) + eps)
// Decay is proximal, p <- (p - lr d) / (1 + lr wd), or decoupled.
#pragma once

#include "core/math.h"

namespace fusedopt {

struct Adan {
  static constexpr auto name = "adan";
  static constexpr Names<4> states{"exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"};
  FUSEDOPT_SCALARS(step);
  FUSEDOPT_HYPER(lr, weight_decay, beta1, beta2, beta3, eps, no_prox);
  FUSEDOPT_COEFFICIENTS(one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3, before, m_scale, diff_scale,
                        root_scale, eps, decay, shrink);

  FUSEDOPT_HD static Coefficients<double> prepare(const Hyper& h, Scalars& s, bool new_state) {
    return {
        .one_minus_beta1 = 1 - h.beta1,
        .beta2 = h.beta2,
        .one_minus_beta2 = 1 - h.beta2,
        .beta3 = h.beta3,
        .one_minus_beta3 = 1 - h.beta3,
        .before = new_state ? 0.0 : 1.0,
        .m_scale = 1 / bias_correction(h.beta1, s.step),
        .diff_scale = h.beta2 / bias_correction(h.beta2, s.step),
        .root_scale = 1 / std::sqrt(bias_correction(h.beta3, s.step)),
        .eps = h.eps,
        .decay = h.weight_decay,
        .shrink = h.no_prox != 0 ? 1 : 1 / (1 + h.lr * h.weight_decay),
    };
  }

  template <class T>
  FUSEDOPT_HD static T direction(T p, T g, T* state, const Coefficients<T>& c) {
    const T change = c.before != T(0) ? g + state[3] : T(0);
    const T ahead = g + c.beta2 * change;
    state[0] = lerp(state[0], g, c.one_minus_beta1);
    state[1] = c.beta2 * state[1] + c.one_minus_beta2 * change;
    state[2] = c.beta3 * state[2] + c.one_minus_beta3 * (ahead * ahead);
    state[3] = -g;
    const T d = (c.m_scale * state[0] + c.diff_scale * state[1]) / (c.root_scale * std::sqrt(state[2]) + c.eps);
    return (d + c.decay * p) * c.shrink;
  }
};

FUSEDOPT_REGISTER(Adan)

}  // namespace fusedopt
